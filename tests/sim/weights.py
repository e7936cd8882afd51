"""The simulated model: fifteen numbers in three layers, trained by arithmetic that the chain alone can repeat.

    sample i ─▶ g(i) = sin((i+1)·k)          pseudo-gradient of a contribution: mean of g over its samples + θ/100
    contributions ─▶ mean by samples ─▶ Nesterov ─▶ θ', v', Δ̄, U        as hypha.training.outer, in numpy fp32

Every file is canonical SafeTensors, so equal numbers have equal digests. A file may hold some of the tensors only; a
vector has all elements, those of other tensors being zero.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from hypha.protocol.bridge import FileRef
from hypha.protocol.fragments import Fragments
from hypha.protocol.job import OuterOptimizer
from hypha.protocol.shards import split
from hypha.protocol.tensorfile import TensorSpec, layout, parse_header

Vector = npt.NDArray[np.float32]  # all elements of the model, in file order
SHAPES = {"layers.0.weight": (4,), "layers.1.weight": (4, 2), "layers.2.bias": (3,)}
ELEMENTS = 15
_PLACES = {"layers.0.weight": slice(0, 4), "layers.1.weight": slice(4, 12), "layers.2.bias": slice(12, 15)}
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


def step(
    theta: Vector, velocity: Vector, gradient: Vector, outer: OuterOptimizer, names: Collection[str] = SHAPES
) -> tuple[Vector, Vector, Vector]:
    """Return θ', v' and U of one Nesterov step on these tensors; the others stay."""
    momentum, rate = np.float32(outer.momentum), np.float32(outer.learning_rate)
    speed, update = velocity.copy(), zeros()
    for name in sorted(names):
        at = _PLACES[name]
        speed[at] = velocity[at] * momentum + gradient[at]
        update[at] = (speed[at] * momentum + gradient[at]) * rate
    return theta - update, speed, update


def shares(fragments: Fragments, shards: int) -> list[frozenset[str]]:
    """Return the names of the tensors that each of so many parameter servers has."""
    sizes = {name: 4 * math.prod(shape) for name, shape in SHAPES.items()}
    return [frozenset(names) for names in split(sizes, shards, fragments.parts)]


def to_bytes(vector: Vector, names: Collection[str] = SHAPES) -> bytes:
    """The file that holds these numbers of these tensors."""
    header, _ = layout([TensorSpec(name, "F32", SHAPES[name]) for name in names])
    return header + b"".join(vector[_PLACES[name]].astype("<f4").tobytes() for name in sorted(names))


def digest(vector: Vector, names: Collection[str] = SHAPES) -> str:
    """The digest of that file."""
    return blake3(to_bytes(vector, names)).hexdigest()


def write(path: Path, vector: Vector, root: Path, names: Collection[str] = SHAPES) -> FileRef:
    """Write the file and return it as the bridge names it."""
    data = to_bytes(vector, names)
    path.write_bytes(data)
    return FileRef(path=str(path.relative_to(root)), bytes=len(data), digest=blake3(data).hexdigest())


def names_in(path: Path) -> frozenset[str]:
    """Return the names of the tensors in a file."""
    data = path.read_bytes()
    return frozenset(parse_header(data[: 8 + int.from_bytes(data[:8], "little")], file_bytes=len(data)).tensors)


def read(path: Path, names: Collection[str] = SHAPES) -> Vector:
    """Return the numbers in a file. Raises RemoteProtocolError where it is none of ours."""
    data, vector = path.read_bytes(), zeros()
    header, mine = layout([TensorSpec(name, "F32", SHAPES[name]) for name in names])
    placed = parse_header(data[: len(header)], file_bytes=len(data))
    assert placed.shapes() == mine.shapes(), f"{path.name} holds {sorted(placed.shapes())}, not {sorted(names)}"
    for name in sorted(names):
        at, found = _PLACES[name], placed.tensors[name]
        vector[at] = np.frombuffer(data[found.start : found.stop], "<f4")
    return vector


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
