"""Model files: canonical SafeTensors fp32, written and read piece by piece.

    file = Reader(path)                         each piece is mapped while it is used
    with Writer(path, shapes) as out:           header first, then elements in file order, blake3 on the way
        for piece in file.pieces():             at most PIECE_ELEMENTS of one tensor
            out.append(f(file.part(piece)))
        written = out.finish()

A file that is not whole does not exist: it is written as `.part` and renamed when it is complete. The digest of a file
is the digest of its tensors (hypha.protocol.tensorfile). Digest and disk have a thread of their own, so that the next
piece is computed meanwhile: what is given to a writer must not change before `finish`.
"""

import math
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

import torch
from blake3 import blake3
from msgspec import Struct

from hypha.errors import RemoteProtocolError, StoreError
from hypha.protocol.bridge import FileRef
from hypha.protocol.compression import PLAIN
from hypha.protocol.tensorfile import LENGTH_BYTES, Layout, TensorSpec, header_length, layout, parse_header
from hypha.training.arriving import Arriving

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")

# 1 MiB of fp32: the dozen pieces of a merge stay in the processor's cache, whatever the largest tensor. Twice as much
# costs a merge twice the time: memory for it is given back to the kernel and cleared again with every piece.
PIECE_ELEMENTS = 1 << 18
# Pieces of one file on their way to the disk: enough that neither thread waits for every single piece of the other.
PIECES_BEHIND_MAX = 2
# One for all files: what a step gives to its four files is still in the cache when its turn comes.
_BEHIND = ThreadPoolExecutor(1, thread_name_prefix="tensors-writer")
# What can wait, in a thread that leaves the processor to whoever cannot: a quarter is its own where all want it.
_ASIDE_NICENESS = 5
_here = threading.local()


def _yield_to_others() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _ASIDE_NICENESS)
    _here.aside = True  # what is written there is written by that very thread


_ASIDE = ThreadPoolExecutor(1, thread_name_prefix="tensors-aside", initializer=_yield_to_others)


def aside(work: Callable[[], T]) -> Future[T]:
    """Do this in a thread of low priority, after what was given before."""
    return _ASIDE.submit(work)


# Canonical files place fp32 on multiples of it; a tensor that begins elsewhere is copied to where numbers may lie.
WORD_BYTES = 4


class Piece(Struct, frozen=True):
    """Elements [start, stop) of one tensor, in row-major order."""

    name: str
    start: int
    stop: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor, flat, fp32 on the CPU."""
        return tensor.detach().reshape(-1)[self.start : self.stop].to("cpu", torch.float32)

    def put(self, tensor: torch.Tensor, elements: torch.Tensor) -> None:
        """Give these elements of a tensor other values."""
        if tensor.is_contiguous():
            tensor.detach().view(-1)[self.start : self.stop].copy_(elements)
        else:  # no flat view of it exists
            flat = tensor.detach().reshape(-1)
            flat[self.start : self.stop] = elements
            tensor.detach().copy_(flat.view(tensor.shape))


class Written(Struct, frozen=True):
    """A finished file: its path, size in bytes and blake3."""

    path: Path
    bytes: int
    digest: str

    def ref(self, work_dir: Path) -> FileRef:
        """As the bridge names it: relative to the work directory."""
        return FileRef(path=str(self.path.relative_to(work_dir)), bytes=self.bytes, digest=self.digest)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory as little-endian bytes, without a copy where it is contiguous fp32 on the CPU."""
    array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array.reshape(-1).view("u1").data


class _Backlog:
    """Pieces of one file behind whoever computes them: in their order, and few at a time."""

    def __init__(self) -> None:
        self._pieces: deque[Future[None]] = deque()

    def add(self, take: Callable[[memoryview], None], data: memoryview) -> None:
        """Have this piece taken, and wait for earlier ones where there are too many. Raises what taking them raised."""
        while len(self._pieces) >= PIECES_BEHIND_MAX:
            self._pieces.popleft().result()
        self._pieces.append(_BEHIND.submit(take, data))

    def settle(self) -> None:
        """Wait for all. Raises what taking them raised."""
        while self._pieces:
            self._pieces.popleft().result()

    def abandon(self) -> None:
        """Wait for all, whatever becomes of them."""
        wait(self._pieces)


class FileWriter:
    """Writes one file, bytes in file order; `names` is the order of tensors. Raises StoreError naming the path."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        header, self._layout = layout(specs)
        self.path = path
        self.names = list(self._layout.tensors)
        self._size = 0
        self._hash = blake3()
        self._behind = _Backlog()
        self._part = path.with_name(path.name + ".part")
        try:
            self._file = self._part.open("wb", buffering=0)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        try:
            self._write(memoryview(header))
        except StoreError:
            self._give_up()
            raise

    def __enter__(self) -> Self:
        """Nothing to do: the header is already written."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Remove what was not finished."""
        if not self._file.closed:
            self._give_up()

    def _give_up(self) -> None:
        self._behind.abandon()
        self._file.close()
        self._part.unlink(missing_ok=True)

    def put(self, data: torch.Tensor) -> None:
        """Write the bytes that follow in file order: U8 on the CPU."""
        self._put(data.contiguous().numpy().data)

    def finish(self) -> Written:
        """Put the complete file in its place."""
        self._behind.settle()
        assert self._size == self._layout.file_bytes, f"{self.path}: {self._size} of {self._layout.file_bytes} bytes"
        try:
            self._file.close()
            self._part.replace(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        return Written(self.path, self._layout.file_bytes, self._hash.hexdigest())

    def _put(self, data: memoryview) -> None:
        if getattr(_here, "aside", False):
            self._write(data)
            return
        self._behind.add(self._write, data)

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        self._size += len(data)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error


class Digester:
    """Takes the digest of a file of fp32 tensors without writing it, behind whoever computes them."""

    def __init__(self, shapes: Shapes) -> None:
        header, _ = layout(TensorSpec(name, "F32", shape) for name, shape in shapes.items())
        self._hash = blake3(header)
        self._behind = _Backlog()

    def append(self, elements: torch.Tensor) -> None:
        """Take in what follows in file order; it must not change before `finish`."""
        self._behind.add(self._take, _bytes_of(elements))

    def finish(self) -> str:
        """Return the digest that the file would have."""
        self._behind.settle()
        return self._hash.hexdigest()

    def _take(self, data: memoryview) -> None:
        self._hash.update(data)


class Writer(FileWriter):
    """Writes one file of fp32 tensors."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        super().__init__(path, (TensorSpec(name, "F32", shape) for name, shape in shapes.items()))

    def append(self, elements: torch.Tensor) -> None:
        """Write what follows in file order: a piece or a whole tensor, any float dtype and device, stored as fp32."""
        self._put(_bytes_of(elements))


class Reader:
    """Reads one file of fp32 tensors, open only while one of its tensors is used: a merge may have thousands of files.

    Raises RemoteProtocolError naming the file and the fault.
    """

    def __init__(self, path: Path, arriving: Arriving | None = None) -> None:
        """`arriving`: the same file, of which what is asked for is waited for."""
        self.path = path
        self._arriving = arriving
        self.layout = layout_of(path) if arriving is None else _layout(path, arriving.until, arriving.size)
        self.names = sorted(self.layout.tensors)

    def pieces(self) -> Iterator[Piece]:
        """The whole file, in file order of a canonical one."""
        return pieces_of(self.layout.shapes())

    def part(self, piece: Piece) -> torch.Tensor:
        """Return some elements of a tensor, flat, fp32 on the CPU, as `raw` does."""
        placed = self.layout.tensors.get(piece.name)
        if placed is None:
            raise RemoteProtocolError(f"{self.path.name}: tensor {piece.name!r} is missing")
        if placed.spec.dtype != "F32":
            raise RemoteProtocolError(f"{self.path.name}: tensor {piece.name!r} is {placed.spec}, expected F32")
        size = torch.float32.itemsize
        return self.raw(piece.name, piece.start * size, piece.stop * size).view(torch.float32)

    def raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return bytes [start, stop) of a tensor that the file has, U8: mapped, so that reading them is no copy.

        Each call maps anew and privately: what is done to the tensor changes neither the file nor the next call.
        """
        placed = self.layout.tensors[name]
        assert 0 <= start <= stop <= placed.stop - placed.start, f"bytes {start} to {stop} of {placed}"
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        at = placed.start + start
        page = at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._until(placed.start + stop) as descriptor:
            try:
                window = mmap.mmap(descriptor, at - page + stop - start, access=mmap.ACCESS_COPY, offset=page)
            except ValueError as error:
                raise RemoteProtocolError(f"{self.path.name}: tensor {name!r} is cut short") from error
        data = torch.frombuffer(window, dtype=torch.uint8, count=stop - start, offset=at - page)
        return data if at % WORD_BYTES == 0 else data.clone()

    @contextmanager
    def _until(self, stop: int) -> Iterator[int]:
        """Yield a descriptor from which the bytes before `stop` can be read."""
        if self._arriving is not None:
            yield self._arriving.until(stop)
            return
        with self.path.open("rb", buffering=0) as file:
            yield file.fileno()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, whole, as `raw` does."""
        shape = self.layout.tensors[name].spec.shape if name in self.layout.tensors else ()
        return self.part(Piece(name, 0, math.prod(shape))).reshape(shape)


def pieces_of(shapes: Shapes) -> Iterator[Piece]:
    """All elements of tensors of these shapes, in file order of a canonical file."""
    for name in sorted(shapes):
        elements = math.prod(shapes[name])
        for start in range(0, elements, PIECE_ELEMENTS):
            yield Piece(name, start, min(start + PIECE_ELEMENTS, elements))


def layout_of(path: Path) -> Layout:
    """Read and check a file's header. Raises RemoteProtocolError naming the file and the fault."""
    try:
        with path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            return _layout(path, lambda _stop: descriptor, os.fstat(descriptor).st_size)
    except OSError as error:
        raise RemoteProtocolError(f"{path}: {error.strerror}") from error


def _layout(path: Path, until: Callable[[int], int], size: int) -> Layout:
    """Read the header of a file of `size` bytes; `until(stop)` gives a descriptor of its bytes before `stop`."""
    try:
        prefix = os.pread(until(LENGTH_BYTES), LENGTH_BYTES, 0)
        length = header_length(prefix, file_bytes=size)
        return parse_header(os.pread(until(length), length, 0), file_bytes=size)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{path.name}: {error}") from error


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write tensors as one file."""
    with Writer(path, shapes_of(tensors)) as out:
        for name in out.names:
            out.append(tensors[name])
        return out.finish()


def load_into(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a file's tensors into existing ones of the same names and shapes, in place, one at a time."""
    file = Reader(path)
    fault = mismatch(file.layout, shapes_of(tensors))
    if fault is not None:
        raise RemoteProtocolError(f"{path.name}: {fault}")
    with torch.no_grad():
        for name in file.names:
            tensors[name].copy_(file.read(name))


def load_parts(paths: Sequence[Path], tensors: Mapping[str, torch.Tensor]) -> None:
    """`load_into` from several files that together have every tensor once: a model that parameter servers share."""
    holders: dict[str, Path] = {}
    for path in paths:
        for name in layout_of(path).tensors:
            if name in holders:
                raise RemoteProtocolError(f"{path.name}: tensor {name!r} is in {holders[name].name}, too")
            holders[name] = path
    if missing := sorted(tensors.keys() - holders.keys()):
        raise RemoteProtocolError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    for path in paths:
        load_into(path, {name: tensor for name, tensor in tensors.items() if holders[name] == path})


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """blake3 of the file that `save` would write."""
    header, places = layout(TensorSpec(name, "F32", shape) for name, shape in shapes_of(tensors).items())
    hasher = blake3(header)
    for name in places.tensors:
        hasher.update(_bytes_of(tensors[name]))
    return hasher.hexdigest()


def mismatch(found: Layout, shapes: Shapes) -> str | None:
    """Say how a file's names, shapes and dtypes differ from fp32 tensors of these shapes; None if they do not."""
    return PLAIN.mismatch(found, shapes)


def screen(path: Path, shapes: Shapes) -> str | None:
    """Say why a pseudo-gradient must not be merged: wrong names, shapes, dtypes, or not finite; None if it may."""
    try:
        file = Reader(path)
        fault = mismatch(file.layout, shapes)
        if fault is not None:
            return fault
        for piece in file.pieces():
            if not is_finite(file.part(piece)):
                return f"tensor {piece.name!r} is not finite"
    except RemoteProtocolError as error:
        return str(error)
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """True when no element is NaN or infinite. The sum is tried first: it is finite only if all elements are."""
    return bool(torch.isfinite(tensor.sum())) or cast(bool, torch.isfinite(tensor).all().item())
