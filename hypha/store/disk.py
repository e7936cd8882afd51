"""The seam below all durable state: a few file operations with the durability rules of POSIX, no more.

    write_new ──▶ append* ──▶ fsync(file) ──▶ rename | link ──▶ fsync_dir(directory)
                               bytes are safe                    the name is safe

Bytes are durable only after `fsync`, names only after `fsync_dir`. Implementations: `RealDisk` below, and
`hypha.store.memory_disk.MemoryDisk`, which loses on a crash exactly what was not yet synced. Paths are relative, with
"/" between their parts. OSError is translated here and nowhere above.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from hypha.errors import StoreError

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class AlreadyExists(StoreError):
    """Exclusive creation found the name taken."""


class NotFound(StoreError):
    """There is no such file."""


class Held(StoreError):
    """Another process holds the lock."""


class Damaged(StoreError):
    """What was read is not what was written: half of it, or decayed."""


class Disk(Protocol):
    """Synchronous file operations. Each raises StoreError (NotFound, AlreadyExists) naming the path."""

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset`, or up to the end; fewer only at the end of the file."""

    def write_new(self, path: str, data: bytes) -> None:
        """Create a file that must not exist and write `data`; a failure may leave part of it."""

    def append(self, path: str, data: bytes) -> None:
        """Add bytes at the end of an existing file; a failure may leave part of them."""

    def truncate(self, path: str, size: int) -> None:
        """Cut a file to `size` bytes."""

    def fsync(self, path: str) -> None:
        """Return once the file's bytes and length survive a power loss."""

    def fsync_dir(self, path: str) -> None:
        """Return once the names in a directory survive a power loss."""

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, replacing what is there, in one step."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name in one step; AlreadyExists when that is taken, by whoever was first."""

    def unlink(self, path: str) -> None:
        """Remove a name."""

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory, sorted."""

    def mkdir(self, path: str) -> None:
        """Create a directory and its parents; one that exists is fine. Their names are durable on return."""

    def exists(self, path: str) -> bool:
        """Whether a file or directory has this name."""

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""

    def lock(self, path: str) -> AbstractContextManager[None]:
        """Hold an exclusive lock named by a file. Raises Held at once when another opener has it."""

    def local_path(self, path: str, /) -> Path | None:
        """Return where the operating system finds the file, or None when it does not."""


class RealDisk:
    """Files below a root directory, which is created when missing. No path leads out of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with _translated(root):
            root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"<RealDisk {self._root}>"

    def local_path(self, path: str) -> Path:
        """Return the file's absolute or root-relative location."""
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts:
            raise StoreError(f"{path}: leads out of {self._root}")
        return self._root.joinpath(*parts)

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read through an unbuffered handle, one call."""
        where = self.local_path(path)
        with _translated(where), where.open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def write_new(self, path: str, data: bytes) -> None:
        """Open with O_EXCL."""
        self._write(path, data, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def append(self, path: str, data: bytes) -> None:
        """Open with O_APPEND, never creating."""
        self._write(path, data, os.O_WRONLY | os.O_APPEND)

    def _write(self, path: str, data: bytes, flags: int) -> None:
        where = self.local_path(path)
        with _translated(where), _opened(where, flags) as descriptor:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    def truncate(self, path: str, size: int) -> None:
        """truncate(2)."""
        where = self.local_path(path)
        with _translated(where):
            os.truncate(where, size)

    def fsync(self, path: str) -> None:
        """fsync(2) through a handle of its own: the kernel flushes the inode, whoever wrote to it."""
        where = self.local_path(path)
        with _translated(where), _opened(where, os.O_WRONLY) as descriptor:
            os.fsync(descriptor)

    def fsync_dir(self, path: str) -> None:
        """fsync(2) on the directory."""
        where = self.local_path(path)
        with _translated(where), _opened(where, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
            os.fsync(descriptor)

    def rename(self, source: str, target: str) -> None:
        """rename(2)."""
        where = self.local_path(target)
        with _translated(where):
            self.local_path(source).replace(where)

    def link(self, source: str, target: str) -> None:
        """link(2): atomic and exclusive also on network file systems."""
        where = self.local_path(target)
        with _translated(where):
            os.link(self.local_path(source), where)

    def unlink(self, path: str) -> None:
        """unlink(2)."""
        where = self.local_path(path)
        with _translated(where):
            where.unlink()

    def listdir(self, path: str) -> list[str]:
        """Names, sorted: the order of a directory must decide nothing."""
        where = self.local_path(path)
        with _translated(where):
            return sorted(os.listdir(where))

    def mkdir(self, path: str) -> None:
        """Create part by part, syncing the parent of each part that was new."""
        parts = PurePosixPath(path).parts
        for depth in range(1, len(parts) + 1):
            where = self.local_path("/".join(parts[:depth]))
            with _translated(where):
                if not where.is_dir():
                    where.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                    self.fsync_dir("/".join(parts[: depth - 1]))

    def exists(self, path: str) -> bool:
        """Whether the name exists."""
        where = self.local_path(path)
        with _translated(where):
            return where.exists()

    def size(self, path: str) -> int:
        """stat(2)."""
        where = self.local_path(path)
        with _translated(where):
            return where.stat().st_size

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """flock(2): freed by the kernel when this process ends, however it ends."""
        where = self.local_path(path)
        with _translated(where):
            descriptor = os.open(where, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            with _translated(where):
                _take(descriptor, where)
            yield
        finally:
            os.close(descriptor)


def _take(descriptor: int, where: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        raise Held(f"{where}: in use by another process (pid {owner})") from error
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise AlreadyExists(f"{path}: exists") from error
    except FileNotFoundError as error:
        raise NotFound(f"{path}: not found") from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error


def parent_of(path: str) -> str:
    """Return the directory part of a path, "" at the top."""
    return path.rpartition("/")[0]


def replace_durably(disk: Disk, path: str, data: bytes) -> None:
    """Put `data` under `path` so that after any crash the file is the old one whole or the new one whole."""
    temporary = f"{path}.new"
    if disk.exists(temporary):
        disk.unlink(temporary)
    disk.write_new(temporary, data)
    disk.fsync(temporary)
    disk.rename(temporary, path)
    disk.fsync_dir(parent_of(path))
