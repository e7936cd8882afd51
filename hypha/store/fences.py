"""The worker's fence counter on disk: no fence ever leaves twice, whatever dies (leases.md).

    reserve(block) ──▶ file says `reserved = old + block`, durably ──▶ fences old … old + block - 1 may leave

An empty work directory starts a new counter. A counter that is missing beside other state, belongs to another
identity, or lies below a fence known to have left, is refused: handing out old fences again would let a stale holder
pass for a live one.
"""

import hashlib
from typing import Annotated

import cbor2
import msgspec
from msgspec import Meta, Struct

from hypha.errors import StoreError
from hypha.store.disk import Disk, NotFound, parent_of, replace_durably

FILE_NAME = "fences"
_CHECK_BYTES = 32
# What is refused can be mended in one way only, so every message ends with it.
REMEDY = "do not restore it from a backup; issue a new node certificate with a new key and start with an empty work_dir"


class Reserved(Struct, frozen=True, kw_only=True):
    """The file's content: fences below `reserved` may have left under this identity."""

    peer_id: str
    reserved: Annotated[int, Meta(ge=0)]


class FenceFile:
    """The counter of one identity. Open it before anything else is put beside it."""

    def __init__(self, disk: Disk, peer_id: str, *, path: str = FILE_NAME, fence_seen: int = -1) -> None:
        """Read or begin the counter.

        `fence_seen` is the highest fence this worker is known to have granted (from leftovers of jobs), -1 when none.
        Raises StoreError with what to do: missing beside other state, damaged, another identity's, or too low.
        """
        self._disk = disk
        self._path = path
        self._state = self._load(peer_id)
        if fence_seen >= self._state.reserved:
            raise StoreError(
                f"{path}: reserves fences below {self._state.reserved} but {fence_seen} was granted already: {REMEDY}"
            )

    @property
    def reserved(self) -> int:
        """Fences below this may have left."""
        return self._state.reserved

    def reserve(self, block: int) -> int:
        """Reserve `block` more fences and return the first of them, once that is durable.

        Raises StoreError: then no fence of the block may leave; a later call reserves above whatever was written.
        """
        assert block > 0, "a block has at least one fence"
        first = self._state.reserved
        state = Reserved(peer_id=self._state.peer_id, reserved=first + block)
        # Counted up even if the write fails: its outcome is unknown, and skipping numbers costs nothing.
        self._state = state
        replace_durably(self._disk, self._path, _encode(state))
        return first

    def _load(self, peer_id: str) -> Reserved:
        try:
            state = _decode(self._disk.read(self._path), self._path)
        except NotFound:
            return self._begin(peer_id)
        if state.peer_id != peer_id:
            raise StoreError(f"{self._path}: belongs to peer {state.peer_id}, not to {peer_id}: {REMEDY}")
        return state

    def _begin(self, peer_id: str) -> Reserved:
        folder = parent_of(self._path)
        if folder:
            self._disk.mkdir(folder)
        own = self._path.rpartition("/")[2]
        others = [name for name in self._disk.listdir(folder) if not name.startswith(f"{own}.")]
        if others:
            raise StoreError(f"{self._path}: missing although the directory holds {', '.join(others[:3])}: {REMEDY}")
        state = Reserved(peer_id=peer_id, reserved=0)
        replace_durably(self._disk, self._path, _encode(state))
        return state


def _encode(state: Reserved) -> bytes:
    body: bytes = cbor2.dumps(msgspec.to_builtins(state), canonical=True)
    return body + hashlib.sha256(body).digest()


def _decode(data: bytes, path: str) -> Reserved:
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if hashlib.sha256(body).digest() != check:
        raise StoreError(f"{path}: damaged at offset 0: {REMEDY}")
    try:
        return msgspec.convert(cbor2.loads(body), Reserved)
    except (msgspec.ValidationError, cbor2.CBORDecodeError, ValueError) as error:
        raise StoreError(f"{path}: not a fence counter: {error}: {REMEDY}") from error
