"""What a larger model and more data cost: an outer round by the model's size, a transfer by the slice's; two plots.

    model   2 workers × 10 … 200 MB    seconds of an outer round (benchmarks.outer), memory of the server's executor
    data    slices of 16 … 1024 MiB    seconds from data node to a verified file on tmpfs (benchmarks.slices)

Proportional is what is wanted: seconds per byte of the largest over those of the middle one, not above FLAT. What
workers cost is `benchmarks.placement --part growth`. `--plots DIR` draws growth-model.png and growth-data.png there.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import outer, slices, slices_data
from benchmarks.plots import log_log
from benchmarks.report import Figure, print_report
from benchmarks.slices_nodes import Command

WORKERS = 2
MODEL_MB = (10, 25, 50, 100, 200)
SLICE_MIB = (16, 64, 256, 1024)
MIDDLE_MB, MIDDLE_MIB = 50, 64
REPETITIONS = 3
FLAT = 1.25
MIB = 1 << 20


def models(work: Path) -> dict[int, dict[str, float]]:
    """Return, by MB of fp32, seconds of an outer round and the models of memory that its server takes."""
    found = {}
    for size in MODEL_MB:
        got = outer.measured((WORKERS, size), "hypha", work, REPETITIONS)
        found[size] = {"seconds": got["median_s"], "memory_mib": got["peak_mib"]}
    return found


def data() -> dict[int, float]:
    """Return, by MiB of a slice, the seconds until it lies verified at a worker."""
    with ExitStack() as stack:
        folder, shm = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypha-bench-", dir=each)))
            for each in (None, "/dev/shm")
        )
        sets = folder / "sets"
        for size in SLICE_MIB:
            slices_data.write_large(sets / f"large-{size}", size * MIB, "blake3")
        bench = slices.start(stack, folder, sets, shm, [sets / f"large-{size}" for size in SLICE_MIB])
        found: dict[int, list[float]] = {size: [] for size in SLICE_MIB}
        for _ in range(REPETITIONS):
            for size in SLICE_MIB:
                command = Command("slices", f"large-{size}", [slices.LARGE], str(shm))
                rate = slices.timed(bench, command, size * MIB)["mb_s"]
                found[size].append(size * MIB / rate / 1e6)
                (shm / slices.LARGE).unlink()
    return {size: round(statistics.median(seconds), 4) for size, seconds in found.items()}


def per_unit(seconds: Mapping[int, float], middle: int) -> float:
    """Return seconds per byte at the largest size over those at the middle one."""
    largest = max(seconds)
    return round((seconds[largest] / largest) / (seconds[middle] / middle), 3)


def draw(seconds: Mapping[int, float], path: Path, title: str, unit: str) -> None:
    """Plot seconds by size beside what proportional would be."""
    largest = max(seconds)
    proportional = [seconds[largest] * size / largest for size in seconds]
    lines = {"measured": ("o-", list(seconds.values())), "proportional": ("--", proportional)}
    log_log(path, list(seconds), lines, title=title, x=unit, y="seconds")


def main() -> None:
    """Measure, draw, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", type=Path, help="a directory for the two plots")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where nodes keep their files")
    asked = parser.parse_args()
    by_slice, by_model = data(), models(asked.work)
    seconds = {size: got["seconds"] for size, got in by_model.items()}
    if asked.plots is not None:
        draw(seconds, asked.plots / "growth-model.png", "An outer round of two workers", "MB of fp32")
        draw(by_slice, asked.plots / "growth-data.png", "A slice from a data node to a verified file", "MiB")
    figures = [
        Figure("outer_round_seconds_per_byte_200_to_50_mb", per_unit(seconds, MIDDLE_MB), FLAT, "lower", "ratio"),
        Figure("slice_seconds_per_byte_1024_to_64_mib", per_unit(by_slice, MIDDLE_MIB), FLAT, "lower", "ratio"),
    ]
    print_report("growth", figures, {"model": by_model, "data_s": by_slice})


if __name__ == "__main__":
    main()
