"""What processes hold while they run: memory and open files of every incarnation, from when it has settled.

every SAMPLE_S: node or executor ─▶ Life(role, pid): samples by age
settled ── SPAN_S or more ──▶ last: growth of one life ─▶ the largest of its role, and the mean by the hour
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct, field

from tests.chaos.troupe import Node, Running, Use, use_of

SAMPLE_S = 3.0
# Connections, caches and imports have come by then.
SETTLED_S = 40.0
SPAN_S = 30.0
# Of as many samples the median is taken at either end: one may meet a model being read.
AT_EITHER_END = 3
EXECUTOR = "executor"


class Life(Struct):
    """One process: its role, and what it held at which age (seconds) once it had settled."""

    role: str
    samples: list[tuple[float, Use]] = field(default_factory=list)

    @property
    def span_s(self) -> float:
        """How long it was watched."""
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0.0

    def grown(self) -> tuple[float, float]:
        """Return the growth in MB and in open files, from the first samples to the last."""
        first, last = self.samples[:AT_EITHER_END], self.samples[-AT_EITHER_END:]

        def median(uses: list[tuple[float, Use]], name: str) -> float:
            return statistics.median(getattr(use, name) for _, use in uses)

        return (
            median(last, "memory_mb") - median(first, "memory_mb"),
            median(last, "files") - median(first, "files"),
        )


class Growth:
    """Everything that was sampled."""

    def __init__(self) -> None:
        self._lives: dict[tuple[str, int, object], Life] = {}
        self._executors_since: dict[tuple[int, str], float] = {}
        self._next = 0.0

    def look(self, nodes: Iterable[Node], executors: Callable[[], Iterable[Running]], now: float) -> None:
        """Take a sample of all, if it is time; `executors` lists those at work."""
        if now < self._next:
            return
        self._next = now + SAMPLE_S
        for node in nodes:
            if node.runs and not node.stopped and (use := node.use()) is not None:
                self.note(node.role, node.pid, node.started_at, now - node.started_at, use)
        for running in executors():
            since = self._executors_since.setdefault((running.pgid, running.birth), now)
            if (use := use_of(running.pgid)) is not None:
                self.note(f"{running.work} {EXECUTOR}", running.pgid, running.birth, now - since, use)

    def note(self, role: str, pid: int, birth: object, age_s: float, use: Use) -> None:
        """Note what a process of this age holds."""
        if age_s >= SETTLED_S:
            self._lives.setdefault((role, pid, birth), Life(role)).samples.append((age_s, use))

    def summary(self) -> dict[str, Any]:
        """Return, by role: the largest growth of one life, MB per hour over all, and how long they were watched."""
        by_role: dict[str, list[Life]] = defaultdict(list)
        for life in self._lives.values():
            if life.span_s >= SPAN_S:
                by_role[life.role].append(life)
        rows = {role: _row(lives) for role, lives in sorted(by_role.items())}
        return {
            "rss_growth_mb": {role: row["mb"] for role, row in rows.items()},
            "fd_growth": {role: row["files"] for role, row in rows.items()},
            "rss_growth_mb_per_hour": {role: row["mb_per_hour"] for role, row in rows.items()},
            "watched_s": {role: row["watched_s"] for role, row in rows.items()},
        }


def _row(lives: list[Life]) -> dict[str, float]:
    grown = [life.grown() for life in lives]
    watched_s = sum(life.span_s for life in lives)
    return {
        "mb": round(max(mb for mb, _ in grown), 1),
        "files": max(files for _, files in grown),
        "mb_per_hour": round(sum(mb for mb, _ in grown) / watched_s * 3600, 1),
        "watched_s": round(watched_s),
    }
