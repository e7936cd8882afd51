"""Held-out loss and bytes of every way to train the same model on the same text: one factor at a time.

    data-parallel AdamW · plain DiLoCo · then codec, fragments, workers, H, outer optimizer     (convergence_table)

Every run is deterministic: what else the machine does changes no loss, and outcomes that are kept (`--kept`) need not
be found again. `--all` adds runs that the explanation of top-k needs. Progress goes to standard error.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import msgspec

from benchmarks.convergence_runs import SEQUENCE, Outcome, Spec, train
from benchmarks.convergence_table import figures_of, rows_of, specs, table
from benchmarks.report import print_report
from hypha.dataset_tool import prepare
from hypha.demo.corpus import standard_library


def run_all(wanted: list[Spec], directory: Path, processes: int, kept: Path) -> list[Outcome]:
    """Run what is not in `kept` yet, several at a time, and add it there; returns all, in the order of `wanted`."""
    lines = kept.read_bytes().splitlines() if kept.exists() else []
    found = {outcome.spec: outcome for outcome in (msgspec.json.decode(line, type=Outcome) for line in lines)}
    began, missing = time.perf_counter(), [spec for spec in wanted if spec not in found]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train, spec, directory) for spec in missing]
        for number, future in enumerate(as_completed(futures), 1):
            outcome = future.result()
            found[outcome.spec] = outcome
            with kept.open("ab") as file:
                file.write(msgspec.json.encode(outcome) + b"\n")
            said = f"{number}/{len(missing)} {outcome.spec.name}, seed {outcome.spec.seed}: loss {outcome.loss}"
            print(f"{time.perf_counter() - began:6.0f} s  {said}", file=sys.stderr, flush=True)
    return [found[spec] for spec in wanted]


def main() -> None:
    """Train everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--all", action="store_true", help="more runs with top-k")
    parser.add_argument(
        "--kept", type=Path, help="a file of outcomes: those in it are not run again, new ones are added"
    )
    arguments = parser.parse_args()
    began, wanted = time.perf_counter(), specs(everything=arguments.all)
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
        outcomes = run_all(wanted, directory, arguments.processes, arguments.kept or Path(folder) / "kept")
    rows = rows_of(outcomes)
    print(table(rows), file=sys.stderr)
    detail = {
        "rows": rows,
        "bytes_ratios_at_500": "arithmetic",
        "run_minutes": round(sum(outcome.seconds for outcome in outcomes) / 60, 1),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "load": os.getloadavg(),
    }
    print_report("convergence", figures_of(rows), detail)


if __name__ == "__main__":
    main()
