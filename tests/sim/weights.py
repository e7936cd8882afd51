"""The simulated model: fifteen numbers in two tensors, trained by arithmetic that can be repeated from the chain alone.

    sample i ─▶ g(i) = sin((i+1)·k)          pseudo-gradient of a contribution: mean of g over its samples + θ/100
    contributions ─▶ mean by samples ─▶ Nesterov ─▶ θ', v', Δ̄, U        as hypha.training.outer, in numpy fp32

Every file is canonical SafeTensors, so equal numbers have equal digests. Where parameter servers share the model each
has a part of its own: the elements of its tensors, to which the same arithmetic is done.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from hypha.protocol.bridge import FileRef
from hypha.protocol.job import OuterOptimizer
from hypha.protocol.shards import split, whole_digest
from hypha.protocol.tensorfile import Layout, TensorSpec, layout, parse_header

Vector = npt.NDArray[np.float32]  # all elements of the model, in file order
SHAPES = {"bias": (3,), "weight": (4, 3)}
ELEMENTS = 15
_SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
_WAVES = 0.37 * np.arange(1, ELEMENTS + 1)
IDS = "ids"  # the one tensor of the simulated dataset: a number for each sample


def initial(seed: int) -> Vector:
    """Model 0 of a job with this seed."""
    return np.cos(seed + np.arange(ELEMENTS)).astype(np.float32)


def zeros() -> Vector:
    """Momentum 0."""
    return np.zeros(ELEMENTS, np.float32)


def pseudo_gradient(samples: Iterable[int], base: Vector) -> Vector:
    """What training on these samples from that base gives, in whatever order they came; zero without samples."""
    ids = np.sort(np.fromiter(samples, np.int64))
    if not len(ids):
        return zeros()
    mean = np.sin(np.outer(ids + 1, _WAVES)).mean(axis=0)
    return (mean + 0.01 * base.astype(np.float64)).astype(np.float32)


def mean(weighted: Sequence[tuple[Vector, int]]) -> Vector:
    """Δ̄ of (pseudo-gradient, its samples) in the order given, every product and sum rounded to fp32."""
    samples = sum(count for _, count in weighted)
    (first, count), *others = weighted
    total = first * np.float32(count / samples)
    for delta, count in others:
        total = total + delta * np.float32(count / samples)
    return total


def step(theta: Vector, velocity: Vector, gradient: Vector, outer: OuterOptimizer) -> tuple[Vector, Vector, Vector]:
    """Return θ', v' and U of one Nesterov step."""
    momentum, rate = np.float32(outer.momentum), np.float32(outer.learning_rate)
    speed = velocity * momentum + gradient
    update = (speed * momentum + gradient) * rate
    return theta - update, speed, update


@cache
def _file_of(shard: int, shards: int) -> tuple[bytes, Layout]:
    names = split(_SIZES, shards)[shard]
    return layout([TensorSpec(name, "F32", SHAPES[name]) for name in names])


def _elements(shard: int, shards: int) -> npt.NDArray[np.intp]:
    """Where the elements of a shard lie among all, in file order."""
    starts, at = {}, 0
    for name in sorted(SHAPES):
        starts[name], at = at, at + _SIZES[name]
    names = split(_SIZES, shards)[shard]
    return np.concatenate([np.arange(starts[name], starts[name] + _SIZES[name]) for name in names])


def part(vector: Vector, shard: int, shards: int) -> Vector:
    """Return a shard's elements of the whole."""
    return vector[_elements(shard, shards)]


def join(parts: Sequence[Vector]) -> Vector:
    """Return the whole that consists of these shards."""
    whole = zeros()
    for shard, elements in enumerate(parts):
        whole[_elements(shard, len(parts))] = elements
    return whole


def to_bytes(part: Vector, shard: int = 0, shards: int = 1) -> bytes:
    """The file that holds a shard's numbers."""
    return _file_of(shard, shards)[0] + part.astype("<f4").tobytes()


def digest(part: Vector, shard: int = 0, shards: int = 1) -> str:
    """The digest of that file."""
    return blake3(to_bytes(part, shard, shards)).hexdigest()


def digests(whole: Vector, shards: int) -> tuple[str, ...]:
    """The digests of all shards' files."""
    return tuple(digest(part(whole, shard, shards), shard, shards) for shard in range(shards))


def digest_of_all(whole: Vector, shards: int) -> str:
    """What the whole is called where so many servers share it."""
    return whole_digest(digests(whole, shards), hashlib.sha256)


def write(path: Path, part: Vector, root: Path, shard: int = 0, shards: int = 1) -> FileRef:
    """Write a shard's file and return it as the bridge names it."""
    data = to_bytes(part, shard, shards)
    path.write_bytes(data)
    return FileRef(path=str(path.relative_to(root)), bytes=len(data), digest=blake3(data).hexdigest())


def read(path: Path, shard: int = 0, shards: int = 1) -> Vector:
    """Return the numbers in a shard's file. Raises RemoteProtocolError where it is none of ours."""
    _, ours = _file_of(shard, shards)
    data = path.read_bytes()
    placed = parse_header(data[: ours.header_bytes], file_bytes=len(data))
    assert placed.shapes() == ours.shapes(), f"{path.name} is another model's"
    return np.frombuffer(data, "<f4", offset=ours.header_bytes).astype(np.float32)


def slice_bytes(first: int, samples: int) -> bytes:
    """A slice file that holds the samples numbered from `first`."""
    header, _ = layout([TensorSpec(IDS, "U32", (samples,))])
    return header + np.arange(first, first + samples, dtype="<u4").tobytes()


def rows(path: Path, start: int, stop: int) -> list[int]:
    """The numbers of the samples in rows [start, stop) of a slice file."""
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    placed = parse_header(data[:header_bytes], file_bytes=len(data)).tensors[IDS]
    return [int(each) for each in np.frombuffer(data[placed.start : placed.stop], "<u4")[start:stop]]
