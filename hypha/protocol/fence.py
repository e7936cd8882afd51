"""Fences: numbers that rise for ever, handed out from blocks reserved durably beforehand (leases.md).

    handed out ······│ free to hand out │ not reserved yet
               1 … n │ n+1 … reserved   │ reserved+1 …
                     └─ wish(): write `reserved + BLOCK` durably, then tell `reserved(...)`

What is reserved is on disk *before* any fence of it leaves; after a restart the rest of the block is skipped. So a
fence is never handed out twice, at the price of one durable write per block instead of one per offer.
"""

from msgspec import Struct

from hypha.errors import LocalProtocolError

FENCE_BLOCK = 1024
# Ask for the next block while so many are left, so that an offer seldom waits for a disk.
FENCE_LOW_WATER = 256
# What a message can carry (messages.Count). At a thousand offers a second it lasts 285 000 years.
FENCE_MAX = 2**53


class MustReserve(Struct, frozen=True):
    """No fence may leave before `upto` is written durably and told to `reserved`."""

    upto: int


class Fences:
    """Hands out fences 1, 2, 3 …; `reserved` is what the disk says (0: a new identity), all of it counts as used."""

    def __init__(self, reserved: int) -> None:
        if not 0 <= reserved <= FENCE_MAX:
            raise LocalProtocolError(f"fences cannot be reserved up to {reserved}")
        self._last = reserved
        self._reserved = reserved

    def take(self) -> int | MustReserve:
        """Return the next fence, or what has to be written first."""
        if self._last == self._reserved:
            return MustReserve(self._next_bound())
        self._last += 1
        return self._last

    def wish(self) -> MustReserve | None:
        """Return the reservation worth writing now, in the background; None while plenty are left."""
        return MustReserve(self._next_bound()) if self._reserved - self._last < FENCE_LOW_WATER else None

    def reserved(self, upto: int) -> None:
        """Note that `upto` is durable. Raises LocalProtocolError for more than was asked for; repeating is harmless."""
        if upto > self._next_bound():
            raise LocalProtocolError(f"fences reserved up to {upto}, asked for {self._next_bound()}")
        self._reserved = max(self._reserved, upto)

    def _next_bound(self) -> int:
        bound = self._reserved + FENCE_BLOCK
        if bound > FENCE_MAX:
            raise LocalProtocolError(f"fences end at {FENCE_MAX}: this worker needs a new identity")
        return bound
