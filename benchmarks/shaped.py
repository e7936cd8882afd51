"""How much of their time executors train behind a slow link: data-parallel, DiLoCo, and DiLoCo in fragments of int4.

    gateway, data node, scheduler ── bridge ──┬── tbf ── worker-0, serves parameters        real processes and
                                              ├── tbf ── worker-1, trains                   certificates, real forward
                                              └── tbf ── worker-2, trains                   and backward passes

    utilisation = time in forward + backward + optimizer ÷ all of the executor's time, over whole rounds

What is scaled: the reference is 1e9 parameters in fp32 (4 GB) on 500 Mbit/s (62.5 MB/s), 64 s for the whole model, and
1 s for an inner step, which is one H100 at 400 TFLOP/s (40 % of its peak) with 65 536 tokens: 6 · 1e9 · 65 536 FLOP.
So moving the model once in fp32 takes as long as 64 inner steps, here as there: link = 4 · parameters ÷ (64 · step).
The step is measured while the job runs and the links follow it, since other processes want the processor, too.

Data-parallel by arithmetic: a ring all-reduce of fp32 moves 2(N-1)/N models over each link for every inner step.
`--variants`, `--scale` (of the rounds in fragments), `--repetitions` of what a figure is wanted for. Needs root.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from benchmarks import shaped_links
from benchmarks.report import Figure, print_report
from benchmarks.shaped_links import Links
from benchmarks.shaped_nodes import TRAINERS, Variant, prepare, running
from benchmarks.shaped_shares import noted, over, parameters, report, step_s

WANTED_PERCENT = 94.5
REFERENCE_BYTES, REFERENCE_BYTES_PER_S, REFERENCE_STEP_S = 4e9, 500e6 / 8, 1.0
# Inner steps for which the whole model in fp32 is on its way.
MODEL_STEPS = REFERENCE_BYTES / REFERENCE_BYTES_PER_S / REFERENCE_STEP_S
# H, and in how many parts: the same H between two synchronisations of a tensor.
STEPS, FRAGMENTS, OVERLAP = 100, 4, 10
# Outer steps of a run in fragments: each fragment has its turn twice; and of what is run for comparison, once and more.
ROUNDS, ROUNDS_BLOCKING = 8, 5
PLAIN, BLOCKING, OVERLAPPED = "diloco", "fragments-int4", "fragments-int4-overlap"
REPETITIONS = 3
LOOK_S = 0.5
RUN_S = 900.0
# The step that links follow is the median of so many; they begin to once every trainer has taken a few.
LATEST_STEPS, STEPS_FIRST = 32, 4
# Smaller differences are not worth a change.
TOLERANCE = 0.05


def variants(scale: float) -> dict[str, Variant]:
    """Return what is compared, by name."""
    part, rounds, fewer = STEPS // FRAGMENTS, max(3, round(ROUNDS * scale)), max(3, round(ROUNDS_BLOCKING * scale))
    found = (
        Variant(name=PLAIN, steps=STEPS, rounds=2),
        Variant(name=BLOCKING, steps=part, rounds=fewer, codec="int4", fragments=FRAGMENTS),
        Variant(name=OVERLAPPED, steps=part, rounds=rounds, codec="int4", fragments=FRAGMENTS, overlap=OVERLAP),
    )
    return {variant.name: variant for variant in found}


def data_parallel_percent(workers: int) -> float:
    """Return the utilisation of training that reduces all gradients after every step, before the next."""
    return 100 / (1 + MODEL_STEPS * 2 * (workers - 1) / workers)


def play(variant: Variant, keep: Path | None) -> dict[str, object]:
    """Run a job to its end; returns what its executors' time went to. Raises RuntimeError where it failed."""
    with ExitStack() as stack:
        path = tempfile.mkdtemp(dir=keep) if keep else stack.enter_context(tempfile.TemporaryDirectory())
        links = stack.enter_context(shaped_links.links(TRAINERS + 1))
        directory = Path(path)
        roles = prepare(directory, variant)
        with running(directory, roles) as scheduler:
            code = _shape(scheduler, variant, directory / "notes", links)
        if code:
            text = (directory / "scheduler.log").read_text()[-2000:]
            raise RuntimeError(f"{variant.name}: the scheduler ended with {code}:\n{text}")
        return report(variant, noted(directory / "notes"), links.counted)


def _shape(scheduler: subprocess.Popen[bytes], variant: Variant, notes: Path, links: Links) -> int:
    """Let the links follow the processor until the job is over; returns the scheduler's exit code."""
    until = time.monotonic() + RUN_S
    while time.monotonic() < until:
        try:
            return scheduler.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            links.count()
        workers = noted(notes)
        if over(variant, workers):  # what is left is the last checkpoint, which nobody trains beside
            links.slow_down(shaped_links.OPEN_BYTES_PER_S)
            return scheduler.wait(RUN_S)
        seconds = step_s(workers, LATEST_STEPS, STEPS_FIRST)
        if seconds is not None:
            wanted = 4 * parameters(workers) / (MODEL_STEPS * seconds)
            if abs(wanted / links.bytes_per_s - 1) > TOLERANCE:
                links.slow_down(wanted)
    raise RuntimeError(f"the job is not over after {RUN_S:g} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 2 where links cannot be made."""
    parser = argparse.ArgumentParser(description="Utilisation of executors behind slow links.")
    parser.add_argument("--variants", default=",".join(variants(1.0)))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--keep", type=Path, help="leave configurations, logs and notes in this directory")
    given = parser.parse_args(arguments)
    fault = shaped_links.fault()
    if fault is not None:
        print(f"BENCH=shaped {fault}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _leave)
    found: dict[str, list[dict[str, object]]] = {}
    for name in given.variants.split(","):
        for _ in range(given.repetitions if name == OVERLAPPED else 1):
            found.setdefault(name, []).append(play(variants(given.scale)[name], given.keep))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    detail = {
        "data_parallel_percent_by_arithmetic": round(data_parallel_percent(TRAINERS), 2),
        "steps_to_move_the_model_wanted": MODEL_STEPS,
        "inner_steps": {variant.name: variant.steps for variant in variants(given.scale).values()},
        **found,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    got = [float(str(each["utilisation_percent"])) for each in found.get(OVERLAPPED, [])]
    name = "compute utilisation with fragments, int4 and overlap"
    figures = [Figure(name, statistics.median(got), WANTED_PERCENT, "higher", "%")] if got else []
    print_report("shaped", figures, {"spread_percent": round(max(got) - min(got), 2) if got else None, **detail})
    return 0


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Leave as after Ctrl-C: processes end and namespaces go."""
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
