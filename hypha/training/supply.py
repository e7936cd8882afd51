"""Where the samples of one round after another come from, so that a round begins with its first grant in hand.

    round r:  take … take, all it needs is here ─▶ ahead(r+1): FetchSamples 0 of r+1 ─┐ in a thread
    round r+1:  feed(r+1) takes that over, or begins with the same question ◀─────────┘

A question is known by its number: asked again it gets the same samples. So what was asked for ahead and is not used,
because the executor goes elsewhere first, costs nothing but the question.
"""

from collections.abc import Callable
from pathlib import Path

from hypha.protocol.bridge import Fetched, FetchSamples
from hypha.protocol.job import JobSpec
from hypha.telemetry import inject
from hypha.training.batches import Ask, Feed, Fetching, taker
from hypha.training.kept import Kept
from hypha.training.session import Session

# How much to ask for at once: a grant is one question to the scheduler, and an unused rest is given back.
GRANT_BATCHES = 8


class Supply:
    """One executor's samples."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path) -> None:
        self._session = session
        self._take = taker(work_dir, job.dataset.schema)
        self._grant_samples = GRANT_BATCHES * job.rounds.max_batch_size
        self._rounds = job.rounds.updates
        self._first: tuple[int, Fetching] | None = None  # of which round

    def feed(self, kept: Kept, round_: int, *, leave: Callable[[], bool]) -> Feed:
        """Begin a round's samples; `leave()` ends a wait for them."""
        first = None
        if self._first is not None and self._first[0] == round_ and not kept.requests:
            kept.requests, first, self._first = 1, self._first[1], None
        self.forget()
        ask = self._asking(round_, kept.numbered)
        return Feed(ask, take=self._take, grant_samples=self._grant_samples, leave=leave, first=first)

    def ahead(self, round_: int) -> None:
        """Ask for the first samples of a round, unless that is done or there is no such round."""
        if round_ > self._rounds or (self._first is not None and self._first[0] == round_):
            return
        self.forget()
        self._first = round_, Fetching(self._asking(round_, lambda: 0), self._grant_samples, self._take)

    def forget(self) -> None:
        """What was asked for ahead may be somebody else's by now: whoever wants it asks again."""
        if self._first is not None:
            self._first[1].abandon()
        self._first = None

    def _asking(self, round_: int, number: Callable[[], int]) -> Ask:
        # The current span is this thread's; the questions are asked from another.
        traceparent = inject()

        def ask(wanted: int, leave: Callable[[], bool]) -> Fetched:
            request = FetchSamples(round=round_, request=number(), wanted=wanted, traceparent=traceparent)
            return self._session.fetch_patiently(request, leave=leave)

        return ask
