"""A transformers processor between the slices and the model.

    batch {tensor: rows} ─▶ inputs {argument: tensor} ─▶ processor(**arguments, return_tensors="pt") ─┐
                     └──── tensors that are no input (labels) pass ────────────────────────────────────┴▶ batch

Text travels in slices as UTF-8 bytes (U8), padded with zeros; it is decoded for tokenizers.
"""

import importlib
from pathlib import Path
from typing import Any

import torch

from hypha.errors import ConfigError, JobFailed
from hypha.protocol.job import PreprocessorSpec

CLASSES = {
    "auto": "AutoProcessor",
    "tokenizer": "AutoTokenizer",
    "image": "AutoImageProcessor",
    "feature": "AutoFeatureExtractor",
}
TOKENIZER = "tokenizer"
# The argument of a processor that takes text.
TEXT = "text"

Batch = dict[str, torch.Tensor]


class Preprocessor:
    """Callable on batches; without a specification it passes them on. Raises ConfigError naming the key.

    With `own_target`, a batch of `input_ids` without `labels` gets them as its labels.
    """

    def __init__(self, spec: PreprocessorSpec | None, source: Path | None, *, own_target: bool = False) -> None:
        self._spec = spec
        self._own_target = own_target
        self._processor: Any = None
        if spec is None:
            return
        name = CLASSES.get(spec.type)
        if name is None:
            raise ConfigError(f"preprocessor.type: unknown {spec.type!r}; known: {', '.join(CLASSES)}")
        if not spec.inputs:
            raise ConfigError("preprocessor.inputs: name the tensor for each argument, for example {images = 'pixels'}")
        kind = getattr(importlib.import_module("transformers"), name)
        try:
            self._processor = kind.from_pretrained(str(source), local_files_only=True)
        except (OSError, TypeError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"preprocessor: {spec.repository or spec.path}: {error}") from error

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch as the model wants it. Raises JobFailed naming the tensor that is missing."""
        made = batch if self._spec is None else self._processed(batch, self._spec)
        if self._own_target and "labels" not in made and "input_ids" in made:
            return {**made, "labels": made["input_ids"]}
        return made

    def _processed(self, batch: Batch, spec: PreprocessorSpec) -> Batch:
        arguments: dict[str, Any] = {}
        for argument, tensor in spec.inputs.items():
            if tensor not in batch:
                raise JobFailed(f"preprocessor: the dataset has no tensor {tensor!r}, only {sorted(batch)}")
            arguments[argument] = texts(batch[tensor]) if argument == TEXT else list(batch[tensor].numpy())
        padding = {"padding": True, "truncation": True} if spec.type == TOKENIZER else {}
        try:
            made = self._processor(**arguments, **padding, return_tensors="pt")
        except (TypeError, ValueError) as error:
            raise JobFailed(f"preprocessor: {error}") from error
        used = set(spec.inputs.values())
        return {**{name: rows for name, rows in batch.items() if name not in used}, **made}


def texts(rows: torch.Tensor) -> list[str]:
    """UTF-8 bytes, one text per row, zeros at the end cut off."""
    return [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", errors="replace") for row in rows]
