"""Samples as a simulated executor takes them: what `hypha.training.batches` does.

FetchSamples ─▶ Asking ─▶ grant ─▶ Round.take(n) ─▶ intervals used
"""

from dataclasses import dataclass, field

import trio

from hypha.protocol.bridge import Fetched, FetchSamples
from hypha.protocol.messages import Interval
from tests.sim.line import BridgeRefused, Line


class Asking:
    """One FetchSamples under way."""

    def __init__(self) -> None:
        self.answer: Fetched | None = None
        self.error: BridgeRefused | None = None
        self.done = trio.Event()
        self.abandoned = False

    async def run(self, line: Line, request: FetchSamples) -> None:
        """Ask until answered, or given up."""
        try:
            self.answer = await line.fetch_patiently(request, leave=lambda: self.abandoned)
        except BridgeRefused as refusal:
            self.error = refusal
        self.done.set()


@dataclass
class Round:
    """The samples of one round as they come: a grant, and the next one asked for while the first is trained."""

    number: int
    used: list[Interval] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    grant: Interval | None = None
    path: str = ""
    next: int = 0
    asking: Asking | None = None
    exhausted: bool = False

    @property
    def left(self) -> int:
        """Rows of the grant not yet taken."""
        return self.grant.stop - self.next if self.grant is not None else 0

    def take(self, count: int) -> Interval:
        """Note that the next rows of the grant are trained on."""
        assert self.grant is not None
        at = self.grant
        taken = Interval(epoch=at.epoch, slice=at.slice, start=self.next, stop=self.next + count)
        self.next += count
        last = self.used[-1] if self.used else None
        if last and (last.epoch, last.slice, last.stop) == (taken.epoch, taken.slice, taken.start):
            self.used[-1] = Interval(epoch=at.epoch, slice=at.slice, start=last.start, stop=taken.stop)
        else:
            self.used.append(taken)
        return taken
