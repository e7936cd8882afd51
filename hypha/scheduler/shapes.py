"""Which tensors of a stored checkpoint have other shapes than those of the model that is configured now.

    there  the header of the newest model in the store
    here   `python -m hypha.training.shapes` in a process of its own: the scheduler knows no torch

Asked only when a checkpoint is about to be refused, so it may take its seconds; what cannot be told is left out.
"""

import json
import subprocess
import sys
from collections.abc import Mapping

import msgspec

from hypha.errors import RemoteProtocolError, StoreError
from hypha.protocol.job import ModelSpec
from hypha.protocol.tensorfile import header_length
from hypha.store.blobs import Blobs
from hypha.store.objects import ObjectStore

Shapes = Mapping[str, tuple[int, ...]]

# Importing torch and transformers on a busy machine.
PATIENCE_S = 120.0
NAMED_MAX = 3
# The size of the file is not asked for: its header is read from the first pieces.
ANY_BYTES = 1 << 62


def differing_shapes(objects: ObjectStore, model: ModelSpec) -> str:
    """Return in words how the store's newest model differs from this one; "" where that cannot be told. Blocks."""
    there = stored_shapes(objects)
    here = configured_shapes(model) if there else None
    return "" if there is None or here is None else say_difference(there, here)


def say_difference(there: Shapes, here: Shapes) -> str:
    """Name the first tensors that differ, and how many more do; "" where none does."""
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    said = [f"tensor {name} {_say(there.get(name))} there, {_say(here.get(name))} here" for name in names[:NAMED_MAX]]
    if len(names) > NAMED_MAX:
        said.append(f"{len(names) - NAMED_MAX} more differ")
    return ", ".join(said)


def _say(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"is {list(shape)}"


def stored_shapes(objects: ObjectStore) -> Shapes | None:
    """Return the shapes in the newest model of a store, None where there is none that can be read."""
    try:
        newest = max(Blobs(objects).artifacts("model"), default=None)
        if newest is None:
            return None
        data = b""
        for piece in objects.chunks(newest.name):
            data += piece
            if len(data) >= (length := header_length(data, file_bytes=ANY_BYTES)):
                entries = msgspec.json.decode(data[8:length], type=dict[str, _Tensor])
                return {name: entry.shape for name, entry in entries.items()}
    except (StoreError, RemoteProtocolError, msgspec.DecodeError):
        return None  # a damaged checkpoint tells nothing here
    return None


class _Tensor(msgspec.Struct):
    shape: tuple[int, ...]


def configured_shapes(model: ModelSpec) -> Shapes | None:
    """Return the shapes that a model would have, None where this machine cannot tell."""
    command = [sys.executable, "-m", "hypha.training.shapes"]
    try:
        done = subprocess.run(
            command, input=msgspec.json.encode(model), capture_output=True, timeout=PATIENCE_S, check=True
        )
        return {name: tuple(shape) for name, shape in json.loads(done.stdout.splitlines()[-1]).items()}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # no torch here, or a model that is described elsewhere
