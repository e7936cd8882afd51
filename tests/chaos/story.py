"""What the schedulers' logs tell of one job, over all incarnations of its leader.

    Job started ─▶ Round opened ─▶ Round committed … ─▶ Job finished | Job failed
                        └─▶ Outer step lost                    what was open when it died and is not in the next start

The leader is whose log said "Job started" last: what another says from then on is nothing of the job's.
"""

from collections import Counter
from collections.abc import Callable

from msgspec import Struct, field

from hypha.demo.loglines import LogLine
from tests.chaos.cast import TRAINERS

STARTED = "Job started"


class Committed(Struct, frozen=True):
    """One committed round, and when it was read, in seconds of the teller's clock."""

    round: int
    contributors: int
    samples_total: int
    at: float


class Resumed(Struct, frozen=True):
    """Where an incarnation of the scheduler began: after `round` committed rounds."""

    round: int
    samples: int
    model_digest: str
    job_epoch: int


class Finished(Struct, frozen=True):
    """The end: the last held-out loss (nats), samples, rounds, and where the model lies."""

    loss: float | None
    samples: int
    rounds: int
    model_digest: str
    model_file: str
    wall_s: float


class Story(Struct):
    """Everything told so far."""

    commits: list[Committed] = field(default_factory=list)
    starts: list[Resumed] = field(default_factory=list)
    open_round: int = 0
    held_out: dict[int, float] = field(default_factory=dict)
    losses: list[tuple[float, str]] = field(default_factory=list)  # leases lost: when, work
    counts: Counter[str] = field(default_factory=Counter)
    steps_lost: int = 0
    steps_lost_at_once_max: int = 0
    finished: Finished | None = None
    failure: str | None = None
    leader: str = ""  # the name of its log

    @property
    def round(self) -> int:
        """The newest committed round."""
        return self.commits[-1].round if self.commits else 0

    def round_at(self, at: float) -> int:
        """The newest round that was committed by then."""
        return max((each.round for each in self.commits if each.at <= at), default=0)

    def take(self, line: LogLine, now: float) -> None:
        """Take in one line of a scheduler."""
        if line.message == STARTED:
            self.leader = line.source
        elif self.leader and line.source != self.leader:
            return
        handler = _HANDLERS.get(line.message)
        if handler is not None:
            handler(self, line, now)
        self.counts[line.message] += 1

    def whole_again(self, after_round: int, since: float) -> float | None:
        """Return when the first round that opened after `after_round` was committed with every trainer in it."""
        whole = (c.at for c in self.commits if c.at >= since and c.round > after_round and c.contributors >= TRAINERS)
        return next(whole, None)


def _started(story: Story, line: LogLine, _now: float) -> None:
    after = int(line.number("round")) - 1
    epoch = int(line.number("job_epoch"))
    story.starts.append(Resumed(after, int(line.number("samples_total")), line.text("model_digest"), epoch))
    # A round opens when the one before it is merged.
    lost = max(0, story.open_round - 1 - after)
    story.steps_lost += lost
    story.steps_lost_at_once_max = max(story.steps_lost_at_once_max, lost)
    story.open_round = 0


def _opened(story: Story, line: LogLine, _now: float) -> None:
    story.open_round = int(line.number("round"))


def _committed(story: Story, line: LogLine, now: float) -> None:
    round_, contributors, samples = (int(line.number(key)) for key in ("round", "contributors", "samples_total"))
    story.commits.append(Committed(round_, contributors, samples, now))


def _step_lost(story: Story, _line: LogLine, _now: float) -> None:
    story.steps_lost += 1
    story.steps_lost_at_once_max = max(story.steps_lost_at_once_max, 1)


def _evaluated(story: Story, line: LogLine, _now: float) -> None:
    story.held_out[int(line.number("round"))] = line.number("loss")


def _worker_lost(story: Story, line: LogLine, now: float) -> None:
    story.losses.append((now, line.text("work")))


def _finished(story: Story, line: LogLine, _now: float) -> None:
    story.finished = Finished(
        loss=line.number("held_out") if line.text("held_out") else None,
        samples=int(line.number("samples")),
        rounds=int(line.number("rounds")),
        model_digest=line.text("model_digest"),
        model_file=line.text("model_file"),
        wall_s=line.number("wall_s"),
    )


def _failed(story: Story, line: LogLine, _now: float) -> None:
    story.failure = line.text("reason") or line.message


_HANDLERS: dict[str, Callable[[Story, LogLine, float], None]] = {
    STARTED: _started,
    "Round opened": _opened,
    "Round committed": _committed,
    "Outer step lost": _step_lost,
    "Held-out loss": _evaluated,
    "Worker lost": _worker_lost,
    "Job finished": _finished,
    "Job failed": _failed,
}
