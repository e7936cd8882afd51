"""How a job is getting on, in numbers: for its log, its status and whoever asks.

    opened ──inner steps──▶ closing ──merge──▶ merged ──record, chain──▶ committed

Round r+1 opens at `merged` of round r, so training and committing overlap; each is timed on its own.
"""

from msgspec import Struct

from hypha.protocol.closing import Outcome

# Enough for a plot of any run; older ones are in the chain.
ROUNDS_KEPT = 10_000


class RoundDone(Struct, frozen=True, kw_only=True):
    """One committed round; times in seconds, `loss` the sample-weighted mean training loss (nats)."""

    round: int
    samples: int
    loss: float
    contributors: int
    train_s: float
    merge_s: float
    commit_s: float


class JobProgress:
    """Times of the round that is open and of those that were."""

    def __init__(self, now: float) -> None:
        self.started_at = now
        self.round_open: int | None = None
        self.rounds: list[RoundDone] = []
        self.held_out: dict[int, float] = {}
        self._opened_at = now
        self._closing_at = now
        self._merged_at = now
        self._timed: tuple[float, float] = (0.0, 0.0)

    def opened(self, round_opened: int, now: float) -> None:
        """A round is open."""
        self.round_open, self._opened_at = round_opened, now

    def closing(self, now: float) -> None:
        """Its Close was sent."""
        self._closing_at = now

    def merged(self, now: float) -> None:
        """Its Close was answered by all servers."""
        self._merged_at = now
        self._timed = (self._closing_at - self._opened_at, now - self._closing_at)

    def committed(self, outcome: Outcome, now: float) -> None:
        """It is durable."""
        samples = outcome.samples
        loss = sum(c.loss * c.samples for c in outcome.contributions) / samples if samples else 0.0
        train_s, merge_s = self._timed
        self.rounds.append(
            RoundDone(
                round=outcome.round,
                samples=samples,
                loss=loss,
                contributors=len(outcome.contributions),
                train_s=round(train_s, 4),
                merge_s=round(merge_s, 4),
                commit_s=round(now - self._merged_at, 4),
            )
        )
        del self.rounds[:-ROUNDS_KEPT]

    def last(self) -> dict[str, float]:
        """Return the newest committed round's numbers by name."""
        done = self.rounds[-1]
        return {field: getattr(done, field) for field in done.__struct_fields__}
