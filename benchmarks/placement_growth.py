"""What an auction costs as the network grows, from ten workers to ten thousand: a table, and a plot with --plot FILE.

    for each size: first auction (everybody is asked) ─▶ next ones (as many as the first says are needed)
    messages that arrived ÷ nodes ÷ leases; at the scheduler ÷ leases; virtual ms; CPU of all nodes ÷ nodes

Real role code in memory and virtual time (placement_memory), 8 leases whatever the size.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.placement_memory import Measured, Placement, measured
from benchmarks.plots import log_log
from benchmarks.report import Figure

# Sizes, and how many auctions after the first: fewer where each takes seconds.
SIZES = {10: 5, 30: 5, 100: 5, 300: 5, 1000: 3, 3000: 2, 10_000: 1}
LEASES = 8
# Beyond this everybody cannot be wanted: the offer fraction is at work.
BASE = 100
FLAT = 1.25
LABELS = {
    "at_scheduler_first": "at the scheduler, its first auction",
    "at_scheduler_per_lease": "at the scheduler, later auctions",
    "per_node_per_lease": "mean of all nodes",
}


class Row(Struct, frozen=True, kw_only=True):
    """One size, medians of its repetitions."""

    workers: int
    per_node_per_lease: float
    at_scheduler_per_lease: float
    at_scheduler_first: float
    virtual_ms: float
    cpu_ms_per_node: float
    memory_mb: float


def row(workers: int) -> Row:
    """Measure one size."""
    return _row(workers, measured(workers, (LEASES,) * (1 + SIZES[workers])))


def _row(workers: int, found: Measured) -> Row:
    first, *rest = found.placements

    def middle(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    def at_scheduler(each: Placement) -> float:
        return each.at_scheduler / each.leases

    return Row(
        workers=workers,
        per_node_per_lease=middle([each.total / (workers + 1) / each.leases for each in rest]),
        at_scheduler_per_lease=middle([at_scheduler(each) for each in rest]),
        at_scheduler_first=round(at_scheduler(first), 3),
        virtual_ms=middle([each.virtual_ms for each in rest]),
        cpu_ms_per_node=middle([each.cpu_ms / (workers + 1) for each in rest]),
        memory_mb=round(found.memory_mb),
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as Markdown."""
    names = (
        "workers",
        "messages per node and lease",
        "at the scheduler per lease",
        "the first time",
        "CPU ms per node",
    )
    return [
        f"| {' | '.join(names)} |",
        f"|{'--:|' * len(names)}",
        *(
            f"| {each.workers} | {each.per_node_per_lease:.3f} | {each.at_scheduler_per_lease:.1f} "
            f"| {each.at_scheduler_first:.1f} | {each.cpu_ms_per_node:.2f} |"
            for each in rows
        ),
    ]


def run(plot: Path | None = None) -> tuple[list[Figure], dict[str, object]]:
    """Measure all sizes; returns the figures and the detail, and draws the plot where a file is named."""
    rows = [row(workers) for workers in SIZES]
    if plot is not None:
        draw(rows, plot)
    base = next(each for each in rows if each.workers >= BASE)
    last = rows[-1]
    figures = [
        Figure(
            f"messages per node and lease: {last.workers} workers to {base.workers}",
            round(last.per_node_per_lease / base.per_node_per_lease, 3),
            FLAT,
            "lower",
            "ratio",
        ),
        Figure(
            f"messages at the scheduler per lease: {last.workers} workers to {base.workers}",
            round(last.at_scheduler_per_lease / base.at_scheduler_per_lease, 3),
            FLAT,
            "lower",
            "ratio",
        ),
    ]
    return figures, {"rows": rows, "table": table(rows)}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot messages against size."""
    styles = {"at_scheduler_first": "--", "at_scheduler_per_lease": "o-", "per_node_per_lease": "s-"}
    log_log(
        path,
        [each.workers for each in rows],
        {LABELS[name]: (style, [getattr(each, name) for each in rows]) for name, style in styles.items()},
        title=f"An auction for {LEASES} workers as the network grows",
        x="workers",
        y="messages per node and lease",
    )
