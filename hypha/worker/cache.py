"""Verified slices on this worker's disk, shared by its jobs, bounded, least recently used first out.

    {work_dir}/cache/{digest}     a whole slice, read-only; renamed into place only after its digest was checked
    {job dir}/slices/{digest}     a hard link: it stays readable for the job when the cache lets go of it

Two jobs that want the same slice wait for one transfer. What an earlier run left is read again and checked against its
digest before its first use: disks rot, and a crash of the machine may have left a name without its bytes.
"""

import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hypha.errors import StoreError
from hypha.network.transfer import CHUNK_BYTES, HASHES, partial_path
from hypha.protocol.messages import SliceRef
from hypha.runtime import Runtime
from hypha.telemetry import get_logger

log = get_logger("worker.cache")

Fetch = Callable[[Path], Awaitable[None]]

# Transfers that broke off and whose beginnings are kept for another attempt; older ones are given up.
PARTS_MAX = 4
READ_ONLY = 0o400


class SliceCache:
    """At most `bytes_max` of slices; one larger than that is kept alone until the next arrives."""

    def __init__(self, directory: Path, *, bytes_max: int, runtime: Runtime) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._runtime = runtime
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._unverified: set[str] = set()
        self._parts: OrderedDict[str, None] = OrderedDict()
        self._locks: dict[str, trio.Lock] = {}

    async def open(self) -> None:
        """Create the directory and take over what an earlier run left. Raises StoreError."""
        await self._runtime.run_blocking(self._scan)

    def _scan(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [(path, path.stat()) for path in self._directory.iterdir() if path.is_file()]
            for path, stat in sorted(found, key=lambda each: (each[1].st_mtime, each[0].name)):
                if path.suffix == ".part":
                    path.unlink()
                else:
                    self._sizes[path.name] = stat.st_size
        except OSError as error:
            raise StoreError(f"{self._directory}: {error.strerror}") from error
        self._unverified.update(self._sizes)

    async def link(self, ref: SliceRef, job_dir: Path, fetch: Fetch) -> str:
        """Return the slice's path relative to `job_dir`, having called `fetch(path)` if it was not cached.

        Raises what `fetch` raises, and StoreError.
        """
        relative = f"slices/{ref.digest}"
        async with self._alone(ref.digest):
            if not await self._is_here(ref):
                await self._bring(ref, fetch)
            self._sizes.move_to_end(ref.digest)
            await self._runtime.run_blocking(_hard_link, self._directory / ref.digest, job_dir / relative)
            await self._evict()
        return relative

    async def _is_here(self, ref: SliceRef) -> bool:
        if ref.digest not in self._sizes:
            return False
        path = self._directory / ref.digest
        checked = ref.digest not in self._unverified
        if await self._runtime.run_blocking(_is_sound, path, ref, checked):
            self._unverified.discard(ref.digest)
            return True
        log.warn("Cached slice is damaged, fetching it again", slice=ref.name, digest=ref.digest)
        await self._runtime.run_blocking(_remove, path)
        self._forget(ref.digest)
        return False

    async def _bring(self, ref: SliceRef, fetch: Fetch) -> None:
        path = self._directory / ref.digest
        try:
            await fetch(path)
            # Jobs see it through hard links: what one of them wrote into it would reach the others.
            await self._runtime.run_blocking(path.chmod, READ_ONLY)
        except BaseException:
            self._parts[ref.digest] = None
            self._parts.move_to_end(ref.digest)
            self._drop_parts()
            raise
        self._parts.pop(ref.digest, None)
        self._sizes[ref.digest] = ref.bytes

    def _drop_parts(self) -> None:
        idle = [digest for digest in self._parts if digest not in self._locks]
        for digest in idle[: max(0, len(self._parts) - PARTS_MAX)]:
            del self._parts[digest]
            partial_path(self._directory / digest).unlink(missing_ok=True)

    async def _evict(self) -> None:
        """Let go of slices that nobody is fetching or linking right now, until the rest fits."""
        while (digest := self._victim()) is not None:
            self._forget(digest)
            async with self._alone(digest):
                await self._runtime.run_blocking(_remove, self._directory / digest)

    def _victim(self) -> str | None:
        if sum(self._sizes.values()) <= self._bytes_max:
            return None
        return next((digest for digest in self._sizes if digest not in self._locks), None)

    def _forget(self, digest: str) -> None:
        del self._sizes[digest]
        self._unverified.discard(digest)

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        """Be the only one who fetches, links or removes this slice."""
        lock = self._locks.setdefault(digest, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._locks.pop(digest, None)


def _is_sound(path: Path, ref: SliceRef, checked: bool) -> bool:  # noqa: FBT001 - called through run_blocking
    """Whether the file is there whole and, unless that was `checked` before, has its digest."""
    hasher = HASHES.get(ref.digest_algorithm)
    try:
        if path.stat().st_size != ref.bytes:
            return False
        if checked:
            return True
        if hasher is None:
            return False
        hashed = hasher()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hashed.update(chunk)
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warn("Cached slice cannot be read", path=str(path), reason=error.strerror)
        return False
    return hashed.hexdigest() == ref.digest


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error


def _hard_link(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            os.link(source, target)
    except OSError as error:
        raise StoreError(f"{target}: {error.strerror}") from error
