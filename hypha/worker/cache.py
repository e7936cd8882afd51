"""Verified slices on this worker's disk, shared by its jobs, bounded, least recently used first out.

    {work_dir}/cache/{digest}     a whole slice; only ever renamed into place after its digest was checked
    {job dir}/slices/{digest}     a hard link: it stays readable for the job when the cache lets go of it

Two jobs that want the same slice wait for one transfer.
"""

import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from hypha.errors import StoreError
from hypha.protocol.messages import SliceRef
from hypha.runtime import Runtime

Fetch = Callable[[Path], Awaitable[None]]


class SliceCache:
    """At most `bytes_max` of slices; one larger than that is kept alone until the next arrives."""

    def __init__(self, directory: Path, *, bytes_max: int, runtime: Runtime) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._runtime = runtime
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._locks: dict[str, trio.Lock] = {}

    async def open(self) -> None:
        """Create the directory and take over what an earlier run verified."""
        await self._runtime.run_blocking(self._scan)

    def _scan(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        files = [path for path in self._directory.iterdir() if path.suffix != ".part" and path.is_file()]
        for path in sorted(files, key=lambda path: (path.stat().st_mtime, path.name)):
            self._sizes[path.name] = path.stat().st_size

    async def link(self, ref: SliceRef, job_dir: Path, fetch: Fetch) -> str:
        """Return the slice's path relative to `job_dir`, having called `fetch(path)` if it was not cached."""
        lock = self._locks.setdefault(ref.digest, trio.Lock())
        try:
            async with lock:
                if ref.digest not in self._sizes:
                    await fetch(self._directory / ref.digest)
                    self._sizes[ref.digest] = ref.bytes
                self._sizes.move_to_end(ref.digest)
                relative = f"slices/{ref.digest}"
                await self._runtime.run_blocking(_hard_link, self._directory / ref.digest, job_dir / relative)
                await self._runtime.run_blocking(self._evict)
                return relative
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(ref.digest, None)

    def _evict(self) -> None:
        while len(self._sizes) > 1 and sum(self._sizes.values()) > self._bytes_max:
            digest, _ = self._sizes.popitem(last=False)
            (self._directory / digest).unlink(missing_ok=True)


def _hard_link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError as error:
        raise StoreError(f"{target}: {error.strerror}") from error
