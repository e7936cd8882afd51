"""How soon a dead trainer's replacement trains: workers are killed one after another, and logs say where time went.

    python -m tests.chaos.replacement --times 5 [--language] [--warm]

    lease over ─ask─▶ leased ─dispatch─▶ started ─import─▶ executor ─model─▶ built ─base─▶ stands ─step─▶ trains

`ask` is the auction with its first renewals and the lease in the journal, `import` the interpreter with torch and what
else an executor needs. The last line of standard output is JSON: medians and the largest, in seconds.
"""

import argparse
import datetime as dt
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import trio

from hypha.demo.loglines import LogFile, LogLine
from tests.chaos import cast, troupe
from tests.chaos.cast import CHAOS, SCHEDULERS, Job
from tests.chaos.troupe import Node, guarded
from tests.e2e.programs import inhabitants

PHASES = ("ask", "dispatch", "import", "model", "base", "step")
MARKS = ("Job started", "Executor started", "Model built", "Base fetched", "First inner step")
ROUNDS = 100_000
PATIENCE_S = 120.0
POLL_S = 0.05
# Who came back is known to the others by then.
SETTLE_S = 5.0
# A spare that took no processor time for so long has imported everything.
IDLE_S = 3.0
END_S = 10.0


class NotReplaced(Exception):
    """Nobody took a dead worker's place in time."""


class Watch:
    """One strike: what the logs say from then on."""

    def __init__(self, directory: Path, victim: str) -> None:
        self._directory = directory
        self._victim = victim
        self._since = {path: len(list(LogFile(path).news())) for path in (directory / "logs").glob("*.log")}
        self._peer = next(line.text("peer_id") for line in self._log(victim) if line.message == "Listening")

    def replaced(self) -> dict[str, float] | None:
        """Return the seconds of each phase once the replacement has taken its first step."""
        told = list(self._news(cast.title(SCHEDULERS[0], CHAOS)))
        lost = [at(line) for line in told if line.message == "Worker lost" and line.text("worker") == self._peer]
        started = {
            line.text("lease_id"): (name, at(line))
            for name in cast.WORKERS
            for line in self._news(name)
            if line.message == "Job started"
        }
        # On a busy machine the first that is leased may be lost before it trains.
        for line in told:
            lease_id = line.text("lease_id")
            if lost and line.message == "Worker leased" and line.text("work") == "train" and lease_id in started:
                name, began = started[lease_id]
                if (phases := self._phases(name, [lost[0], at(line), began])) is not None:
                    return phases
        return None

    def _phases(self, name: str, times: list[float]) -> dict[str, float] | None:
        logs = (self._directory / "work" / name).glob("hypha-*/executor.log")
        marks = {line.message: at(line) for path in logs for line in LogFile(path).news()}
        if MARKS[-1] not in marks:
            return None
        times += [marks[mark] for mark in MARKS[1:]]
        return {phase: after - before for phase, before, after in zip(PHASES, times, times[1:], strict=False)}

    def _log(self, name: str) -> Iterator[LogLine]:
        return LogFile(self._directory / "logs" / f"{name}.log").news()

    def _news(self, name: str) -> Iterable[LogLine]:
        path = self._directory / "logs" / f"{name}.log"
        return list(LogFile(path).news())[self._since.get(path, 0) :]


def at(line: LogLine) -> float:
    """Return when a line was written, in seconds of the machine's clock."""
    return dt.datetime.fromisoformat(line.text("timestamp")).timestamp()


async def measure(directory: Path, job: Job, times: int) -> list[dict[str, float]]:
    """Kill so many trainers, one after another; returns the phases of each replacement. Raises NotReplaced."""
    cast.prepare(directory, job, seed=0)
    with guarded() as group:
        nodes = {name: Node(name, directory, group, CHAOS) for name in cast.ROLES if name != SCHEDULERS[1]}
        try:
            for node in nodes.values():
                node.start()
            found = []
            for _ in range(times):
                found.append(await _strike(directory, nodes))
                sys.stderr.write(json.dumps(rounded(found[-1])) + "\n")
            return found
        finally:
            for node in nodes.values():
                if node.process is not None:
                    node.end(END_S)
            for process in inhabitants(directory):
                process.kill()


async def _strike(directory: Path, nodes: dict[str, Node]) -> dict[str, float]:
    with trio.move_on_after(PATIENCE_S):
        while len(training := _training(directory)) < cast.TRAINERS:  # noqa: ASYNC110 - other processes set no event
            await trio.sleep(POLL_S)
        await trio.sleep(SETTLE_S)
        await _warmed(directory)
        victim = training[0].worker
        watch = Watch(directory, victim)
        nodes[victim].kill()
        while (phases := watch.replaced()) is None:  # noqa: ASYNC110 - log files set no event
            await trio.sleep(POLL_S)
        nodes[victim].start()
        return phases
    raise NotReplaced(f"within {PATIENCE_S:g} s")


async def _warmed(directory: Path) -> None:
    """Return once every spare has imported what it is to import."""
    before: dict[int, float] | None = None
    while (now := {spare.pgid: _processor_s(spare.pgid) for spare in troupe.spares(directory)}) != before:
        before = now
        await trio.sleep(IDLE_S)


def _processor_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _training(directory: Path) -> list[troupe.Running]:
    """Return the executors that have taken a step."""
    found = []
    for running in troupe.executors(directory):
        logs = (directory / "work" / running.worker).glob("hypha-*/executor.log")
        if any(line.message == MARKS[-1] for path in logs for line in LogFile(path).news()):
            found.append(running)
    return found


def summary(found: Sequence[dict[str, float]], job: Job) -> dict[str, Any]:
    """Return medians and the largest of each phase and of the whole."""
    wholes = [sum(phases.values()) for phases in found]
    return {
        "times": len(found),
        "language": job.language,
        "warm": bool(job.warm),
        "median_s": rounded({phase: statistics.median(each[phase] for each in found) for phase in PHASES}),
        "max_s": rounded({phase: max(each[phase] for each in found) for phase in PHASES}),
        "trains_after_s": rounded({"median": statistics.median(wholes), "max": max(wholes)}),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Round to hundredths of a second."""
    return {name: round(value, 2) for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.replacement")
    parser.add_argument("--times", type=int, default=5, help="how many workers are killed")
    parser.add_argument("--language", action="store_true", help="a transformers model instead of a plain module")
    parser.add_argument("--warm", action="store_true", help="every worker keeps a warm executor")
    parser.add_argument("--dir", type=Path, help="a new directory that stays; default: one that goes")
    given = parser.parse_args(arguments)
    directory = (given.dir or Path(tempfile.mkdtemp(prefix="hypha-replacement-"))).resolve()
    directory.mkdir(exist_ok=True)
    job = Job(rounds=ROUNDS, language=given.language, warm=cast.WORKERS if given.warm else ())
    try:
        found = trio.run(measure, directory, job, given.times)
    finally:
        if given.dir is None:
            shutil.rmtree(directory)
    sys.stdout.write(json.dumps(summary(found, job)) + "\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
