"""A model file as a directory that users load: `python -m hypha.training.export --job J --model-file F --out DIR`.

    model-12.safetensors + job.json ─▶ DIR/{config.json, model.safetensors} ─▶ AutoModelForCausalLM.from_pretrained(DIR)
    --sample N                      ─▶ N bytes of text from the initial weights and from the exported ones

Prints one JSON object: {"model_dir", "parameters", "sample_before", "sample_after"}; samples only where asked for.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hypha.errors import ConfigError, HyphaError
from hypha.protocol.job import ModelSpec
from hypha.training import models, tensors
from hypha.training.executor import load_job

SAMPLE_SEED = 0
# Below 1 the model keeps to what it is surer of: text looks like its corpus sooner.
TEMPERATURE = 0.7
BYTE_VALUES = 256
EXIT_USAGE = 2


def export(spec: ModelSpec, model_file: Path, out: Path, *, source: Path | None = None) -> torch.nn.Module:
    """Write the model to `out` and return it. Raises ConfigError, RemoteProtocolError naming the file."""
    model: Any = models.build(spec, source=source)
    tensors.load_into(model_file, models.parameters_of(model))
    out.mkdir(parents=True, exist_ok=True)
    if spec.type == models.TORCH:
        tensors.save(out / "model.safetensors", models.parameters_of(model))
        (out / "config.json").write_text(json.dumps({"type": models.TORCH, **(spec.config or {})}, indent=2) + "\n")
    else:
        model.save_pretrained(out)
    return model  # type: ignore[no-any-return]


def sample(model: torch.nn.Module, count: int, prompt: bytes = b"\n") -> str:
    """Return `count` bytes that a byte-level causal model continues the prompt with, the same ones every time.

    Raises ConfigError for a model of anything but bytes.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "vocab_size", None) != BYTE_VALUES:
        raise ConfigError("--sample: the model's tokens are not bytes")
    window = int(config.max_position_embeddings)
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    tokens = torch.tensor([list(prompt)])
    model.eval()
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=tokens[:, -window:]).logits[:, -1, :]
            chosen = torch.multinomial(torch.softmax(logits / TEMPERATURE, dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, chosen], dim=1)
    return bytes(tokens[0, len(prompt) :].tolist()).decode("utf-8", errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; returns its exit code: 0, 1 (the file is no such model), 2 (usage)."""
    parser = argparse.ArgumentParser(prog="python -m hypha.training.export", description=__doc__.splitlines()[0])
    parser.add_argument("--job", type=Path, required=True, help="JSON file of the job")
    parser.add_argument("--model-file", type=Path, required=True, help="SafeTensors file of the job's parameters")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--source", type=Path, help="directory of the job's model repository, where it has one")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="sample N bytes before and after")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        spec = load_job(given.job).model
        model = export(spec, given.model_file, given.out, source=given.source)
        said: dict[str, object] = {
            "model_dir": str(given.out),
            "parameters": sum(tensor.numel() for tensor in models.parameters_of(model).values()),
        }
        if given.sample:
            said["sample_before"] = sample(models.build(spec, source=given.source), given.sample)
            said["sample_after"] = sample(model, given.sample)
    except HyphaError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE if isinstance(error, ConfigError) else 1
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
