"""`make sim-mutants`: defects planted in a copy of the tree, and what catches each; the last line is JSON.

    python -m tests.mutants.main [--seeds 28] [--random 40] [--start 0]   all planted ones, then random ones
    python -m tests.mutants.main --only "stale view accepted" --random 0  one planted defect
    python -m tests.mutants.main --no-planted --random 200                random ones alone

A planted defect meets the simulation and the tests of its module; a random one the tests of its module only. The copy
as it is must pass both first. `--limit` ends it after so many seconds, and what was not tried by then is counted. Exit
code 1: a planted defect was missed, or too many random ones survived.
"""

import argparse
import json
import os
import queue
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from tests.mutants.mutations import Mutation, mutate
from tests.mutants.planted import AUCTION, FENCE, HOLDER, INTERVALS, LEASE, LEASES_AND_SAMPLES, SLICES, Planted
from tests.mutants.planted_rounds import COLLECT, FRAGMENTS, ROUNDS, ROUNDS_AND_STATE, SHARDS, VIEWS
from tests.mutants.scratch import Scratch

T = TypeVar("T")
R = TypeVar("R")

PLANTED = LEASES_AND_SAMPLES + ROUNDS_AND_STATE
# What random mutations strike, each module with its own tests.
MUTATED = {
    "hypha/protocol/lease.py": LEASE,
    "hypha/protocol/holder.py": HOLDER,
    "hypha/protocol/fence.py": FENCE,
    "hypha/protocol/auction.py": AUCTION,
    "hypha/protocol/auction_matching.py": AUCTION,
    "hypha/protocol/auction_scheduler.py": AUCTION,
    "hypha/protocol/auction_worker.py": AUCTION,
    "hypha/protocol/slices.py": SLICES,
    "hypha/protocol/intervals.py": (*INTERVALS, *SLICES),
    "hypha/protocol/fragments.py": FRAGMENTS,
    "hypha/protocol/shards.py": SHARDS,
    "hypha/protocol/views.py": VIEWS,
    "hypha/protocol/servers.py": (*SHARDS, *ROUNDS),
    "hypha/protocol/rounds.py": ROUNDS,
    "hypha/protocol/tally.py": ROUNDS,
    "hypha/protocol/closing.py": (*SHARDS, *ROUNDS),
    "hypha/protocol/collect.py": COLLECT,
    "hypha/protocol/manifest.py": ("tests/protocol/test_manifest.py",),
}
CAUGHT_SHARE_WANTED = 0.85


class Fate(Struct, frozen=True, kw_only=True):
    """What caught a planted defect: a violation of the simulation, a test, both, or nothing."""

    name: str
    simulation: str | None
    tests: str | None


def try_planted(scratch: Scratch, defect: Planted, seeds: int) -> Fate:
    """Plant one defect and let simulation and tests look for it."""
    with scratch.planted(defect.file, defect.applied(scratch.read(defect.file))):
        found = scratch.tests(defect.tests)
        return Fate(name=defect.name, simulation=scratch.simulation(seeds), tests=found)


def draw(scratch: Scratch, number: int) -> Mutation:
    """Return random mutation `number`: the same for the same tree."""
    chance = random.Random(f"mutant:{number}")
    # Longer modules have more to go wrong.
    files = sorted(MUTATED)
    file = chance.choices(files, weights=[len(scratch.read(file)) for file in files])[0]
    return mutate(file, scratch.read(file), chance)


def try_random(scratch: Scratch, mutation: Mutation) -> str | None:
    """Return which test caught a random mutation, or None."""
    with scratch.planted(mutation.file, mutation.text):
        return scratch.tests(MUTATED[mutation.file])


def say(line: str) -> None:
    """Write a line of the protocol at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Bench:
    """Copies of the tree, one for each that works at a time; after `limit_s` nothing more is begun."""

    def __init__(self, directory: Path, jobs: int, *, limit_s: float = float("inf")) -> None:
        self._ends_at = time.monotonic() + limit_s
        self._free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        self._jobs = jobs
        for number in range(jobs):
            self._free.put(Scratch(directory / str(number)))

    def over(self, work: Callable[[Scratch, T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield what `work` finds of each item, in their order, though several are tried at once.

        It ends early where the time does.
        """

        def one(item: T) -> R | None:
            if time.monotonic() > self._ends_at:
                return None
            scratch = self._free.get()
            try:
                return work(scratch, item)
            finally:
                self._free.put(scratch)

        with ThreadPoolExecutor(self._jobs) as pool:
            for found in pool.map(one, items):
                if found is None:
                    return
                yield found

    def is_sound(self, seeds: int, suites: Iterable[tuple[str, ...]]) -> bool:
        """Whether nothing is caught where nothing was planted."""
        wanted = sorted(set(suites))
        checks: list[Callable[[Scratch], str | None]] = [partial(_suite, suite) for suite in wanted]
        if seeds:
            checks.insert(0, lambda scratch: scratch.simulation(seeds))
        failed = [found for found in self.over(lambda scratch, check: check(scratch) or "", checks) if found]
        for found in failed:
            say(f"the tree is broken as it is: {found}")
        return not failed


def _suite(suite: tuple[str, ...], scratch: Scratch) -> str | None:
    return scratch.tests(suite)


def all_planted(bench: Bench, defects: Sequence[Planted], seeds: int) -> list[Fate]:
    """Try every planted defect."""
    fates = []
    for defect, fate in zip(defects, bench.over(partial(_try, seeds), defects), strict=False):
        fates.append(fate)
        say(f"{defect.name} ({defect.file}): {defect.breaks}")
        say(f"    simulation  {fate.simulation or '-'}")
        say(f"    tests       {fate.tests or '-'}")
    return fates


def _try(seeds: int, scratch: Scratch, defect: Planted) -> Fate:
    return try_planted(scratch, defect, seeds)


def all_random(bench: Bench, numbers: Sequence[int]) -> tuple[int, list[str]]:
    """Try random mutations; returns how many were caught, and the diffs of the others that were tried."""
    caught = 0
    survivors: list[str] = []

    def one(scratch: Scratch, number: int) -> tuple[Mutation, str | None]:
        mutation = draw(scratch, number)
        return mutation, try_random(scratch, mutation)

    for number, (mutation, found) in zip(numbers, bench.over(one, numbers), strict=False):
        where = f"random {number}: {mutation.kind} at {mutation.file}:{mutation.line}"
        if found is None:
            survivors.append(f"{where}\n{mutation.diff}")
            say(f"{where} SURVIVED\n{mutation.diff}")
        else:
            caught += 1
            say(f"{where}: {found}")
    return caught, survivors


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.main")
    parser.add_argument("--seeds", type=int, default=28, help="of the simulation, for each planted defect")
    parser.add_argument("--random", type=int, default=40, help="how many random mutations")
    parser.add_argument("--start", type=int, default=0, help="number of the first random mutation")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no other is tried")
    parser.add_argument("--only", action="append", help="name of a planted defect; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="so many at once, each in its own copy")
    parser.add_argument("--no-planted", action="store_true", help="random mutations alone")
    given = parser.parse_args(arguments)
    for name in set(given.only or ()) - {defect.name for defect in PLANTED}:
        parser.error(f"{name} is not planted")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what the arguments name; returns the exit code."""
    given = parsed(arguments)
    chosen = [] if given.no_planted else [p for p in PLANTED if given.only is None or p.name in given.only]
    modules = [p.tests for p in chosen] + (list(MUTATED.values()) if given.random else [])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hypha-mutants-") as directory:
        bench = Bench(Path(directory), given.jobs, limit_s=given.limit)
        if not bench.is_sound(given.seeds if chosen else 0, modules):
            return 2
        fates = all_planted(bench, chosen, given.seeds)
        random_caught, survivors = all_random(bench, range(given.start, given.start + given.random))
    tried = random_caught + len(survivors)
    missed = [fate.name for fate in fates if fate.simulation is None and fate.tests is None]
    summary = {
        "planted": len(fates),
        "caught": len(fates) - len(missed),
        "missed": missed,
        "caught_by_simulation": sum(fate.simulation is not None for fate in fates),
        "random": tried,
        "random_caught": random_caught,
        "survivors": survivors,
        "untried": len(chosen) - len(fates) + given.random - tried,
        "wall_s": round(time.perf_counter() - began, 1),
    }
    say(json.dumps(summary))
    return 1 if missed or random_caught < CAUGHT_SHARE_WANTED * tried else 0


if __name__ == "__main__":
    sys.exit(main())
