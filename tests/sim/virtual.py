"""The machine of a simulated node, and the loop it runs in: everything that a seed must decide.

run_seeded(seed, main) ──▶ trio on a MockClock that jumps, its shuffling seeded
VirtualRuntime ──▶ now()  = offset + rate × virtual time     a clock of its own, fast or slow
                   new_id() = "worker-1.0-7"                 node, incarnation, count
                   run_blocking()                            inline, after `blocking_s` of virtual time
Power ──▶ off: whatever the crashed node still asks of its machine ends in NodeCrashed, so no cleanup is ever done
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing

from hypha.network.memory_faults import Gate

T = TypeVar("T")


class NodeCrashed(BaseException):
    """The machine is off: not an error that a program handles."""


class Power:
    """Whether one incarnation of a node still has its machine under it."""

    def __init__(self) -> None:
        self.off = False

    def check(self) -> None:
        """Raise NodeCrashed once it is off."""
        if self.off:
            raise NodeCrashed


class VirtualRuntime:
    """See `hypha.runtime.Runtime`. `rate` is how many seconds this clock shows per virtual second."""

    def __init__(
        self,
        seed: int | str,
        name: str,
        *,
        incarnation: int = 0,
        rate: float = 1.0,
        offset: float = 0.0,
        blocking_s: float = 0.0,
        gate: Gate | None = None,
        power: Power | None = None,
    ) -> None:
        self.random = random.Random(f"{seed}:{name}:{incarnation}")
        self._name = f"{name}.{incarnation}"
        self._rate = rate
        self._offset = offset
        self._blocking_s = blocking_s
        self._gate = Gate() if gate is None else gate
        self._power = Power() if power is None else power
        self._ids = 0

    def now(self) -> float:
        """Seconds on this node's clock; it goes on while the node stands still."""
        return self._offset + self._rate * trio.current_time()

    async def sleep(self, seconds: float) -> None:
        """Sleep so long by this node's clock."""
        self._power.check()
        async with self._gate:
            await trio.sleep(max(0.0, seconds) / self._rate)

    def new_id(self) -> str:
        """Count: no other node and no other incarnation has the same name."""
        self._ids += 1
        return f"{self._name}-{self._ids}"

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        """Run it here and now, then let `blocking_s` pass."""
        self._power.check()
        async with self._gate:
            result = function(*args)
            await trio.sleep(self._blocking_s)
            return result


def run_seeded(seed: int | str, main: Callable[..., Awaitable[T]], *args: object) -> T:
    """Run `main` in virtual time with trio's own choices decided by the seed.

    trio shuffles tasks that are ready at the same time with a private generator, and, unless its switch for
    Hypothesis is on, takes them from sets first. Both are restored afterwards.
    """
    run = trio._core._run
    chance, deterministic = run._r, run._ALLOW_DETERMINISTIC_SCHEDULING
    run._r, run._ALLOW_DETERMINISTIC_SCHEDULING = random.Random(f"trio:{seed}"), True
    try:
        return trio.run(main, *args, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        run._r, run._ALLOW_DETERMINISTIC_SCHEDULING = chance, deterministic
