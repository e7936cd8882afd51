"""The event log of one simulated cluster: messages, what the roles log, what executors do and what is done to nodes.

    fabric events ┐
    role logs     ├─▶ Chronicle.lines      one line each, with its virtual time; the same seed, the same bytes
    executors     │                        no paths of this machine, no object ids
    faults        ┘                        ─▶ counts: faults that struck, rare situations reached

A role's log line is put down under the node that wrote it: tasks inherit `NODE` from whoever started them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import trio

from hypha.network.memory_faults import Event
from hypha.telemetry.logs import FIELDS

NODE: ContextVar[str] = ContextVar("node", default="-")
LOGGER = "hypha"
# Outcomes of messages that the network caused.
STRUCK = ("lost", "cut", "duplicated", "delayed")
# What roles log, and what executors note, when something rare happens.
SITUATIONS = {
    "Lease lost": "lease lost by its holder",
    "Lease not had": "offer not had",
    "Lease expired": "lease expired at its grantor",
    "Offer lapsed": "offer lapsed",
    "Offer not taken": "offer not taken",
    "Worker lost": "worker lost",
    "Executor failed": "executor failed",
    "Job failed": "job failed at a worker",
    "Outer step lost": "outer step lost",
    "Update refused": "update refused",
    "Contribution excluded": "contribution excluded",
    "Close refused": "close refused",
    "Merge not taken": "merge not taken",
    "Base not fetched yet": "base not fetched at first",
    "Update not delivered yet": "update not delivered at first",
    "Outer update not delivered yet": "outer update not delivered at first",
    "Provider failed": "provider failed",
    "No samples": "samples refused",
    "Job not taken": "job not taken",
    "Worker adopted": "lease adopted",
    "Worker not adopted": "lease not adopted",
    "State not fetched yet": "state not fetched at first",
    "Outer update not taken": "outer update not taken",
    "Checkpoint unusable, an older one is tried": "older checkpoint tried",
}
NOTED = (
    ("that the quorum asks", "below the quorum at the deadline"),
    ("are not a step", "only empty contributions"),
    ("Too few workers", "too few workers"),
    ("back to round", "went back to a kept round"),
    ("told to rebase", "rebase"),
    ("sent again", "update sent again"),
    ("restored from round", "parameter server restored"),
    ("leads elsewhere", "update that leads elsewhere"),
)


class Chronicle(logging.Handler):
    """Collects lines and counts; `on_line` is called after each."""

    def __init__(self, root: str) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.faults: Counter[str] = Counter()
        self.said: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.bugs: list[str] = []
        self.warnings: list[str] = []
        self._root = root
        self._watchers: list[Callable[[], None]] = []

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call the watcher after each line."""
        self._watchers.append(watcher)

    def network(self, event: Event) -> None:
        """Put down what happened to a message."""
        if event.outcome in STRUCK:
            self.faults[f"message {event.outcome}"] += 1
        self._put(str(event))

    def note(self, name: str, what: str) -> None:
        """Put down what a node did, or what was done to it."""
        self._put(f"{trio.current_time():.6f} {name} {what}")

    def struck(self, kind: str, name: str, what: str) -> None:
        """Put down a fault, and count it."""
        self.faults[kind] += 1
        self.note(name, f"*** {what}")

    def emit(self, record: logging.LogRecord) -> None:
        """Put down a role's log line; one with a traceback is a bug of ours."""
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, FIELDS, {}).items())
        said = f"{record.levelname} {record.name.removeprefix('hypha.')}: {record.getMessage()} {fields}"
        said = said.replace(self._root, "~").replace("\n", " | ")
        self.said[record.msg] += 1
        if record.levelno >= logging.WARNING:
            self.warnings.append(said)
        if record.exc_info and record.exc_info[1] is not None:
            said += f" !! {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            self.bugs.append(said)
        self._put(f"{trio.current_time():.6f} {NODE.get()} {said}")

    def situations(self) -> Counter[str]:
        """How often rare situations were told of."""
        return self.noted + Counter({name: self.said[message] for message, name in SITUATIONS.items()})

    def _put(self, line: str) -> None:
        self.lines.append(line)
        for words, situation in NOTED:
            if words in line:
                self.noted[situation] += 1
        for watcher in self._watchers:
            watcher()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what the roles log, and let nobody else hear it."""
        logger = logging.getLogger(LOGGER)
        before = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(before[0])
            logger.propagate = before[1]
