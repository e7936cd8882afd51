"""Whole objects under names that are given once: what the manifest chain and the artifacts are kept in.

    create(name, chunks)   everything arrives, then the name appears, exclusively   ──▶ AlreadyExists for the second

    directory    <name>.<id>.part: write, fsync, link(2) to <name>, fsync of the directory, unlink the part
    fsspec URL   one conditional put of the whole body (If-None-Match: *, ifGenerationMatch: 0)

A store that offers neither is refused with ConfigError: two schedulers could both believe they committed a round.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from blake3 import blake3

from hypha.errors import ConfigError, HyphaError, StoreError
from hypha.store.disk import AlreadyExists, Disk, NotFound, RealDisk, parent_of

CHUNK_BYTES = 1 << 20
PART_SUFFIX = ".part"
# fsspec protocols whose service decides a conditional put itself. Elsewhere `mode="create"` looks first and writes
# later, which two writers can both win; "memory" lives in one process and serves tests.
CONDITIONAL_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})


class ObjectStore(Protocol):
    """Named immutable objects. Methods raise StoreError; names are relative with "/" between parts."""

    def create(self, name: str, chunks: Iterable[bytes]) -> None:
        """Store an object whole and durably, or not at all. Raises AlreadyExists: then *that* object is durable."""

    def read(self, name: str) -> bytes:
        """Return an object whole. Raises NotFound."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield an object in pieces of at most CHUNK_BYTES. Raises NotFound."""

    def names(self, folder: str) -> list[str]:
        """Return the full names of the objects in a folder, sorted; none when there is no such folder."""

    def remove(self, name: str) -> None:
        """Forget an object; one that is gone is fine."""

    def sweep(self, folder: str) -> list[str]:
        """Remove what dead writers of a folder left, and return the names; one that lives writes again."""

    def local_path(self, name: str, /) -> Path | None:
        """Return the object's file, where it is one on this machine."""


class DirectoryObjects:
    """Objects as files on a `Disk`. `new_id` names parts, so that writers sharing the directory never meet."""

    def __init__(self, disk: Disk, *, new_id: Callable[[], str] = lambda: uuid.uuid4().hex) -> None:
        self._disk = disk
        self._new_id = new_id

    def create(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a part, sync it, link it to its name, sync the directory."""
        folder = parent_of(name)
        if folder:
            self._disk.mkdir(folder)
        part = f"{name}.{self._new_id()}{PART_SUFFIX}"
        try:
            self._disk.write_new(part, b"")
            for chunk in chunks:
                self._disk.append(part, chunk)
            self._disk.fsync(part)
            self._link(part, name)
        finally:
            self._discard(part)

    def _link(self, part: str, name: str) -> None:
        try:
            self._disk.link(part, name)
        except AlreadyExists:
            # Whoever made it may not have synced the name yet; the caller relies on what it reads back now.
            self._disk.fsync_dir(parent_of(name))
            raise
        self._disk.fsync_dir(parent_of(name))

    def _discard(self, part: str) -> None:
        try:
            self._disk.unlink(part)
        except StoreError:
            return  # it may not exist, or the disk is ill; `sweep` takes what stays

    def sweep(self, folder: str) -> list[str]:
        """Remove the parts. One whose writer lives fails to be linked, which its writer sees."""
        if not self._disk.exists(folder):
            return []
        left = [f"{folder}/{name}" for name in self._disk.listdir(folder) if name.endswith(PART_SUFFIX)]
        for part in left:
            self.remove(part)
        return left

    def read(self, name: str) -> bytes:
        """Read the file."""
        return self._disk.read(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read piece by piece."""
        offset = 0
        while chunk := self._disk.read(name, offset=offset, length=CHUNK_BYTES):
            yield chunk
            offset += len(chunk)

    def names(self, folder: str) -> list[str]:
        """List, without parts."""
        if not self._disk.exists(folder):
            return []
        return [f"{folder}/{name}" for name in self._disk.listdir(folder) if not name.endswith(PART_SUFFIX)]

    def remove(self, name: str) -> None:
        """Unlink, and make that durable, so that what was pruned does not come back."""
        try:
            self._disk.unlink(name)
        except NotFound:
            return
        self._disk.fsync_dir(parent_of(name))

    def local_path(self, name: str) -> Path | None:
        """Where the file lies."""
        return self._disk.local_path(name)


class RemoteObjects:
    """Objects behind an fsspec file system that was seen to honour a conditional put."""

    def __init__(self, filesystem: Any, root: str) -> None:  # noqa: ANN401 - fsspec has no types
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def _where(self, name: str) -> str:
        return f"{self._root}/{name}"

    def create(self, name: str, chunks: Iterable[bytes]) -> None:
        """Spool the chunks to a temporary file, then one conditional put."""
        with tempfile.TemporaryDirectory(prefix="hypha-put-") as folder, self._translated(name):
            spool = Path(folder) / "body"
            with spool.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            if spool.stat().st_size <= CHUNK_BYTES:
                self._filesystem.pipe_file(self._where(name), spool.read_bytes(), mode="create")
            else:
                self._filesystem.put_file(str(spool), self._where(name), mode="create")

    def read(self, name: str) -> bytes:
        """One get."""
        with self._translated(name):
            data: bytes = self._filesystem.cat_file(self._where(name))
            return data

    def chunks(self, name: str) -> Iterator[bytes]:
        """Ranged gets."""
        with self._translated(name):
            size = int(self._filesystem.size(self._where(name)))
        for offset in range(0, size, CHUNK_BYTES):
            with self._translated(name):
                chunk: bytes = self._filesystem.cat_file(
                    self._where(name), start=offset, end=min(size, offset + CHUNK_BYTES)
                )
            yield chunk

    def names(self, folder: str) -> list[str]:
        """List fresh, never from fsspec's cache."""
        with self._translated(folder):
            self._filesystem.invalidate_cache()
            try:
                found = self._filesystem.ls(self._where(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(f"{folder}/{str(path).rstrip('/').rpartition('/')[2]}" for path in found)

    def remove(self, name: str) -> None:
        """Delete."""
        try:
            with self._translated(name):
                self._filesystem.rm_file(self._where(name))
        except NotFound:
            return

    def sweep(self, _folder: str) -> list[str]:
        """Nothing: a put happens whole or not at all, and what a service keeps of one that broke off is its own."""
        return []

    def local_path(self, _name: str) -> Path | None:
        """Never local."""
        return None

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise AlreadyExists(f"{self._where(name)}: exists") from error
        except FileNotFoundError as error:
            raise NotFound(f"{self._where(name)}: not found") from error
        except OSError as error:
            raise StoreError(f"{self._where(name)}: {error}") from error
        except HyphaError:
            raise  # of whoever gives the chunks
        except Exception as error:
            # Each service's library has errors of its own for one that does not answer (botocore's are no OSError).
            if type(error).__module__ == "builtins":
                raise
            raise StoreError(f"{self._where(name)}: {type(error).__name__}: {error}") from error

    def prove_conditional(self) -> None:
        """Put twice under one name: the second must be refused and change nothing. Raises ConfigError otherwise."""
        name = f"probe/{uuid.uuid4().hex}"
        try:
            self.create(name, [b"first"])
            self._prove_refusal(name)
        except StoreError as error:
            raise ConfigError(f"checkpoint_url: {self._root}: cannot be written: {error}") from error
        except TypeError as error:
            raise ConfigError(f"checkpoint_url: {self._root}: offers no conditional put ({error})") from error
        finally:
            self.remove(name)

    def _prove_refusal(self, name: str) -> None:
        try:
            self.create(name, [b"second"])
        except AlreadyExists:
            if self.read(name) == b"first":
                return
        raise ConfigError(f"checkpoint_url: {self._root}: a conditional put replaced what was there")


def open_objects(url: str, *, new_id: Callable[[], str] | None = None) -> ObjectStore:
    """Open a directory (path or file:// URL) or an fsspec URL as an object store.

    Raises ConfigError: a protocol without conditional put or exclusive creation, one whose package is not installed,
    or a place that cannot be written.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return _open_directory(Path(parts.path if parts.scheme else url), new_id)
    if parts.scheme not in CONDITIONAL_PROTOCOLS:
        raise ConfigError(
            f"checkpoint_url: {parts.scheme!r} offers neither exclusive creation nor conditional put; "
            f"use a directory or one of {', '.join(sorted(CONDITIONAL_PROTOCOLS - {'memory'}))}"
        )
    import fsspec  # type: ignore[import-untyped]

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"checkpoint_url: {url}: {error}") from error
    store = RemoteObjects(filesystem, root)
    store.prove_conditional()
    return store


def _open_directory(path: Path, new_id: Callable[[], str] | None) -> DirectoryObjects:
    try:
        disk = RealDisk(path)
        store = DirectoryObjects(disk) if new_id is None else DirectoryObjects(disk, new_id=new_id)
        probe = f"probe-{os.getpid()}"
        store.create(probe, [b""])
        store.remove(probe)
    except StoreError as error:
        raise ConfigError(f"checkpoint_url: {path}: cannot be written, or knows no hard links: {error}") from error
    return store


def digest_of(chunks: Iterable[bytes]) -> str:
    """Return the lower-case hexadecimal blake3 over all chunks."""
    hasher = blake3()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.hexdigest()
