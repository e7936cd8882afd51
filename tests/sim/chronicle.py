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
from tests.sim.kinds import NOTED, SAID

NODE: ContextVar[str] = ContextVar("node", default="-")
LOGGER = "hypha"
# Outcomes of messages that the network caused.
STRUCK = ("lost", "cut", "duplicated", "delayed")


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
        self._put_words(f"{trio.current_time():.6f} {name} {what}")

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
        self._put_words(f"{trio.current_time():.6f} {NODE.get()} {said}")

    def situations(self) -> Counter[str]:
        """How often rare situations were told of."""
        return self.noted + Counter({name: self.said[message] for message, name in SAID.items()})

    def _put_words(self, line: str) -> None:
        for words, situation in NOTED.items():
            if words in line:
                self.noted[situation] += 1
        self._put(line)

    def _put(self, line: str) -> None:
        self.lines.append(line)
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
