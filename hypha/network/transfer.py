"""Files over streams: one side reads ahead, the other writes behind, both check that the bytes are the right ones.

    path ─read─▶ chunk ─▶ stream ═══▶ stream ─▶ chunk ─hash, write─▶ path.part ─digest right─▶ path
          while the one before is sent              while the next one comes

Where the stream can offer a lane of its own for a large transfer (see `lane`), the same bytes go that way.
Memory is bounded by a few chunks on either side. A transfer that breaks leaves `path.part`, and the next one may go on
after it: `partial_size` says from where. What arrives wrong is deleted, since no continuation could mend it.
Nothing is synced to disk: whoever needs it durable syncs it.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

import trio
from blake3 import blake3

from hypha.errors import HyphaError, PeerUnreachable, RemoteProtocolError, StoreError
from hypha.network.framing import ByteSource, ByteStream
from hypha.network.lane import SENDER_STALL_S, Terms, lane_of
from hypha.runtime import Runtime

CHUNK_BYTES = 1 << 20
# One chunk under way on each side of the queue: the disk and the network never wait for one another in turn.
CHUNKS_QUEUED_MAX = 2
# A stream may hand out slivers: so many of them are worth a trip to the disk, too (POSIX's IOV_MAX is 1024 on Linux).
PIECES_MAX = 256


class Hash(Protocol):
    """What both algorithms offer."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """Return the digest of everything taken in, lower-case hexadecimal."""


HASHES: dict[str, Callable[[], Hash]] = {"sha256": hashlib.sha256, "blake3": blake3}


def partial_path(path: Path) -> Path:
    """Return where a transfer to `path` collects its bytes."""
    return path.with_name(path.name + ".part")


def partial_size(path: Path) -> int:
    """Return how many bytes of a transfer to `path` are there already."""
    try:
        return partial_path(path).stat().st_size
    except FileNotFoundError:
        return 0


async def send_file(stream: ByteStream, path: Path, *, offset: int = 0, length: int, runtime: Runtime) -> None:
    """Send `length` bytes of the file from `offset`.

    Raises StoreError when the file cannot be read or is too short, and what `send_all` raises.
    """
    descriptor = await runtime.run_blocking(_open, path, os.O_RDONLY)
    try:
        async with lane_of(stream, Terms(sending=True, stall_s=SENDER_STALL_S), length) as lane:
            if lane is None:
                await _send_over(stream, descriptor, path, offset, length, runtime)
            else:
                await lane.send(_Reader(descriptor, path, offset), length)
    finally:
        os.close(descriptor)


async def _send_over(
    stream: ByteStream, descriptor: int, path: Path, offset: int, length: int, runtime: Runtime
) -> None:
    async with _concurrently() as nursery:
        chunks_in, chunks = trio.open_memory_channel[bytes](CHUNKS_QUEUED_MAX)
        nursery.start_soon(_read_ahead, chunks_in, descriptor, path, offset, length, runtime)
        async for chunk in chunks:
            await stream.send_all(chunk)


async def _read_ahead(
    chunks: trio.MemorySendChannel[bytes], descriptor: int, path: Path, offset: int, length: int, runtime: Runtime
) -> None:
    with chunks:
        end = offset + length
        while offset < end:
            chunk = await runtime.run_blocking(_read, descriptor, path, offset, min(CHUNK_BYTES, end - offset))
            await chunks.send(chunk)
            offset += len(chunk)


async def receive_file(
    stream: ByteSource,
    path: Path,
    *,
    size: int,
    digest: str,
    algorithm: str = "sha256",
    offset: int = 0,
    runtime: Runtime,
) -> None:
    """Receive the file's bytes from `offset` to `size`, and let it appear at `path` once all of it has the digest.

    With an offset, what `path.part` holds up to there is read again and counts towards the digest.
    Raises RemoteProtocolError (another digest, named; an unknown algorithm; the stream ended early), StoreError (disk
    full, `path.part` shorter than the offset) and PeerUnreachable (the stream broke: another attempt may go on).
    """
    if algorithm not in HASHES:
        raise RemoteProtocolError(f"digest algorithm {algorithm!r} is not one of {', '.join(sorted(HASHES))}")
    if offset > size:
        raise RemoteProtocolError(f"{path.name} of {size} bytes has no byte at offset {offset}")
    part = Part(path, HASHES[algorithm]())
    try:
        await runtime.run_blocking(part.open, offset)
        while part.size < offset:
            await runtime.run_blocking(part.read_again, offset)
        async with lane_of(stream, Terms(sending=False), size - offset) as lane:
            if lane is None:
                await _receive_rest(stream, part, size, runtime)
            else:
                await lane.receive(lambda view: part.write([view]), size - offset)
        await runtime.run_blocking(part.conclude, digest)
    finally:
        part.close()


class Part:
    """The file that a transfer fills; its methods block, so they are called through the runtime, one at a time."""

    def __init__(self, path: Path, hasher: Hash) -> None:
        self.size = 0  # bytes written and taken into the digest
        self._path = path
        self._part = partial_path(path)
        self._hash = hasher
        self._descriptor = -1

    def open(self, offset: int) -> None:
        """Create it, or cut what is there to the first `offset` bytes."""
        self._descriptor = _open(self._part, os.O_RDWR | os.O_CREAT)
        with _disk(self._part):
            have = os.fstat(self._descriptor).st_size
            if have < offset:
                raise StoreError(f"{self._part} holds {have} bytes, not the {offset} to go on from")
            if have > offset:
                os.ftruncate(self._descriptor, offset)

    def read_again(self, offset: int) -> None:
        """Take the next chunk of what was there before into the digest."""
        chunk = _read(self._descriptor, self._part, self.size, min(CHUNK_BYTES, offset - self.size))
        self._hash.update(chunk)
        self.size += len(chunk)

    def write(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Append, and take in, what has come."""
        for piece in pieces:
            self._hash.update(piece)
        rest = sum(map(len, pieces))
        with _disk(self._part):
            written = os.pwritev(self._descriptor, pieces, self.size)
            if written < rest:
                # Rare: a signal or a disk that is almost full. What it says next decides.
                _write_all(self._descriptor, b"".join(pieces)[written:], self.size + written)
        self.size += rest

    def conclude(self, digest: str) -> None:
        """Put it in its place, or delete it when it is not what was asked for."""
        got = self._hash.hexdigest()
        with _disk(self._part):
            if got != digest:
                self._part.unlink()
                raise RemoteProtocolError(f"{self._path.name} came with digest {got}, not {digest}")
            self._part.replace(self._path)

    def close(self) -> None:
        """Let go of it; what has come stays for another attempt."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


async def _receive_rest(stream: ByteSource, part: Part, size: int, runtime: Runtime) -> None:
    left, broken = size - part.size, None
    async with _concurrently() as nursery:
        chunks_in, chunks = trio.open_memory_channel[list[bytes | bytearray]](CHUNKS_QUEUED_MAX)
        nursery.start_soon(_write_behind, chunks, part, runtime)
        with chunks_in:
            while left > 0 and broken is None:
                pieces, broken = await _gather(stream, min(CHUNK_BYTES, left))
                left -= sum(map(len, pieces))
                await chunks_in.send(pieces)
    # Only now is everything that came before the break on the disk, for the next attempt to go on from.
    if broken is not None:
        raise broken


async def _gather(stream: ByteSource, bytes_max: int) -> tuple[list[bytes | bytearray], HyphaError | None]:
    """Return pieces worth a trip to the disk, and what keeps the rest of `bytes_max` from coming, if anything does."""
    pieces: list[bytes | bytearray] = []
    while bytes_max > 0 and len(pieces) < PIECES_MAX:
        try:
            piece = await stream.receive_some(bytes_max)
        except PeerUnreachable as error:
            return pieces, error
        if not piece:
            return pieces, RemoteProtocolError(
                f"the stream ended before the file: {bytes_max} bytes of a chunk are missing"
            )
        bytes_max -= len(piece)
        pieces.append(piece)
    return pieces, None


async def _write_behind(
    chunks: trio.MemoryReceiveChannel[list[bytes | bytearray]], part: Part, runtime: Runtime
) -> None:
    with chunks:
        async for pieces in chunks:
            await runtime.run_blocking(part.write, pieces)


# --- the disk --------------------------------------------------------------------------------------------------------


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Translate what the disk says."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error


def _open(path: Path, flags: int) -> int:
    with _disk(path):
        return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _read(descriptor: int, path: Path, offset: int, count: int) -> bytes:
    with _disk(path):
        chunk = os.pread(descriptor, count, offset)
    if not chunk:
        raise _short(path, offset)
    return chunk


class _Reader:
    """Reads a file onwards into the buffers that it is given."""

    def __init__(self, descriptor: int, path: Path, offset: int) -> None:
        self._descriptor = descriptor
        self._path = path
        self._offset = offset

    def __call__(self, buffer: memoryview) -> int:
        with _disk(self._path):
            count = os.preadv(self._descriptor, [buffer], self._offset)
        if not count:
            raise _short(self._path, self._offset)
        self._offset += count
        return count


def _short(path: Path, offset: int) -> StoreError:
    return StoreError(f"{path} ends at {offset} bytes, before it should")


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


@asynccontextmanager
async def _concurrently() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises the one error behind its end as it is, not in a group.

    When one side fails the other may find their channel broken; that is a consequence and is left out.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        causes = group.split((trio.BrokenResourceError, trio.Cancelled))[1]
        if causes is not None and len(causes.exceptions) == 1 and isinstance(causes.exceptions[0], HyphaError):
            raise causes.exceptions[0] from None
        raise
