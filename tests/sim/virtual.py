"""The machine of a simulated node, and the loop it runs in: everything that a seed must decide.

run_seeded(seed, main) ──▶ trio on a MockClock that jumps, its shuffling seeded
VirtualRuntime ──▶ now()  = its Clock: offset + rate × virtual time, the rate may change on the way
                   new_id() = "worker-1.0-7"                 node, incarnation, count
                   run_blocking()                            inline, after `blocking_s` of virtual time
Power ──▶ off: whatever the crashed node still asks of its machine ends in NodeCrashed, so no cleanup is ever done
      ──▶ a disk that lost power in the middle of a call takes its node with it
"""

import errno
import os
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing

from hypha.errors import StoreError
from hypha.network.memory_faults import Gate
from hypha.store.memory_disk import PowerLoss

T = TypeVar("T")
# No timer is finer; a sleeper whom rounding wakes early must not spin.
TICK_S = 1e-6
# Blocking calls of a worker that put something on its disk (see `Power.full`): directories, transfers, slices.
WRITING = frozenset({"_make_directory", "_make_spool", "open", "write", "_hard_link"})


class NodeCrashed(BaseException):
    """The machine is off: not an error that a program handles."""


class Power:
    """Whether one incarnation of a node still has its machine under it."""

    def __init__(self, fails: Callable[[], None] = lambda: None) -> None:
        """`fails` is called when power is lost in the middle of a call."""
        self.off = False
        self.full = False  # its file system has no room
        self._fails = fails

    def check(self) -> None:
        """Raise NodeCrashed once it is off."""
        if self.off:
            raise NodeCrashed

    def call(self, function: Callable[..., T], *args: object) -> T:
        """Run a call that uses the disk. Raises NodeCrashed where the power goes in its midst."""
        name = getattr(function, "__name__", "")
        if self.full and name in WRITING:
            raise StoreError(f"{name}: {os.strerror(errno.ENOSPC)}")
        try:
            return function(*args)
        except PowerLoss:
            self._fails()
            raise NodeCrashed from None


class Clock:
    """A machine's own clock: `rate` is how many seconds it shows per virtual second."""

    def __init__(self, *, rate: float = 1.0, offset: float = 0.0, since: float = 0.0) -> None:
        """Let it show `offset` at the virtual time `since`."""
        self.rate = rate
        self.turned = trio.Event()
        self._shown = offset
        self._since = since

    def now(self) -> float:
        """Seconds it shows."""
        return self._shown + self.rate * (trio.current_time() - self._since)

    def turn(self, rate: float) -> None:
        """Run at another rate from now on; what it shows does not jump."""
        self._shown, self._since = self.now(), trio.current_time()
        self.rate = rate
        self.turned.set()
        self.turned = trio.Event()

    async def sleep(self, seconds: float) -> None:
        """Return once it shows so much more."""
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
            return
        until = self.now() + seconds
        left_s = max(seconds, TICK_S)
        while left_s > 0:
            with trio.move_on_after(max(left_s, TICK_S) / self.rate):
                await self.turned.wait()
            left_s = until - self.now()


class VirtualRuntime:
    """See `hypha.runtime.Runtime`."""

    def __init__(
        self,
        seed: int | str,
        name: str,
        *,
        incarnation: int = 0,
        clock: Clock | None = None,
        blocking_s: float = 0.0,
        gate: Gate | None = None,
        power: Power | None = None,
    ) -> None:
        self.random = random.Random(f"{seed}:{name}:{incarnation}")
        self._name = f"{name}.{incarnation}"
        self.clock = Clock() if clock is None else clock
        self._blocking_s = blocking_s
        self._gate = Gate() if gate is None else gate
        self._power = Power() if power is None else power
        self._ids = 0

    def now(self) -> float:
        """Seconds on this node's clock; it goes on while the node stands still."""
        return self.clock.now()

    async def sleep(self, seconds: float) -> None:
        """Sleep so long by this node's clock."""
        self._power.check()
        async with self._gate:
            await self.clock.sleep(seconds)

    def new_id(self) -> str:
        """Count: no other node and no other incarnation has the same name."""
        self._ids += 1
        return f"{self._name}-{self._ids}"

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        """Run it here and now, then let `blocking_s` pass."""
        self._power.check()
        async with self._gate:
            result = self._power.call(function, *args)
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
