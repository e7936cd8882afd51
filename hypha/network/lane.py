"""A way of its own for one large transfer, where the stream that it belongs to can offer one.

    stream ── lane_of(stream, length, terms) ──▶ Lane ── send / receive, in threads, a whole transfer at a call
                                             └─▶ None: small, or no other way than the stream

Both ends ask, or neither: that is decided by the length alone. Whoever wraps a stream and wants to keep this passes
`lane` on. The in-memory network offers none.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol, runtime_checkable

from msgspec import Struct

# Agreeing on a lane costs two round trips and a handshake, about 5 ms: the time in which a stream moves 6 MiB.
LANE_BYTES_MIN = 8 << 20
# So long a receiver waits for a byte. Keep-alives on the stream find a dead peer sooner.
STALL_S = 30.0
# A sender waits longer: its receiver may be waiting for a disk, and gives up by itself when the connection is dead.
SENDER_STALL_S = 120.0

# Fills the beginning of the buffer and says how much of it; gives at least one byte. Blocks, so it runs in a thread.
Read = Callable[[memoryview], int]
# Takes the bytes; the buffer is used again afterwards. Likewise.
Write = Callable[[memoryview], object]


def uncounted(_moved: int) -> None:
    """Count nothing."""


class Terms(Struct, frozen=True):
    """How one transfer is to be run; `count` is called now and then with the bytes moved since the last time."""

    sending: bool
    stall_s: float = STALL_S
    count: Callable[[int], None] = uncounted


class Lane(Protocol):
    """One transfer in one direction."""

    async def send(self, read: Read, length: int) -> None:
        """Send `length` bytes; returns when the peer has them, or has answered without them.

        Raises PeerUnreachable, and what `read` raises.
        """

    async def receive(self, write: Write, length: int) -> None:
        """Receive `length` bytes; `write` has taken all that came, also before an error.

        Raises PeerUnreachable, and what `write` raises.
        """


@runtime_checkable
class Laned(Protocol):
    """A stream that may offer one."""

    def lane(self, terms: Terms) -> AbstractAsyncContextManager[Lane | None]:
        """Agree with the peer on a lane; None when the bytes are to go over the stream."""


def lane_of(stream: object, terms: Terms, length: int | None = None) -> AbstractAsyncContextManager[Lane | None]:
    """Return the stream's lane for a transfer of `length` bytes, known to be large where it is not given."""
    if isinstance(stream, Laned) and (length is None or length >= LANE_BYTES_MIN):
        return stream.lane(terms)
    return nullcontext()
