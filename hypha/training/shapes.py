"""The shapes of a model's tensors, told without making one: `python -m hypha.training.shapes`.

    stdin   a ModelSpec as JSON           stdout  {"lm_head.weight": [256, 64], …}, one line

Nothing is downloaded and no weights are read: a `repository` cannot be told, a `path` needs its configuration there.
The scheduler, which knows no torch, asks this way before it refuses another model's checkpoint.
"""

import sys
from pathlib import Path

import msgspec
import torch

from hypha.errors import ConfigError
from hypha.protocol.job import ModelSpec
from hypha.training import models


def shapes_of(spec: ModelSpec, source: Path | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter; `source` is the directory of its repository, where that is here.

    Raises ConfigError where they cannot be told.
    """
    with torch.device("meta"):
        source = source if source is not None or spec.path is None else Path(spec.path)
        model = models.build(spec) if source is None else models.from_configuration(spec, source)
    return {name: tuple(tensor.shape) for name, tensor in models.parameters_of(model).items()}


def main() -> int:
    """Answer one question; the exit code is 1 where there is no answer."""
    try:
        shapes = shapes_of(msgspec.json.decode(sys.stdin.buffer.read(), type=ModelSpec))
    except (ConfigError, msgspec.DecodeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(shapes) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
