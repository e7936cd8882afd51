"""The wall clocks of simulated machines: what `time.time()` says on each, and by how much one was set wrong.

with Wall().shown(): ─▶ time.time() = a day in 2026 + virtual time + jumps[machine that asks]      per NODE

Nothing that decides anything may look at it: whoever does finds it an hour off now and then (L4).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from tests.sim.chronicle import NODE

# 2026-01-01 in seconds since 1970.
BEGAN_S = 1_767_225_600.0
HOUR_S = 3600.0


class Wall:
    """All wall clocks of one cluster; `jumps` in seconds by machine."""

    def __init__(self) -> None:
        self.jumps: dict[str, float] = {}

    def time(self) -> float:
        """Seconds since 1970, as the machine has it whose task asks; libraries' threads are on no machine."""
        now = trio.current_time() if trio.lowlevel.in_trio_run() else 0.0
        return BEGAN_S + now + self.jumps.get(NODE.get(), 0.0)

    def time_ns(self) -> int:
        """Likewise in nanoseconds."""
        return int(self.time() * 1e9)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let everybody see it who looks at a wall clock, in this process, within trio."""
        real = time.time, time.time_ns
        time.time, time.time_ns = self.time, self.time_ns
        try:
            yield
        finally:
            time.time, time.time_ns = real
