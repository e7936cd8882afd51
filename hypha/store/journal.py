"""A checksummed append-only file of typed records: what `append` returned from is never lost.

    frame   ┌ magic "HJ" ┬ length u32 ┬ sequence u64 ┬ sha256[:16] of the three and the payload ┬ payload CBOR ┐
    file    frame 0: {"journal": 1, "label": whose it is}      frame n: one append, a list of records, all or nothing

Only the last frame can be half-written, for each is synced before the next begins: what cannot be verified at the end
is cut and was never acknowledged. A frame that cannot be verified although a verifiable one follows is decay, and
refused with its offset, or set aside for a new journal. `rewrite` replaces the whole by fewer records in one step.
"""

import hashlib
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import cbor2
import msgspec

from hypha.errors import LocalProtocolError, StoreError
from hypha.store.disk import Damaged, Disk, NotFound, parent_of, replace_durably

R = TypeVar("R", bound=msgspec.Struct)

MAGIC = b"HJ"
FORMAT_VERSION = 1
_HEAD = struct.Struct(">2sIQ")
CHECK_BYTES = 16
FRAME_OVERHEAD_BYTES = _HEAD.size + CHECK_BYTES
# One append is one decision of a role (a grant, a view, a lease): far smaller. Bounds what a damaged length can claim.
FRAME_BYTES_MAX = 16 << 20
# Opening reads the file whole; roles rewrite theirs long before (see `Journal.size_bytes`).
JOURNAL_BYTES_MAX = 1 << 30
# Records per frame when rewriting, so that a snapshot of any size stays under FRAME_BYTES_MAX.
REWRITE_RECORDS_PER_FRAME = 256


class Foreign(StoreError):
    """The journal is another's."""


class Journal(Generic[R]):
    """An open journal; made by `open_journal`. Methods may be called from several threads.

    `records` is what was found at opening, in order; `cut_bytes` how much of a torn end was dropped then, `mended` what
    was wrong with the file before this one and where that went, None where nothing was.
    After a failed append the record's fate is unknown until the next one succeeds or the journal is opened again: it
    was not acknowledged, and the next append removes what there is of it first.
    """

    def __init__(self, disk: Disk, path: str, label: str) -> None:
        self.records: list[R] = []
        self.cut_bytes = 0
        self.mended: tuple[str, str] | None = None
        self._disk = disk
        self._path = path
        self._label = label
        self._mutex = threading.Lock()
        self._sequence = 0
        self._bytes = 0
        self._replacement: tuple[bytes, int] | None = None  # a rewrite whose outcome is not known yet
        self._suspect = False  # the file may hold more than was acknowledged, or its name may not be durable

    @property
    def size_bytes(self) -> int:
        """Size of all acknowledged frames: what a caller compares with its own limit before `rewrite`."""
        return self._bytes

    def append(self, *records: R) -> None:
        """Return once all of these survive a power loss, together. Raises StoreError; then none was acknowledged."""
        with self._mutex:
            if self._suspect:
                self._repair()
            frame = _frame(self._sequence, [_plain(record) for record in records])
            self._suspect = True
            self._disk.append(self._path, frame)
            self._disk.fsync(self._path)
            self._suspect = False
            self._sequence += 1
            self._bytes += len(frame)

    def rewrite(self, records: Iterable[R]) -> None:
        """Replace everything by these records in one step: after a crash either all old or all new ones are there."""
        with self._mutex:
            plain = [_plain(record) for record in records]
            data = _whole(self._label, plain)
            frames = 1 + -(-len(plain) // REWRITE_RECORDS_PER_FRAME)
            self._suspect = True
            self._replacement = (data, frames)
            replace_durably(self._disk, self._path, data)
            self._settle()
            self._suspect = False

    def _settle(self) -> None:
        """Find out which file an attempted replacement left: both are complete, so go on with the one that is there."""
        if self._replacement is None:
            return
        data, frames = self._replacement
        if self._disk.size(self._path) == len(data) and self._disk.read(self._path) == data:
            self._sequence, self._bytes = frames, len(data)
        self._replacement = None

    def _repair(self) -> None:
        self._settle()
        if self._disk.size(self._path) > self._bytes:
            self._disk.truncate(self._path, self._bytes)
        self._disk.fsync(self._path)
        self._disk.fsync_dir(parent_of(self._path))
        self._suspect = False

    def load(self, record_type: Any) -> None:  # noqa: ANN401 - a union of Structs has no better type
        """Read the file, or begin it; `open_journal` calls this once."""
        data = self._read_or_begin()
        if len(data) > JOURNAL_BYTES_MAX:
            raise StoreError(f"{self._path}: {len(data)} bytes exceed the limit of {JOURNAL_BYTES_MAX}")
        end = 0
        for sequence, end, plain in _frames(data, self._path):
            if sequence == 0:
                self._check_label(plain)
            else:
                self.records.extend(_typed(plain, record_type, self._path, end))
            self._sequence = sequence + 1
        if end == 0:
            raise Damaged(f"{self._path}: offset 0: not a journal, or its first frame is damaged")
        self._bytes = end
        self.cut_bytes = len(data) - end
        self._suspect = True
        self._repair()

    def _read_or_begin(self) -> bytes:
        try:
            return self._disk.read(self._path)
        except NotFound:
            data = _whole(self._label, [])
            replace_durably(self._disk, self._path, data)
            return data

    def _check_label(self, plain: Any) -> None:  # noqa: ANN401 - undecoded
        found = plain[0] if isinstance(plain, list) and plain and isinstance(plain[0], dict) else {}
        if found.get("journal") != FORMAT_VERSION:
            raise StoreError(f"{self._path}: journal format {found.get('journal')!r} is not {FORMAT_VERSION}")
        if found.get("label") != self._label:
            raise Foreign(f"{self._path}: belongs to {found.get('label')!r}, not to {self._label!r}")


@contextmanager
def open_journal(
    disk: Disk,
    path: str,
    *,
    label: str,
    record_type: Any,  # noqa: ANN401 - a union of Structs has no better type
    mend: bool = False,
) -> Iterator[Journal[Any]]:
    """Open or begin the journal at `path`, alone: a second opener gets Held until this one is done.

    `label` says whose it is (a job, a peer): a journal begun under another label is refused. `record_type` is a tagged
    Struct or a union of them. `mend`: a damaged one is set aside and a new one begun, for whoever can do without it.
    Raises StoreError: Held, Damaged (with path and offset), Foreign, or unreadable.
    """
    directory = parent_of(path)
    if directory:
        disk.mkdir(directory)
    with disk.lock(f"{path}.lock"):
        journal: Journal[Any] = Journal(disk, path, label)
        try:
            journal.load(record_type)
        except Damaged as error:
            if not mend:
                raise
            journal = Journal(disk, path, label)
            journal.mended = (str(error), _set_aside(disk, path))
            journal.load(record_type)
        yield journal


def _set_aside(disk: Disk, path: str) -> str:
    number = 1
    while disk.exists(aside := f"{path}.damaged-{number}"):
        number += 1
    disk.rename(path, aside)
    disk.fsync_dir(parent_of(path))
    return aside


def _plain(record: msgspec.Struct) -> Any:  # noqa: ANN401 - maps, lists and scalars
    return msgspec.to_builtins(record, builtin_types=(bytes,))


def _typed(plain: Any, record_type: Any, path: str, end: int) -> Sequence[Any]:  # noqa: ANN401 - undecoded
    try:
        records: list[Any] = msgspec.convert(plain, list[record_type], builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise StoreError(f"{path}: record before offset {end} has the wrong shape: {error}") from error
    return records


def _whole(label: str, plain: Sequence[Any]) -> bytes:
    step = REWRITE_RECORDS_PER_FRAME
    header: list[list[Any]] = [[{"journal": FORMAT_VERSION, "label": label}]]
    groups = header + [list(plain[start : start + step]) for start in range(0, len(plain), step)]
    return b"".join(_frame(sequence, group) for sequence, group in enumerate(groups))


def _frame(sequence: int, plain: Sequence[Any]) -> bytes:
    payload: bytes = cbor2.dumps(list(plain), canonical=True)
    if len(payload) > FRAME_BYTES_MAX:
        raise LocalProtocolError(f"a journal frame of {len(payload)} bytes exceeds {FRAME_BYTES_MAX}")
    head = _HEAD.pack(MAGIC, len(payload), sequence)
    return head + _check(head, payload) + payload


def _check(head: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(head + payload).digest()[:CHECK_BYTES]


def _payload_at(data: bytes, offset: int, sequences: range) -> bytes | None:
    """Return the payload of the verifiable frame at `offset` with one of these sequence numbers, or None."""
    start = offset + FRAME_OVERHEAD_BYTES
    if start > len(data):
        return None
    magic, length, sequence = _HEAD.unpack_from(data, offset)
    if magic != MAGIC or length > min(FRAME_BYTES_MAX, len(data) - start) or sequence not in sequences:
        return None
    head = data[offset : offset + _HEAD.size]
    payload = data[start : start + length]
    return payload if _check(head, payload) == data[offset + _HEAD.size : start] else None


def _frames(data: bytes, path: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (sequence, end offset, content) of each frame; stop at a torn end, raise StoreError at decay."""
    offset = sequence = 0
    while (payload := _payload_at(data, offset, range(sequence, sequence + 1))) is not None:
        offset += FRAME_OVERHEAD_BYTES + len(payload)
        try:
            content = cbor2.loads(payload)
        except (cbor2.CBORDecodeError, ValueError) as error:
            raise StoreError(f"{path}: frame before offset {offset} is not CBOR: {error}") from error
        yield sequence, offset, content
        sequence += 1
    later = data.find(MAGIC, offset + 1)
    while later >= 0:
        if _payload_at(data, later, range(sequence + 1, 1 << 63)) is not None:
            raise Damaged(f"{path}: damaged at offset {offset}: a later record at offset {later} is intact")
        later = data.find(MAGIC, later + 1)
