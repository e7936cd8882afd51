"""What a role may ask of the machine it runs on: time, identifiers, chance and blocking work.

    real process   CLOCK_BOOTTIME   uuid4        os-seeded Random   trio worker threads
    simulation     virtual clock    counted ids  seeded Random      run inline, under virtual time

Roles receive one of these and never reach for `time`, `uuid`, `random` or `trio.to_thread` themselves: that is what
makes a whole cluster replayable from one seed.
"""

import random
import time
import uuid
from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")

# Linux keeps counting while the machine sleeps; elsewhere the monotonic clock is the best there is.
_CLOCK_ID = getattr(time, "CLOCK_BOOTTIME", None)


def boot_time() -> float:
    """Seconds on a clock that never jumps and, where the system has one, goes on during suspend."""
    return time.monotonic() if _CLOCK_ID is None else time.clock_gettime(_CLOCK_ID)


class Runtime(Protocol):
    """The machine as a role sees it. Two implementations: `RealRuntime` and the simulator's."""

    @property
    def random(self) -> random.Random:
        """Chance for jitter and tie-free choices; never for secrets."""

    def now(self) -> float:
        """Seconds on this node's own monotonic clock; its zero means nothing."""

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds of this node's clock, or after a suspend that covered them."""

    def new_id(self) -> str:
        """Return an identifier nobody else will ever use."""

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        """Run a call that blocks on disk or CPU without stopping the event loop."""


# A suspended machine must notice that its deadlines passed within this long of waking.
SLEEP_SLICE_S = 5.0


class RealRuntime:
    """Time from CLOCK_BOOTTIME, ids from uuid4, blocking work in trio's threads."""

    def __init__(self) -> None:
        self.random = random.Random()  # noqa: S311 - jitter, not secrets

    def now(self) -> float:
        """Seconds since boot, suspends included."""
        return boot_time()

    async def sleep(self, seconds: float) -> None:
        """Sleep in slices: trio's own clock stops while the machine is suspended."""
        deadline = self.now() + seconds
        while (left := deadline - self.now()) > 0:  # noqa: ASYNC110 - time itself is awaited
            await trio.sleep(min(left, SLEEP_SLICE_S))

    def new_id(self) -> str:
        """Return 32 hexadecimal digits."""
        return uuid.uuid4().hex

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        """Run in a worker thread; cancellation waits for the call to end."""
        return await trio.to_thread.run_sync(function, *args)
