"""A circuit breaker for each peer: whoever does not answer is left alone for a while, by everybody here at once.

    closed ── `failures` in a row ─▶ open ── `open_s` later, one attempt is let through ─▶ half-open
       ▲                              ▲                                                      │ failed
       │                              └──────────────────────────────────────────────────────┤
       └───────────────────── answered, or heard from ───────────────────────────────────────┘

`Breaker` is the rule; `Breakers` keeps one for each peer and lets tasks wait for their turn. A breaker saves attempts.
It says nothing about whether a peer lives, and renewals never ask it.
"""

from typing import Annotated

import trio
from msgspec import Meta, Struct

from hypha.runtime import Runtime

# Peers that failed and were not heard from since; beyond it the ones that failed first are forgotten.
PEERS_MAX = 4096


class BreakerLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """After `failures` unanswered attempts in a row a peer is left alone for `open_s` seconds, then tried once."""

    failures: Annotated[int, Meta(ge=1, le=1000)] = 5
    open_s: Annotated[float, Meta(gt=0, le=600)] = 5.0


class Breaker:
    """One peer's. `now` is seconds of one clock."""

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._failures = 0
        self._open_until: float | None = None  # the next attempt is let through then

    def admit(self, now: float) -> float:
        """Let an attempt through: 0; or return in how many seconds one will be."""
        if self._open_until is None:
            return 0.0
        if now < self._open_until:
            return self._open_until - now
        # Half-open: the others wait for what becomes of this one, or for so long.
        self._open_until = now + self._limits.open_s
        return 0.0

    def is_open(self, now: float) -> bool:
        """Whether an attempt would have to wait; asking changes nothing."""
        return self._open_until is not None and now < self._open_until

    def failed(self, now: float) -> bool:
        """An attempt had no answer; returns whether that opened the breaker."""
        self._failures += 1
        if self._failures < self._limits.failures:
            return False
        was_closed = self._open_until is None
        self._open_until = now + self._limits.open_s
        return was_closed


class Breakers:
    """One breaker for each peer that failed lately."""

    def __init__(self, runtime: Runtime, limits: BreakerLimits = BreakerLimits()) -> None:  # noqa: B008 - frozen
        self._runtime = runtime
        self._limits = limits
        self._breakers: dict[str, Breaker] = {}
        self._heard = trio.Event()

    def admit(self, peer_id: str) -> float:
        """Let an attempt through: 0; or return in how many seconds one will be."""
        breaker = self._breakers.get(peer_id)
        return 0.0 if breaker is None else breaker.admit(self._runtime.now())

    def leaves_alone(self, peer_id: str) -> bool:
        """Whether the peer is left alone now; for those who have a choice of peers."""
        breaker = self._breakers.get(peer_id)
        return breaker is not None and breaker.is_open(self._runtime.now())

    async def admitted(self, peer_id: str) -> None:
        """Return as soon as an attempt may be made."""
        while (wait_s := self.admit(peer_id)) > 0:
            heard = self._heard
            with trio.move_on_after(wait_s):
                await heard.wait()

    def failed(self, peer_id: str) -> bool:
        """An attempt had no answer; returns whether the peer is now left alone."""
        if peer_id not in self._breakers:
            while len(self._breakers) >= PEERS_MAX:
                del self._breakers[next(iter(self._breakers))]
            self._breakers[peer_id] = Breaker(self._limits)
        return self._breakers[peer_id].failed(self._runtime.now())

    def worked(self, peer_id: str) -> None:
        """The peer answered, or asked something itself: whoever waits for it may try."""
        if self._breakers.pop(peer_id, None) is not None:
            self._heard.set()
            self._heard = trio.Event()
