"""What the in-memory network does to messages: one profile, one link per direction, one gate per node.

    FaultProfile ──▶ Link(src → dst)   its own seeded Random: latency, loss, duplicates, late messages, bandwidth
                 ──▶ Gate(node)        closed while the node is stopped, as by SIGSTOP

A link draws the same numbers for every message whatever becomes of it, so that what happens on one link never changes
what chance has in store for another, and a change of one probability leaves the other draws as they were.
"""

import random
from typing import Annotated, NamedTuple

import trio
from msgspec import Meta, Struct

Chance = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0)]

# A stopped node is always let go in the end, so that a simulation that forgets to do so still ends.
STOP_S_MAX = 86_400.0


class FaultProfile(Struct, frozen=True, kw_only=True):
    """Chances are for each message (or stream segment) on its own; times in seconds; bandwidth in bytes per second."""

    latency_s: Seconds = 0.001
    jitter_s: Seconds = 0.0  # up to so much more, uniformly
    loss: Chance = 0.0  # a message never arrives; a stream segment comes `resend_s` later
    resend_s: Seconds = 0.2
    duplication: Chance = 0.0  # a request is handled twice, a reply arrives twice
    reordering: Chance = 0.0  # a message is late by up to `late_s`
    late_s: Seconds = 1.0
    bandwidth: Annotated[float, Meta(gt=0)] = float("inf")
    stream_break: Chance = 0.0  # the connection breaks under a stream
    break_after_s: Annotated[float, Meta(gt=0)] = 20.0  # silence for so long breaks a connection
    gossip_loss: Chance = 0.0
    gossip_duplication: Chance = 0.0
    dht_delay_s: Seconds = 0.0  # until a provider's record can be found
    dht_record_s: Seconds = 60.0  # until a vanished provider's record is forgotten


class Event(NamedTuple):
    """One thing that happened; the same seed gives the same sequence, byte for byte."""

    at_s: float
    src: str
    dst: str
    what: str
    outcome: str

    def __str__(self) -> str:
        """One line of the event log."""
        return f"{self.at_s:.6f} {self.src} {self.dst} {self.what} {self.outcome}"


class Fate(NamedTuple):
    """What becomes of one message: lost, or so many seconds under way, once for each copy."""

    lost: bool
    trips_s: tuple[float, ...]


class Link:
    """One direction between two nodes."""

    def __init__(self, profile: FaultProfile, chance: random.Random) -> None:
        self.profile = profile
        self._chance = chance
        self._busy_until = 0.0
        self._open = trio.Event()
        self._open.set()

    @property
    def blocked(self) -> bool:
        """Whether a partition cuts it."""
        return not self._open.is_set()

    def block(self) -> None:
        """Let nothing through."""
        if not self.blocked:
            self._open = trio.Event()

    def heal(self) -> None:
        """Let everything through again; what was sent meanwhile is gone."""
        self._open.set()

    async def opened(self) -> None:
        """Wait until it is not blocked."""
        await self._open.wait()

    def fate(self, bytes_sent: int = 0) -> Fate:
        """Draw what becomes of one message of so many bytes."""
        profile = self.profile
        lost, twice = self._chance.random() < profile.loss, self._chance.random() < profile.duplication
        carried_s = bytes_sent / profile.bandwidth
        first, second = self._trip_s() + carried_s, self._trip_s() + carried_s
        return Fate(lost, (first, first + second) if twice else (first,))

    def gossip_fate(self) -> Fate:
        """Draw what becomes of one announcement."""
        profile = self.profile
        lost, twice = self._chance.random() < profile.gossip_loss, self._chance.random() < profile.gossip_duplication
        first, second = self._trip_s(), self._trip_s()
        return Fate(lost, (first, first + second) if twice else (first,))

    def transmit(self, now: float, bytes_sent: int) -> float | None:
        """Return when a stream segment handed over `now` arrives, or None when the connection breaks under it.

        Segments of all streams on the link share its bandwidth.
        """
        profile = self.profile
        broken, resent = self._chance.random() < profile.stream_break, self._chance.random() < profile.loss
        trip_s = self._trip_s()
        self._busy_until = max(now, self._busy_until) + bytes_sent / profile.bandwidth
        if broken:
            return None
        return self._busy_until + trip_s + (profile.resend_s if resent else 0.0)

    def shuffle(self, names: list[str]) -> None:
        """Put names in an order that only the seed decides."""
        self._chance.shuffle(names)

    def _trip_s(self) -> float:
        profile = self.profile
        jitter, late, by = self._chance.random(), self._chance.random(), self._chance.random()
        return profile.latency_s + jitter * profile.jitter_s + (by * profile.late_s if late < profile.reordering else 0)


class Gate:
    """Whether a node runs. `async with gate:` around everything a node does at its edges stops it there.

    The wait is shielded: a stopped process does not notice cancellation either, it does so once it runs again.
    """

    def __init__(self) -> None:
        self._running = trio.Event()
        self._running.set()

    @property
    def stopped(self) -> bool:
        """Whether the node stands still."""
        return not self._running.is_set()

    def stop(self) -> None:
        """Stand still from now on."""
        if not self.stopped:
            self._running = trio.Event()

    def go(self) -> None:
        """Run again."""
        self._running.set()

    async def passed(self) -> None:
        """Return at once while the node runs, else when it runs again."""
        if self.stopped:
            with trio.CancelScope(deadline=trio.current_time() + STOP_S_MAX, shield=True):
                await self._running.wait()
            self.go()

    async def __aenter__(self) -> None:
        """Wait until the node runs."""
        await self.passed()

    async def __aexit__(self, *_: object) -> None:
        """Likewise, before the node can see what came of it."""
        await self.passed()
