"""The manifest chain: numbered entries, each made whole and exclusively; the commit point of a job (rounds.md).

    chain/00000000 ◀─previous─ chain/00000001 ◀─previous─ chain/00000002
    file   CBOR {number, previous, payload} and sha256 over it;   digest of an entry = sha256(payload)

What a payload means is `hypha.protocol.manifest`'s. Payloads carry a nonce of their author, so equal bytes mean "mine":
on "exists" the entry is read back, and anything but the own payload is StoreConflict. The loser drops what it holds in
memory and loads the chain again. A newest entry that does not match its checksum can be set aside (`mend`): its author
was told of a success that the medium did not keep. One with successors cannot, for nothing else tells what it said.
"""

import hashlib
from typing import Annotated

import cbor2
import msgspec
from msgspec import Meta, Struct

from hypha.errors import StoreError
from hypha.store.disk import AlreadyExists, Damaged, NotFound
from hypha.store.objects import ObjectStore

FOLDER = "chain"
# Where entries go that were set aside; never read again, never deleted by us.
DAMAGED_SUFFIX = "-damaged"
# An entry names every contribution of a round with its intervals: MEMBERS_MAX of a few hundred bytes each.
ENTRY_BYTES_MAX = 64 << 20
_CHECK_BYTES = 32
NO_PREVIOUS = ""


class Link(Struct, frozen=True, kw_only=True):
    """An entry as it lies in the store; `previous` is its predecessor's digest, NO_PREVIOUS for number 0."""

    number: Annotated[int, Meta(ge=0)]
    previous: str
    payload: bytes

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the payload: what the successor's `previous` repeats."""
        return hashlib.sha256(self.payload).hexdigest()


class StoreConflict(StoreError):
    """Somebody else made this entry first; `link` is what they wrote."""

    def __init__(self, message: str, link: Link) -> None:
        super().__init__(message)
        self.link = link


class Mended(Struct, frozen=True, kw_only=True):
    """A damaged newest entry, the entry before it ("" where there is none), and where it was put."""

    damaged: str
    used: str
    set_aside: str
    reason: str


class Chain:
    """The chain as far as this process has seen it. Not thread-safe: one committer per process."""

    def __init__(self, objects: ObjectStore, *, folder: str = FOLDER) -> None:
        self._objects = objects
        self._folder = folder
        self._links: list[Link] = []

    @property
    def links(self) -> tuple[Link, ...]:
        """Everything loaded or appended so far, by number."""
        return tuple(self._links)

    @property
    def head_digest(self) -> str:
        """Digest of the newest entry seen, NO_PREVIOUS when there is none."""
        return self._links[-1].digest if self._links else NO_PREVIOUS

    def load(self) -> tuple[Link, ...]:
        """Read the whole chain afresh. Raises StoreError naming a damaged, missing or misfit entry."""
        self._links = []
        self.refresh()
        return self.links

    def refresh(self) -> tuple[Link, ...]:
        """Read what others added since, and return just that."""
        known = len(self._links)
        numbers = sorted(self._number(name) for name in self._objects.names(self._folder))
        if numbers != list(range(len(numbers))) or len(numbers) < known:
            missing = next((n for n, found in enumerate(numbers) if n != found), len(numbers))
            raise StoreError(f"{self._name(missing)}: missing from the chain")
        for number in numbers[known:]:
            self._links.append(self._read(number))
        return tuple(self._links[known:])

    def first(self) -> Link | None:
        """Read entry 0 alone; None where there is none yet, or it is damaged. Raises StoreError."""
        try:
            return _decode(self._objects.read(self._name(0)), self._name(0))
        except (NotFound, Damaged):
            return None

    def mend(self) -> Mended | None:
        """Load the chain; an unreadable newest entry is set aside, and said. For a chain that nobody else appends to.

        Raises StoreError for any other damage.
        """
        try:
            self.load()
        except Damaged as error:
            names, known = self._objects.names(self._folder), len(self._links)
            if known != len(names) - 1:
                raise
            name, folder = self._name(known), f"{self._folder}{DAMAGED_SUFFIX}"
            aside = f"{folder}/{known:08d}-{len(self._objects.names(folder)) + 1}"
            self._objects.create(aside, [self._objects.read(name)])
            self._objects.remove(name)
            used = self._name(known - 1) if known else ""
            return Mended(damaged=name, used=used, set_aside=aside, reason=str(error))
        return None

    def set_aside(self) -> int:
        """Return how many entries were ever set aside."""
        return len(self._objects.names(f"{self._folder}{DAMAGED_SUFFIX}"))

    def peek(self) -> Link | None:
        """Return the entry after those known, if somebody made one; it stays unknown. May be called beside the rest."""
        try:
            return self._read(len(self._links))
        except NotFound:
            return None

    def append(self, payload: bytes) -> Link:
        """Make the next entry. Returns once it is durable and ours.

        Raises StoreConflict when that number is another's, StoreError when the outcome is unknown: calling again with
        the same payload finds out.
        """
        link = Link(number=len(self._links), previous=self.head_digest, payload=payload)
        try:
            self._objects.create(self._name(link.number), [_encode(link)])
        except AlreadyExists:
            theirs = self._read(link.number)
            if theirs.payload != payload:
                name = self._name(link.number)
                raise StoreConflict(f"{name}: made by somebody else, digest {theirs.digest}", theirs) from None
        self._links.append(link)
        return link

    def _read(self, number: int) -> Link:
        name = self._name(number)
        link = _decode(self._objects.read(name), name)
        expected = self._links[number - 1].digest if number else NO_PREVIOUS
        if link.number != number or link.previous != expected:
            raise StoreError(
                f"{name}: says number {link.number} after {link.previous or 'nothing'}, "
                f"expected {number} after {expected or 'nothing'}"
            )
        return link

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:08d}"

    def _number(self, name: str) -> int:
        text = name.rpartition("/")[2]
        if not (text.isascii() and text.isdigit() and self._name(int(text)) == name):
            raise StoreError(f"{name}: does not belong in a chain")
        return int(text)


def _encode(link: Link) -> bytes:
    body: bytes = cbor2.dumps(msgspec.to_builtins(link, builtin_types=(bytes,)), canonical=True)
    if len(body) > ENTRY_BYTES_MAX:
        raise StoreError(f"chain entry {link.number} of {len(body)} bytes exceeds {ENTRY_BYTES_MAX}")
    return body + hashlib.sha256(body).digest()


def _decode(data: bytes, name: str) -> Link:
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if hashlib.sha256(body).digest() != check:
        raise Damaged(f"{name}: damaged: {len(data)} bytes do not match their checksum")
    try:
        return msgspec.convert(cbor2.loads(body), Link, builtin_types=(bytes,))
    except (msgspec.ValidationError, cbor2.CBORDecodeError, ValueError) as error:
        raise StoreError(f"{name}: not a chain entry: {error}") from error
