"""Held-out loss and bytes of every way to train the same model on the same text: one factor at a time.

    data-parallel AdamW · plain DiLoCo · then codec, fragments, workers, H, outer optimizer      (convergence_runs)

Plain DiLoCo and each codec run with three seeds, which change the first weights and the order of the text: what is
judged is the difference of the means beside two standard deviations of plain DiLoCo's own seeds. Bytes ratios at
H = 500 are arithmetic: the size of a coded update follows from its codec. Progress goes to standard error.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import msgspec

from benchmarks.codecs import ratio
from benchmarks.convergence_runs import BATCH, BATCHES, SEQUENCE, Outcome, Spec, train
from benchmarks.report import Figure, print_report
from hypha.dataset_tool import prepare
from hypha.demo.corpus import standard_library
from hypha.protocol.compression import Coding

SEEDS = (0, 1, 2)
INT8, INT4, TOPK = Coding(codec="int8"), Coding(codec="int4"), Coding(codec="topk")
PLAIN, PARALLEL, PATIENT = "plain DiLoCo", "data-parallel AdamW", "plain DiLoCo, momentum 0"
# Plain DiLoCo with two workers may cost this much of the loss that data-parallel reaches on the same tokens.
LOSS_RATIO_WANTED = 1.05
# top-k brings what it sends late several rounds in a row, which is a momentum by itself: it is judged beside plain
# DiLoCo with the same outer optimizer (docs/explanation/compression.md).
CODECS = {"int8": (INT8, PLAIN, 1_900.0), "int4": (INT4, PLAIN, 3_700.0), "topk": (TOPK, PATIENT, 10_000.0)}
NO_MOMENTUM = {"learning_rate": 1.0, "momentum": 0.0}


def specs() -> list[Spec]:
    """Return every run, the ones that others are compared with first."""
    runs = [Spec(name=PLAIN, seed=seed) for seed in SEEDS]
    runs += [Spec(name=PARALLEL, seed=seed, inner_steps=0) for seed in SEEDS]
    for name, coding in (("int8", INT8), ("int4", INT4)):
        runs += [Spec(name=name, seed=seed, upward=coding, downward=coding) for seed in SEEDS]
    runs += [Spec(name=PATIENT, seed=seed, **NO_MOMENTUM) for seed in SEEDS]
    runs += [Spec(name="topk", seed=seed, upward=TOPK, downward=TOPK, **NO_MOMENTUM) for seed in SEEDS]
    runs += [Spec(name=f"{count} workers", workers=count) for count in (4, 8)]
    runs += [Spec(name=f"H = {steps}", inner_steps=steps) for steps in (10, 100)]
    runs.append(Spec(name="outer 0.7, momentum 0.9", learning_rate=0.7, momentum=0.9))
    runs.append(Spec(name="2 fragments", fragments=2))
    runs.append(Spec(name="2 fragments, overlap 5, mixing 0.5", fragments=2, overlap=5, mixing=0.5))
    runs.append(Spec(name="2 fragments, int4", fragments=2, upward=INT4, downward=INT4))
    return runs


def run_all(directory: Path, processes: int) -> list[Outcome]:
    """Run everything, several at a time, in the order of `specs`."""
    wanted, began = specs(), time.perf_counter()
    found: dict[Spec, Outcome] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, spec, directory) for spec in wanted]):
            outcome = future.result()
            found[outcome.spec] = outcome
            said = f"{len(found)}/{len(wanted)} {outcome.spec.name}, seed {outcome.spec.seed}: loss {outcome.loss}"
            print(f"{time.perf_counter() - began:6.0f} s  {said}", file=sys.stderr, flush=True)
    return [found[spec] for spec in wanted]


class Row(msgspec.Struct, frozen=True):
    """One line of the table; `ratio` compares bytes both ways with fp32 data-parallel by ring all-reduce."""

    name: str
    workers: int
    inner_steps: int
    losses: tuple[float, ...]
    mean: float
    deviation: float | None
    up: float
    down: float
    ratio: float


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """Gather seeds."""
    gathered: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        gathered.setdefault(outcome.spec.name, []).append(outcome)
    ring = 2 * gathered[PARALLEL][0].up
    rows = []
    for name, several in gathered.items():
        spec, first = several[0].spec, several[0]
        losses = tuple(one.loss for one in several)
        deviation = round(statistics.stdev(losses), 4) if len(losses) > 1 else None
        all_reduce = ring * 2 * (spec.workers - 1) / spec.workers  # of as many workers; with two it is `ring`
        rows.append(
            Row(
                name,
                spec.workers,
                spec.inner_steps,
                losses,
                round(statistics.mean(losses), 4),
                deviation,
                first.up,
                first.down,
                round(all_reduce / (first.up + first.down), 1),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Return it as the documentation shows it."""
    lines = [
        "| run | workers | H | held-out loss | two standard deviations | bytes per token up, down | × data-parallel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row.deviation is None else f"{2 * row.deviation:.3f}"
        steps = row.inner_steps or "–"
        sent = f"{row.up:.2f}, {row.down:.2f}"
        lines.append(
            f"| {row.name} | {row.workers} | {steps} | {row.mean:.3f} | {spread} | {sent} | {row.ratio:,.0f} |"
        )
    return "\n".join(lines)


def figures_of(rows: list[Row]) -> list[Figure]:
    """Return what is wanted of the rows."""
    by_name = {row.name: row for row in rows}
    plain, parallel = by_name[PLAIN], by_name[PARALLEL]
    figures = [
        Figure("plain_to_data_parallel_loss", round(plain.mean / parallel.mean, 4), LOSS_RATIO_WANTED, "lower", "ratio")
    ]
    for name, (coding, beside, ratio_wanted) in CODECS.items():
        reference = by_name[beside]
        assert reference.deviation is not None
        worse = round(by_name[name].mean - reference.mean, 4)
        figures += [
            Figure(f"{name}_loss_above_plain", worse, round(2 * reference.deviation, 4), "lower", "nats per byte"),
            Figure(f"{name}_bytes_ratio_at_500", round(ratio(coding, coding)), ratio_wanted, "higher", "ratio"),
        ]
    return figures


def main() -> None:
    """Train everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as folder:
        directory = Path(folder) / "text"
        prepare(
            [Path(path) for path in standard_library().sources],
            directory,
            name="text",
            sequence_length=SEQUENCE,
            slice_bytes=1 << 20,
            held_out=0.05,
            seed=0,
            max_bytes=None,
            digest="sha256",
            force=False,
        )
        rows = rows_of(run_all(directory, arguments.processes))
    print(table(rows), file=sys.stderr)
    detail = {
        "tokens": BATCHES * BATCH * SEQUENCE,
        "rows": rows,
        "bytes_ratios_at_500": "arithmetic",
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "load": os.getloadavg(),
    }
    print_report("convergence", figures_of(rows), detail)


if __name__ == "__main__":
    main()
