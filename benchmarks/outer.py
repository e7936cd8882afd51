"""The outer round against peers: seconds from the last worker's push to the last worker's loaded update.

    hypha      gateway, data node, scheduler, parameter server, workers and executors as real processes over mutual TLS;
               only forward and backward are left out (outer_executor). All push at once: the worst case
    hivemind   DecentralizedAverager.step, every peer in a process with its own p2pd     without TLS where a system
    flower     FedAvg over gRPC, start_server and start_client                           does not use it by itself
    torchft    Manager.allreduce over Gloo, the quorum standing already

One system at a time, on each point one after the other; fp32, the same bytes. The first round warms up; figures are
ratios of medians. Processor seconds are of all processes of a system, and tell more than seconds on a busy machine.
`--megabits 1000`: the product alone, every worker behind a link of that speed, beside bytes ÷ bandwidth (outer_links).
`--points 2x25,8x400` chooses, `--points all` takes those with 400 MB and eight times 100 MB as well, which are left out
otherwise because they take most of an hour; `--repetitions`, `--work DIR` says where files of the product's nodes go.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import outer_links
from benchmarks.outer_nodes import Cluster, nodes, prepare, start
from benchmarks.outer_peers import rounds_of
from benchmarks.outer_watch import Watch
from benchmarks.report import Figure, print_report

POINTS = "2x25,4x25,8x25,2x100,4x100"
ALL = f"{POINTS},8x100,2x400,4x400,8x400"
SYSTEMS = ("hypha", "hivemind", "flower", "torchft")
FASTER_THAN = ("hivemind", "flower")
REPETITIONS = 3
# Eight workers and as many copies of 400 MB each: fewer repetitions, so that a run ends within the hour.
LARGE_BYTES, LARGE_REPETITIONS = 1_600_000_000, 2
MEMORY_WANTED_MODELS = 3.2
BOUND_WANTED = 1.3
# What the server's executor takes before it has a model: interpreter, torch, the bridge's client. A cluster with a
# model of one layer tells.
EMPTY_MEGABYTES = 4
FP32_BYTES = 4
# A job of a few rounds; on a busy machine most of it is the start of its processes.
JOB_S_MAX = 1_200.0
MIB = 2**20


def hypha(cluster: Cluster) -> tuple[list[dict[str, Any]], float]:
    """Run a job; returns what each round took and the most memory of the server's executor in MiB."""
    prepare(cluster)
    with nodes(cluster) as running:
        scheduler = start(cluster, "scheduler", "scheduler")
        roots = {name: process.pid for name, process in running.processes.items()} | {"scheduler": scheduler.pid}
        with Watch(roots) as watch:
            try:
                code = scheduler.wait(JOB_S_MAX)
            finally:
                scheduler.kill()
    if code != 0:
        raise RuntimeError(f"the scheduler ended with {code}: {cluster.directory / 'logs'}")
    events = _events(cluster.directory / "notes")
    rounds = []
    for number in range(1, cluster.rounds + 1):
        pushes, loads = events[number, "push"], events.get((number + 1, "loaded"), [])
        if len(pushes) != cluster.workers or len(loads) != cluster.workers:
            continue  # somebody came late: not the round that is meant
        began = max(one["at"] for one in pushes)
        phases = {"pushed": events[number, "pushed"], "arrived": events[number, "arrived"], "loaded": loads}
        ended = max(one["at"] for one in loads)
        cpu = watch.between(began, ended)
        rounds.append(
            {
                "s": round(ended - began, 3),
                "cpu_s": round(sum(cpu.values()), 2),
                "cpu_of": cpu,
                **{phase: round(max(one["at"] for one in those) - began, 3) for phase, those in phases.items()},
                "weights": [one["samples"] for one in pushes],
            }
        )
    return rounds, watch.peak_mib["server executor"]


def _events(notes: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in notes.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            found.setdefault((one["round"], one["event"]), []).append(one)
    return found


def measured(point: tuple[int, int], system: str, work: Path, repetitions: int, megabits: int = 0) -> dict[str, Any]:
    """Run one system at one point; `megabits` per second of every worker's link, 0 for the loopback."""
    workers, megabytes = point
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hypha-bench-"))
        files = stack.enter_context(tempfile.TemporaryDirectory(prefix="hypha-bench-", dir=work))
        cluster = Cluster(
            directory=Path(folder), work=Path(files), workers=workers, megabytes=megabytes, rounds=repetitions + 1
        )
        if megabits:
            stack.enter_context(outer_links.links(workers, megabits))
            cluster = msgspec.structs.replace(cluster, **_placed(cluster))
        if system == "hypha":
            rounds, peak = hypha(cluster)
        else:
            rounds, peak = rounds_of(system, workers, cluster.model_bytes // FP32_BYTES, repetitions + 1), 0.0
    kept = rounds[1:] or rounds
    seconds = [one["s"] for one in kept]
    return {
        "median_s": round(statistics.median(seconds), 3),
        "spread_s": [min(seconds), max(seconds)],
        "median_cpu_s": round(statistics.median(one["cpu_s"] for one in kept), 2),
        "rounds": rounds,
        "peak_mib": round(peak, 1),
        "model_mib": round(cluster.model_bytes / MIB, 1),
    }


def _placed(cluster: Cluster) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(cluster.names)}
    return {
        "addresses": {name: outer_links.address(number) for name, number in numbers.items()},
        "elsewhere": f"{outer_links.NETWORK}.1",
        "prefix": {name: outer_links.inside(number) for name, number in numbers.items()},
    }


def run(
    points: list[tuple[int, int]], systems: list[str], work: Path, repetitions: int, megabits: int
) -> dict[str, dict[str, Any]]:
    """Run every system on every point; a system that fails on one is said to have."""
    found: dict[str, dict[str, Any]] = {}
    for workers, megabytes in points:
        times = LARGE_REPETITIONS if workers * megabytes * 1_000_000 > LARGE_BYTES else repetitions
        for system in systems:
            name, began = f"{workers}x{megabytes}", time.perf_counter()
            try:
                got = measured((workers, megabytes), system, work, times, megabits)
            except (RuntimeError, OSError, subprocess.SubprocessError, statistics.StatisticsError) as error:
                got = {"failed": str(error)}
            found.setdefault(name, {})[system] = got
            said = got.get("failed") or f"{got['median_s']} s, {got['median_cpu_s']} processor seconds"
            print(f"{name} {system}: {said} (run {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    return found


def figures_of(found: dict[str, dict[str, Any]], empty_mib: float, megabits: int) -> list[Figure]:
    """Compare with what is wanted."""
    figures, models = [], []
    for name, systems in found.items():
        ours = systems.get("hypha", {})
        if "median_s" not in ours:
            continue
        models.append((ours["peak_mib"] - empty_mib) / ours["model_mib"])
        if megabits:
            bound = outer_links.bound_s(int(name.split("x")[0]), round(ours["model_mib"] * MIB), megabits)
            ratio = round(ours["median_s"] / bound, 3)
            figures.append(Figure(f"{name}_to_bound", ratio, BOUND_WANTED, "lower", "ratio"))
        figures += [each for other in FASTER_THAN for each in _beside(name, ours, other, systems.get(other, {}))]
    if models:
        figures.append(Figure("server_peak_models", round(max(models), 2), MEMORY_WANTED_MODELS, "lower", "models"))
    return figures


def _beside(name: str, ours: dict[str, Any], other: str, theirs: dict[str, Any]) -> list[Figure]:
    if "median_s" not in theirs:
        return []
    return [
        Figure(f"{name}_{key}_to_{other}", round(ours[each] / max(theirs[each], 0.01), 3), 1.0, "lower", "ratio")
        for key, each in (("seconds", "median_s"), ("processor_seconds", "median_cpu_s"))
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default=POINTS, help="workers x MB, comma between; or all")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--megabits", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no node outlives this
    chosen = ALL if given.points == "all" else given.points
    points = [(int(left), int(right)) for left, right in (each.split("x") for each in chosen.split(","))]
    empty = measured((2, EMPTY_MEGABYTES), "hypha", given.work, 1) if "hypha" in given.systems else {"peak_mib": 0.0}
    systems = ["hypha"] if given.megabits else given.systems.split(",")
    found = run(points, systems, given.work, given.repetitions, given.megabits)
    detail = {
        "points": found,
        "empty_mib": empty["peak_mib"],
        "megabits": given.megabits,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "disk_free_gb": round(shutil.disk_usage(given.work).free / 1e9),
    }
    print_report("outer", figures_of(found, empty["peak_mib"], given.megabits), detail)


if __name__ == "__main__":
    main()
