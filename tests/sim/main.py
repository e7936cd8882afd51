"""`make sim`: many seeds, each a whole cluster, on all cores; the last line of the output is JSON.

    python -m tests.sim.main --seeds 100 [--start 0] [--jobs 2]   seeds 0 … 99
    python -m tests.sim.main --hours 2 [--start 5000]             as many as fit
    python -m tests.sim.main --seed 17 [--log FILE]               one seed again; its whole event log where it is wanted
    … --flavour duel                                              of these seeds, those of one flavour
    … --require-all                                               a kind of fault or situation not seen is a failure

A seed that breaks an invariant prints its last events, the invariant and the command that replays it. Whatever is
printed is in the order of the seeds, however many run at once.
"""

import argparse
import faulthandler
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from msgspec import Struct

from tests.sim.flavours import FLAVOURS, flavour_of
from tests.sim.kinds import FAULTS, SITUATIONS
from tests.sim.scenario import draw
from tests.sim.simulation import Report, simulate

TRANSCRIPT_LINES = 60
# Real time in which no seed gets stuck unless it never ends: then it is shown where.
STUCK_S = 300.0
# Memory is faster than any disk, and nothing here has to survive.
SHARED_MEMORY = Path("/dev/shm")
# Seeds handed out ahead of the oldest that is not finished, for each process.
AHEAD = 8
SAID_EVERY = 100


def run_seed(seed: int) -> Report:
    """Simulate one seed in a directory of its own."""
    faulthandler.dump_traceback_later(STUCK_S, exit=True, file=sys.__stderr__)
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="hypha-sim-", dir=place) as directory:
        try:
            return simulate(draw(seed), Path(directory))
        finally:
            faulthandler.cancel_dump_traceback_later()


def transcript(report: Report) -> str:
    """What happened last in a seed that broke."""
    seed = report.scenario.seed
    shown = report.lines[-TRANSCRIPT_LINES:]
    head = f"seed {seed} ({report.scenario.flavour}): {len(report.lines)} events, the last {len(shown)}:"
    return "\n".join([head, *shown, f"BROKEN {report.broken}", f"replay: make sim SEED={seed}"])


class Told(Struct, frozen=True, kw_only=True):
    """What is kept of a seed; `transcript` where it broke, `log` where it was wanted."""

    simulated_s: float
    events: int
    faults: dict[str, int]
    situations: dict[str, int]
    transcript: str | None
    log: str = ""


def tell(seed: int, *, wants_log: bool = False) -> Told:
    """Run a seed and return what is kept of it."""
    report = run_seed(seed)
    return Told(
        simulated_s=report.simulated_s,
        events=len(report.lines),
        faults=report.faults,
        situations=report.situations,
        transcript=transcript(report) if report.broken is not None else None,
        log="".join(f"{line}\n" for line in report.lines) if wants_log else "",
    )


def tell_all(seeds: Iterable[int], jobs: int) -> Iterator[Told]:
    """Run seeds, `jobs` at once, and yield them in their order."""
    if jobs == 1:
        yield from map(tell, seeds)
        return
    # A process begun anew has no threads, locks or signal handlers of this one.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        running: deque[Future[Told]] = deque()
        for seed in seeds:
            running.append(pool.submit(tell, seed))
            if len(running) >= AHEAD * jobs:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Leave nothing behind where the process that wants the results is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    threading.Thread(target=_outlive, args=(parent.sentinel,), daemon=True).start()


def _outlive(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def until(seeds: Iterable[int], hours: float) -> Iterator[int]:
    """Yield seeds until so many hours of real time have passed."""
    over = time.perf_counter() + 3600 * hours
    return itertools.takewhile(lambda _: time.perf_counter() < over, seeds)


class Summary:
    """What all seeds came to."""

    def __init__(self) -> None:
        self.seeds = self.events = self.violations = 0
        self.simulated_s = 0.0
        self.faults: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
        self.situations: Counter[str] = Counter(dict.fromkeys(SITUATIONS, 0))
        self._began = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Real seconds since it began."""
        return round(time.perf_counter() - self._began, 2)

    def add(self, told: Told) -> None:
        """Count one seed, and print it where it broke."""
        self.seeds += 1
        self.events += told.events
        self.simulated_s += told.simulated_s
        self.faults.update(told.faults)
        self.situations.update(told.situations)
        if told.transcript is not None:
            self.violations += 1
            sys.stdout.write(told.transcript + "\n\n")
            sys.stdout.flush()
        if self.seeds % SAID_EVERY == 0:
            sys.stderr.write(f"{self.seeds} seeds, {self.violations} violations, {self.wall_s:.0f} s\n")

    def unseen(self) -> list[str]:
        """Kinds of faults and situations that no seed had."""
        return [
            name for counts in (self.faults, self.situations) for name, count in sorted(counts.items()) if not count
        ]

    def line(self) -> str:
        """The last line of the output."""
        return json.dumps(
            {
                "seeds": self.seeds,
                "simulated_s": round(self.simulated_s, 1),
                "events": self.events,
                "faults": dict(sorted(self.faults.items())),
                "situations": dict(sorted(self.situations.items())),
                "violations": self.violations,
                "wall_s": self.wall_s,
            }
        )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.main")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--hours", type=float, help="so long instead of so many")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--flavour", choices=FLAVOURS, help="only those of one flavour")
    parser.add_argument("--log", type=Path, help="with --seed: write its event log there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="so many at once")
    parser.add_argument(
        "--require-all", action="store_true", help="fail where a kind of fault or situation is not seen"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that the arguments name; returns the exit code."""
    given, summary, interrupted = parsed(arguments), Summary(), False
    if given.seed is not None:
        told = tell(given.seed, wants_log=given.log is not None)
        if given.log is not None:
            given.log.write_text(told.log)
        summary.add(told)
    else:
        seeds: Iterable[int] = itertools.count(given.start)
        if not given.hours:
            seeds = range(given.start, given.start + given.seeds)
        if given.flavour is not None:
            seeds = (seed for seed in seeds if flavour_of(seed) == given.flavour)
        try:
            for told in tell_all(until(seeds, given.hours) if given.hours else seeds, given.jobs):
                summary.add(told)
        except KeyboardInterrupt:
            interrupted = True
            sys.stderr.write("interrupted: this is what was seen so far\n")
    unseen = summary.unseen() if given.require_all else []
    for name in unseen:
        sys.stdout.write(f"not seen: {name}\n")
    sys.stdout.write(summary.line() + "\n")
    return 1 if summary.violations or unseen or interrupted else 0


if __name__ == "__main__":
    # Whoever ends it learns what was seen so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
