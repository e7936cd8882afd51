"""`make sim`: many seeds, each a whole cluster; the last line of the output is JSON.

    python -m tests.sim.main --seeds 100 [--start 0]        seeds 0 … 99
    python -m tests.sim.main --seed 17 [--log FILE]         one seed again; its whole event log where it is wanted

A seed that breaks an invariant prints its last events, the invariant and the command that replays it.
"""

import argparse
import faulthandler
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.sim.cluster import Report, simulate
from tests.sim.scenario import draw

TRANSCRIPT_LINES = 60
# Real time in which no seed gets stuck unless it never ends: then it is shown where.
STUCK_S = 120.0
# Memory is faster than any disk, and nothing here has to survive.
SHARED_MEMORY = Path("/dev/shm")


def run_seed(seed: int) -> Report:
    """Simulate one seed in a directory of its own."""
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.main")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--log", type=Path, help="write the event log of the last seed there")
    given = parser.parse_args(arguments)
    seeds = range(given.start, given.start + given.seeds) if given.seed is None else [given.seed]
    began = time.perf_counter()
    events, violations, simulated_s = 0, 0, 0.0
    faults: Counter[str] = Counter()
    situations: Counter[str] = Counter()
    for seed in seeds:
        report = run_seed(seed)
        events += len(report.lines)
        simulated_s += report.simulated_s
        faults.update(report.faults)
        situations.update(report.situations)
        if given.log is not None:
            given.log.write_text("\n".join(report.lines) + "\n")
        if report.broken is not None:
            violations += 1
            sys.stdout.write(transcript(report) + "\n\n")
    summary = {
        "seeds": len(seeds),
        "simulated_s": round(simulated_s, 1),
        "events": events,
        "faults": dict(sorted(faults.items())),
        "situations": dict(sorted(situations.items())),
        "violations": violations,
        "wall_s": round(time.perf_counter() - began, 2),
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
