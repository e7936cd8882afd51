"""A disk in memory that fails on request and forgets on a crash what POSIX does not promise to keep.

    written ──fsync──▶ bytes durable       named ──fsync_dir──▶ name durable
       └── crash(): a random prefix of what was not synced survives, its end possibly zeros

`plan[n] = fault` strikes at the n-th operation (counted from 0 in `operations`):

    EIO, ENOSPC   StoreError; of a write, a part may have happened
    CRASH         PowerLoss before the operation (of a write: after a part of it)
    CRASH_AFTER   PowerLoss although the operation happened

After PowerLoss the simulator calls `crash()` and opens the state again, as a restarted process would.
"""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from hypha.errors import StoreError
from hypha.store.disk import AlreadyExists, Held, NotFound, parent_of

# A file system zeros blocks whose contents did not reach the medium although their length did.
ZEROED_TAIL_PROBABILITY = 0.3


class Fault(Enum):
    """What may strike an operation."""

    EIO = errno.EIO
    ENOSPC = errno.ENOSPC
    CRASH = -1
    CRASH_AFTER = -2


class PowerLoss(Exception):
    """The machine went down in the middle of an operation: not an error that a program handles."""


class _Inode:
    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = b""

    def lose_unsynced(self, chance: random.Random) -> None:
        if not self.data.startswith(self.durable):  # truncated, and the truncation may not have reached the medium
            self.data = bytearray(chance.choice((bytes(self.data), self.durable)))
        else:
            kept = chance.randint(len(self.durable), len(self.data))
            zeros = chance.randint(0, kept - len(self.durable)) if chance.random() < ZEROED_TAIL_PROBABILITY else 0
            self.data = self.data[: kept - zeros] + bytes(zeros)
        self.durable = bytes(self.data)


Names = dict[str, _Inode]
Change = tuple[str, _Inode | None]


class MemoryDisk:
    """Implements `hypha.store.disk.Disk`. Deterministic: all chance comes from `seed`.

    `capacity_bytes` bounds the sum of all files. `operation_s` is what each operation costs in simulated seconds;
    it adds up in `busy_s` for the simulator to spend, since the operations themselves are synchronous.
    """

    def __init__(self, *, seed: int = 0, capacity_bytes: int | None = None, operation_s: float = 0.0) -> None:
        self.plan: dict[int, Fault] = {}
        self.capacity_bytes = capacity_bytes
        self.operation_s = operation_s
        self.operations = 0
        self.busy_s = 0.0
        self.faults_struck = 0
        self._chance = random.Random(seed)  # noqa: S311 - seeded, not secret
        self._names: Names = {}
        self._durable_names: Names = {}
        self._pending: dict[str, list[tuple[Change, ...]]] = {}
        self._directories = {""}
        self._locks: set[str] = set()
        self._down = False

    @property
    def is_down(self) -> bool:
        """Whether power was lost, and `crash` has not started it again yet."""
        return self._down

    def crash(self) -> None:
        """Keep of everything unsynced a random prefix, drop all locks."""
        for changes in self._pending.values():
            for change in changes[: self._chance.randint(0, len(changes))]:
                _apply(self._durable_names, change)
        self._pending.clear()
        self._names = dict(self._durable_names)
        for name in sorted(self._names):
            self._names[name].lose_unsynced(self._chance)
        self._locks.clear()
        self._down = False

    def corrupt(self, path: str, offset: int) -> None:
        """Flip the bits of one byte, durably: a medium that decayed."""
        inode = self._inode(path)
        inode.data[offset] ^= 0xFF
        inode.durable = bytes(inode.data)

    def used_bytes(self) -> int:
        """The sum of all files; one with several names counts once."""
        return sum(len(inode.data) for inode in set(self._names.values()))

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return what a reading process sees: written bytes, synced or not."""
        with self._operation(path):
            data = self._inode(path).data
            return bytes(data[offset:] if length is None else data[offset : offset + length])

    def write_new(self, path: str, data: bytes) -> None:
        """Create and write; the name stays volatile until `fsync_dir`."""
        self._require_directory(path)
        if path in self._names:
            raise AlreadyExists(f"{path}: exists")
        inode = _Inode()
        self._change(path, ((path, inode),))
        self._write(path, inode, data)

    def append(self, path: str, data: bytes) -> None:
        """Add bytes that stay volatile until `fsync`."""
        self._write(path, self._inode(path), data)

    def _write(self, path: str, inode: _Inode, data: bytes) -> None:
        room = len(data) if self.capacity_bytes is None else max(0, self.capacity_bytes - self.used_bytes())
        fault = self._struck()
        if fault is None and room < len(data):
            fault = Fault.ENOSPC
        elif fault not in (None, Fault.CRASH_AFTER):
            room = self._chance.randint(0, min(room, len(data)))
        inode.data += data[:room]
        if fault is not None:
            raise _failure(fault, path)

    def truncate(self, path: str, size: int) -> None:
        """Cut; volatile until `fsync`."""
        with self._operation(path):
            del self._inode(path).data[size:]

    def fsync(self, path: str) -> None:
        """Make the bytes durable."""
        with self._operation(path):
            inode = self._inode(path)
            inode.durable = bytes(inode.data)

    def fsync_dir(self, path: str) -> None:
        """Make the names in one directory durable."""
        with self._operation(path):
            for change in self._pending.pop(path, []):
                _apply(self._durable_names, change)

    def rename(self, source: str, target: str) -> None:
        """Within one directory only, as durable replacement needs it."""
        assert parent_of(source) == parent_of(target), "a rename across directories is not atomic after a crash"
        with self._operation(target):
            self._change(target, ((source, None), (target, self._inode(source))))

    def link(self, source: str, target: str) -> None:
        """Exclusive."""
        self._require_directory(target)
        with self._operation(target):
            if target in self._names:
                raise AlreadyExists(f"{target}: exists")
            self._change(target, ((target, self._inode(source)),))

    def unlink(self, path: str) -> None:
        """Remove a name; volatile until `fsync_dir`."""
        with self._operation(path):
            self._inode(path)
            self._change(path, ((path, None),))

    def listdir(self, path: str) -> list[str]:
        """Names of files and directories, sorted."""
        with self._operation(path):
            if path not in self._directories:
                raise NotFound(f"{path}: not found")
            everything = {*self._names, *self._directories} - {""}
            return sorted(name.rpartition("/")[2] for name in everything if parent_of(name) == path)

    def mkdir(self, path: str) -> None:
        """Create with parents, durably."""
        with self._operation(path):
            parts = path.split("/")
            self._directories.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))

    def exists(self, path: str) -> bool:
        """Whether the name exists."""
        with self._operation(path):
            return path in self._names or path in self._directories

    def size(self, path: str) -> int:
        """Size in bytes as a reading process sees it."""
        with self._operation(path):
            return len(self._inode(path).data)

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """Refuse a second holder until the first is done or the machine crashed."""
        if path in self._locks:
            raise Held(f"{path}: in use by another process (pid simulated)")
        self._locks.add(path)
        try:
            yield
        finally:
            self._locks.discard(path)

    def local_path(self, _path: str) -> Path | None:
        """No operating system finds these files."""
        return None

    def _inode(self, path: str) -> _Inode:
        if path not in self._names:
            raise NotFound(f"{path}: not found")
        return self._names[path]

    def _require_directory(self, path: str) -> None:
        if parent_of(path) not in self._directories:
            raise NotFound(f"{parent_of(path)}: not found")

    def _change(self, path: str, change: tuple[Change, ...]) -> None:
        _apply(self._names, change)
        self._pending.setdefault(parent_of(path), []).append(change)

    def _struck(self) -> Fault | None:
        if self._down:
            raise PowerLoss("the machine is down: nothing happens before crash() starts it again")
        fault = self.plan.get(self.operations)
        self.operations += 1
        self.busy_s += self.operation_s
        self.faults_struck += fault is not None
        self._down = fault in (Fault.CRASH, Fault.CRASH_AFTER)
        return fault

    @contextmanager
    def _operation(self, path: str) -> Iterator[None]:
        fault = self._struck()
        if fault not in (None, Fault.CRASH_AFTER):
            raise _failure(fault, path)
        try:
            yield
        except StoreError as error:
            if fault is None:
                raise
            raise _failure(fault, path) from error
        if fault is not None:
            raise _failure(fault, path)


def _failure(fault: Fault, path: str) -> Exception:
    if fault in (Fault.CRASH, Fault.CRASH_AFTER):
        return PowerLoss(path)
    return StoreError(f"{path}: {os.strerror(fault.value)}")


def _apply(names: Names, change: tuple[Change, ...]) -> None:
    for name, inode in change:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode
