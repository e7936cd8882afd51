"""What the log lines of all processes add up to: rounds, losses, leases, who does what, and what went wrong.

    LogLine ─▶ Progress.take ─▶ state changed, and a sentence for people where there is something to tell
    exit of a process that nobody asked to stop ─▶ Progress.lost

Errors are counted wherever they are logged: lines at error level, tracebacks, failed jobs, lost processes.
"""

from collections.abc import Callable, Mapping

from msgspec import Struct, field

from hypha.demo.loglines import LogLine
from hypha.demo.nodes import SCHEDULER

TRACEBACK = "Traceback (most recent call last)"
# The report shows the first of them; a process that fails in a loop must not fill memory.
ERRORS_SHOWN_MAX = 50
READY_MESSAGES = frozenset({"Gateway ready", "Serving", "Worker ready"})
WORK_IN_WORDS = {"train": "trains", "aggregate": "serves parameters"}


class Round(Struct, frozen=True):
    """One committed outer step; `loss` is the mean training loss in nats per token, times are in seconds."""

    number: int
    loss: float
    samples: int
    contributors: int
    samples_per_s: float
    train_s: float = 0.0
    merge_s: float = 0.0
    commit_s: float = 0.0


class Finished(Struct, frozen=True):
    """Where the scheduler left the model when the job was done."""

    model_file: str
    job_file: str
    samples: int
    rounds: int


class Progress(Struct):
    """The state of the run. `names` gives a node's name for its peer id."""

    names: Mapping[str, str] = {}
    rounds_wanted: int = 0
    doing: dict[str, str] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    leases: dict[str, str] = field(default_factory=dict)  # lease id -> worker's name
    rounds: list[Round] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)  # round -> nats per token
    samples: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    opened: bool = False  # the first round is: leasing is over
    errors: int = 0
    errors_shown: list[str] = field(default_factory=list)
    failure: str | None = None
    finished: Finished | None = None

    def take(self, line: LogLine) -> str | None:
        """Take in one line; returns a sentence where people should hear of it."""
        self._count(line)
        handler = (_OF_SCHEDULER if line.source == SCHEDULER else _OF_OTHERS).get(line.message)
        if line.message in READY_MESSAGES:
            self.ready.add(line.source)
        return None if handler is None else handler(self, line)

    def lost(self, name: str, how: str) -> str:
        """Count a process that ended though nobody asked it to."""
        self.ready.discard(name)
        self.doing[name] = f"lost ({how})"
        self._error(f"{name}: {how}")
        return f"{name} is lost: {how}"

    @property
    def last_round(self) -> int:
        """How many outer steps are committed."""
        return self.rounds[-1].number if self.rounds else 0

    def latest_loss(self) -> float | None:
        """Return the held-out loss of the newest model that was evaluated."""
        return self.held_out[max(self.held_out)] if self.held_out else None

    def name_of(self, peer: str) -> str:
        """Return the name of a peer, or the end of its id for a stranger."""
        return self.names.get(peer, peer[-8:])

    def _count(self, line: LogLine) -> None:
        failed = line.level == "error" or line.message == "Job failed"
        if failed or line.message.startswith(TRACEBACK) or TRACEBACK in line.text("stack"):
            reason = line.text("reason") or line.text("exception")
            self._error(f"{line.source}: {line.message}" + (f" ({reason})" if reason else ""))

    def _error(self, said: str) -> None:
        self.errors += 1
        if len(self.errors_shown) < ERRORS_SHOWN_MAX:
            self.errors_shown.append(said)


# --- what each message changes ---------------------------------------------------------------------------------------


def _job_started(progress: Progress, line: LogLine) -> str:
    progress.rounds_wanted = int(line.number("rounds")) or progress.rounds_wanted
    progress.doing[SCHEDULER] = "coordinates"
    return f"job {line.text('job_id')}: {progress.rounds_wanted} rounds"


def _dataset_found(progress: Progress, line: LogLine) -> str:
    return f"dataset {line.text('dataset')}: {line.text('slices')} slices, {line.text('samples')} samples to train on"


def _leased(progress: Progress, line: LogLine) -> str | None:
    if not line.text("worker"):
        return None  # another part of the scheduler says the same in its own words
    name, work = progress.name_of(line.text("worker")), line.text("work")
    progress.leases[line.text("lease_id")] = name
    progress.doing[name] = WORK_IN_WORDS.get(work, work)
    return f"{name} is leased at {line.number('price'):g} an hour and {progress.doing[name]}"


def _worker_lost(progress: Progress, line: LogLine) -> str:
    name = progress.leases.pop(line.text("lease_id"), None) or progress.name_of(line.text("worker"))
    return f"the lease of {name} is gone: {line.text('reason')}"


def _round_opened(progress: Progress, line: LogLine) -> None:
    progress.opened = True


def _round_committed(progress: Progress, line: LogLine) -> str:
    seconds = sum(line.number(name) for name in ("train_s", "merge_s", "commit_s"))
    samples = int(line.number("samples"))
    made = Round(
        number=int(line.number("round")),
        loss=line.number("loss"),
        samples=samples,
        contributors=int(line.number("contributors")),
        samples_per_s=samples / seconds if seconds > 0 else 0.0,
        train_s=line.number("train_s"),
        merge_s=line.number("merge_s"),
        commit_s=line.number("commit_s"),
    )
    progress.rounds.append(made)
    progress.samples = int(line.number("samples_total")) or progress.samples + samples
    said = f"round {made.number}/{progress.rounds_wanted}: training loss {made.loss:.3f}, {made.samples} samples"
    return f"{said} of {made.contributors} workers, {made.samples_per_s:.0f} a second"


def _held_out(progress: Progress, line: LogLine) -> str:
    number, loss = int(line.number("round")), line.number("loss")
    progress.held_out[number] = loss
    return f"held-out loss after round {number}: {loss:.3f}"


def _job_finished(progress: Progress, line: LogLine) -> str:
    samples = int(line.number("samples")) or progress.samples
    progress.samples = samples
    rounds = int(line.number("rounds")) or progress.last_round
    progress.finished = Finished(line.text("model_file"), line.text("job_file"), samples, rounds)
    progress.doing[SCHEDULER] = "done"
    return f"job finished: {rounds} rounds, {samples} samples"


def _job_failed(progress: Progress, line: LogLine) -> str:
    progress.failure = line.text("reason") or line.message
    return f"job failed: {progress.failure}"


def _stopped(progress: Progress, line: LogLine) -> None:
    progress.bytes_sent += int(line.number("bytes_sent"))
    progress.bytes_received += int(line.number("bytes_received"))
    progress.doing[line.source] = "stopped"


def _worker_failed(progress: Progress, line: LogLine) -> str:
    return f"a job of {line.source} failed: {line.text('reason')}"


def _becomes(doing: str) -> Callable[[Progress, LogLine], None]:
    def handler(progress: Progress, line: LogLine) -> None:
        progress.doing[line.source] = doing

    return handler


Handler = Callable[[Progress, LogLine], str | None]
_OF_SCHEDULER: dict[str, Handler] = {
    "Job started": _job_started,
    "Dataset found": _dataset_found,
    "Worker leased": _leased,
    "Worker lost": _worker_lost,
    "Round opened": _round_opened,
    "Round committed": _round_committed,
    "Held-out loss": _held_out,
    "Job finished": _job_finished,
    "Job failed": _job_failed,
    "Stopped": _stopped,
}
_OF_OTHERS: dict[str, Handler] = {
    "Gateway ready": _becomes("is where the others meet"),
    "Serving": _becomes("serves the dataset"),
    "Worker ready": _becomes("waits for an offer"),
    "Job ended": _becomes("waits for an offer"),
    "Job failed": _worker_failed,
    "Stopped": _stopped,
}
