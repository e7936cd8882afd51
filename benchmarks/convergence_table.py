"""What the convergence benchmark runs, and how its outcomes become a table and figures: one factor at a time.

    specs ─▶ convergence_runs.train ─▶ outcomes ─▶ rows_of: seeds gathered ─▶ table, figures_of

A codec is judged by the difference of the means of three seeds beside two standard deviations of the same run without
it: same H, tokens and outer optimizer. Bytes ratios at H = 500 are arithmetic: the size of a coded update follows from
its codec.
"""

import statistics
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.codecs import ratio
from benchmarks.convergence_runs import BATCHES, Outcome, Spec
from benchmarks.report import Figure
from hypha.protocol.compression import Coding

SEEDS = (0, 1, 2)
INT8, INT4 = Coding(codec="int8"), Coding(codec="int4")
# As docs/explanation/compression.md recommends: more on the way down, where the choices of all workers meet.
TOPK_UP, TOPK_DOWN = Coding(codec="topk", density=0.03), Coding(codec="topk", density=0.1)
TOPK_NARROW = Coding(codec="topk", density=0.02)
# An element waits some 1/density rounds for its turn: with topk a run needs outer steps well beyond that.
LONG = 4 * BATCHES
# Plain DiLoCo with two workers may cost this much of the loss that data-parallel reaches on the same tokens.
LOSS_RATIO_WANTED = 1.05
NO_MOMENTUM: dict[str, Any] = {"learning_rate": 1.0, "momentum": 0.0}
# For top-k: its feedback acts as momentum, and a larger outer learning rate makes up for what waits.
EAGER: dict[str, Any] = {"learning_rate": 1.4, "momentum": 0.0}
OVERLAPPED: dict[str, Any] = {"fragments": 2, "overlap": 10, "mixing": 0.5}

PARALLEL, PLAIN, PATIENT = "data-parallel AdamW", "plain DiLoCo", "plain DiLoCo, momentum 0"
OFTEN, TOPK = "H = 10, 4 × the tokens", "topk, H = 10, 4 × the tokens"
# codec ─▶ its run, coding up, coding down, the run that it is judged beside, bytes ratio wanted at H = 500
JUDGED = {
    "int8": ("int8", INT8, INT8, PLAIN, 1_900.0),
    "int4": ("int4", INT4, INT4, PLAIN, 3_700.0),
    "topk": (TOPK, TOPK_UP, TOPK_DOWN, OFTEN, 10_000.0),
}


def specs(*, everything: bool) -> list[Spec]:
    """Return the runs, the ones that others are compared with first; `everything`: those that add detail, too."""
    topk: dict[str, Any] = {"upward": TOPK_UP, "downward": TOPK_DOWN, **EAGER}
    runs = [*_seeded(PARALLEL, inner_steps=0), *_seeded(PLAIN)]
    for name, coding in (("int8", INT8), ("int4", INT4)):
        runs += _seeded(name, upward=coding, downward=coding)
    runs += [*_seeded(PATIENT, **NO_MOMENTUM), *_seeded("topk", **topk)]
    runs.append(Spec(name="outer 0.7, momentum 0.9", learning_rate=0.7, momentum=0.9))
    runs += [Spec(name=f"H = {steps}", inner_steps=steps) for steps in (10, 100)]
    runs.append(Spec(name="H = 10, momentum 0", inner_steps=10, **NO_MOMENTUM))
    for count in (4, 8):
        runs.append(Spec(name=f"{PARALLEL}, {count} workers", inner_steps=0, workers=count))
        runs.append(Spec(name=f"{count} workers", workers=count))
    runs.append(Spec(name="2 fragments", fragments=2))
    runs.append(Spec(name="2 fragments, overlap 10, mixing 0.5", **OVERLAPPED))
    runs.append(Spec(name="2 fragments, overlap 10, mixing 0.5, int4", upward=INT4, downward=INT4, **OVERLAPPED))
    runs.append(Spec(name=f"{PARALLEL}, 4 × the tokens", inner_steps=0, batches=LONG))
    runs.append(Spec(name="momentum 0, 4 × the tokens", batches=LONG, **NO_MOMENTUM))
    runs += [*_seeded(OFTEN, inner_steps=10, batches=LONG)]
    runs += [*_seeded(TOPK, inner_steps=10, batches=LONG, **topk)]
    return runs + (_details(topk) if everything else [])


def _details(topk: dict[str, Any]) -> list[Spec]:
    narrow = {**topk, "upward": TOPK_NARROW, "downward": TOPK_NARROW}
    runs = [
        Spec(name="topk, 2 % both ways", **narrow),
        Spec(name="H = 10, outer 1.4, momentum 0", inner_steps=10, **EAGER),
        Spec(name="topk, H = 10", inner_steps=10, **topk),
        Spec(name="topk, H = 10, outer 1.0", inner_steps=10, **{**topk, **NO_MOMENTUM}),
        Spec(name="topk, H = 10, 3 % both ways", inner_steps=10, **{**topk, "downward": TOPK_UP}),
        Spec(name="topk, H = 10, pseudo-gradients only", inner_steps=10, **{**topk, "downward": Coding()}),
    ]
    runs += _seeded("H = 10, momentum 0, 4 × the tokens", inner_steps=10, batches=LONG, **NO_MOMENTUM)
    return runs


def _seeded(name: str, **factors: Any) -> list[Spec]:  # noqa: ANN401 - any field of Spec
    return [Spec(name=name, seed=seed, **factors) for seed in SEEDS]


class Row(Struct, frozen=True):
    """One line of the table, of all seeds of one name. Bytes as in Outcome; `ratio` compares them, both ways together,
    with fp32 data-parallel by ring all-reduce; `beside` is its loss with as many workers and tokens, of those of the
    seeds that were run.
    """

    spec: Spec
    losses: tuple[float, ...]
    mean: float
    deviation: float | None
    up: float
    down: float
    ratio: float
    beside: float | None


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """Gather seeds, in the order of the outcomes."""
    gathered: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        gathered.setdefault(outcome.spec.name, []).append(outcome)
    parallel = {_kind(runs[0].spec): runs for runs in gathered.values() if not runs[0].spec.inner_steps}
    return [_row(runs, parallel) for runs in gathered.values()]


def _kind(spec: Spec) -> tuple[int, int]:
    return spec.workers, spec.batches


def _row(runs: list[Outcome], parallel: dict[tuple[int, int], list[Outcome]]) -> Row:
    spec, losses = runs[0].spec, tuple(run.loss for run in runs)
    with_two = parallel[2, BATCHES][0]
    # with two workers a ring moves each byte once each way; with N workers 2(N-1)/N times
    ring = (with_two.up + with_two.down) * 2 * (spec.workers - 1) / spec.workers
    seeds = {run.spec.seed for run in runs}
    beside = [run.loss for run in parallel.get(_kind(spec), ()) if run.spec.seed in seeds]
    return Row(
        spec=msgspec.structs.replace(spec, seed=0),
        losses=losses,
        mean=round(statistics.mean(losses), 4),
        deviation=round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
        up=runs[0].up,
        down=runs[0].down,
        ratio=round(ring / (runs[0].up + runs[0].down), 1),
        beside=round(statistics.mean(beside), 4) if beside else None,
    )


def table(rows: list[Row]) -> str:
    """Return it as the documentation shows it."""
    lines = [
        "| run | workers | H | outer steps | seeds | held-out loss | 2 SD | × data-parallel's loss "
        "| bytes per token up, down | data-parallel's bytes × |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spec = row.spec
        cells = [
            spec.name,
            spec.workers,
            spec.inner_steps or "–",
            spec.outer_steps or "–",
            len(row.losses),
            f"{row.mean:.3f}",
            "" if row.deviation is None else f"{2 * row.deviation:.3f}",
            "" if row.beside is None else f"{row.mean / row.beside:.3f}",
            f"{row.up:.2f}, {row.down:.2f}",
            f"1/{row.ratio:,.0f}" if spec.inner_steps else "1",
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def figures_of(rows: list[Row]) -> list[Figure]:
    """Return what is wanted of the rows."""
    by_name = {row.spec.name: row for row in rows}
    figures = [
        Figure(
            figure, round(by_name[name].mean / (by_name[name].beside or 1.0), 4), LOSS_RATIO_WANTED, "lower", "ratio"
        )
        for figure, name in (
            ("plain_to_data_parallel_loss_16_outer_steps", PLAIN),
            ("plain_to_data_parallel_loss_64_outer_steps", "momentum 0, 4 × the tokens"),
            ("plain_to_data_parallel_loss_320_outer_steps", OFTEN),
        )
    ]
    for codec, (name, upward, downward, beside, wanted) in JUDGED.items():
        reference = by_name[beside]
        assert reference.deviation is not None
        worse = round(by_name[name].mean - reference.mean, 4)
        figures += [
            Figure(f"{codec}_loss_above_plain", worse, round(2 * reference.deviation, 4), "lower", "nats per byte"),
            Figure(f"{codec}_bytes_ratio_at_500", round(ratio(upward, downward)), wanted, "higher", "ratio"),
        ]
    return figures
