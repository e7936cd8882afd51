"""A dataset whose loss has a floor that every long enough run comes near: classes drawn from a fixed random network.

    x ~ N(0, 1)[16] ─▶ tanh(x·A)·B ─▶ softmax ─▶ label drawn        inputs F32[16], labels I64[]
    language: tokens that each follow from the one before          input_ids I64[16]

Written as the public format has it (rounds.md), without torch.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

from hypha.dataset import Manifest, SliceEntry, render_manifest

NAME = "chaos-classes"
INPUTS, CLASSES, HIDDEN = 16, 8, 24
SLICES, SLICE_SAMPLES, HELD_OUT_SAMPLES = 12, 2400, 2048
# How sure the teacher is: a loss well above zero at the floor, and well below log(CLASSES).
SHARPNESS = 2.0
SCHEMA = {"inputs": f"F32[{INPUTS}]", "labels": "I64[]"}
TOKENS, LENGTH = 64, 16
LANGUAGE_SCHEMA = {"input_ids": f"I64[{LENGTH}]"}


Tensors = dict[str, np.ndarray]


def write(directory: Path, seed: int, *, slices: int = SLICES, language: bool = False) -> None:
    """Write the dataset of this seed into a new directory."""
    directory.mkdir()
    chance = np.random.default_rng(seed)
    make = _sentences() if language else _classes(chance)
    entries = []
    for number in range(slices + 1):
        split: Literal["train", "held-out"] = "held-out" if number == slices else "train"
        samples = HELD_OUT_SAMPLES if split == "held-out" else SLICE_SAMPLES
        data = save(make(chance, samples))
        name = f"{split}-{number:05d}.safetensors"
        (directory / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append(SliceEntry(name=name, split=split, samples=samples, bytes=len(data), digest=digest))
    schema = LANGUAGE_SCHEMA if language else SCHEMA
    (directory / "dataset.toml").write_bytes(render_manifest(Manifest(name=NAME, schema=schema, slices=tuple(entries))))


def _classes(chance: np.random.Generator) -> Callable[[np.random.Generator, int], Tensors]:
    first = chance.standard_normal((INPUTS, HIDDEN)) / math.sqrt(INPUTS)
    second = chance.standard_normal((HIDDEN, CLASSES)) / math.sqrt(HIDDEN)

    def make(chance: np.random.Generator, samples: int) -> Tensors:
        inputs = chance.standard_normal((samples, INPUTS))
        scores = SHARPNESS * math.sqrt(HIDDEN) * (np.tanh(inputs @ first) @ second)
        # The largest of scores with Gumbel noise is a draw from their softmax.
        labels = np.argmax(scores + chance.gumbel(size=scores.shape), axis=1)
        return {"inputs": inputs.astype(np.float32), "labels": labels.astype(np.int64)}

    return make


def _sentences() -> Callable[[np.random.Generator, int], Tensors]:
    def make(chance: np.random.Generator, samples: int) -> Tensors:
        steps = chance.integers(1, 4, size=(samples, LENGTH))
        return {"input_ids": np.cumsum(steps, axis=1, dtype=np.int64) % TOKENS}

    return make
