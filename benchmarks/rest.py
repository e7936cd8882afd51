"""What a node costs that does nothing, and how soon a command line answers.

    gateway, data node, worker, and a scheduler that waits for a worker nobody has
        ─ settle ─▶ CPU seconds and resident memory over WATCH_S
    hypha-scheduler --help, START_RUNS times ─▶ median wall seconds

Real processes with real certificates, as the demo starts them.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import trio
from msgspec import Struct

from benchmarks.report import Figure, print_report
from hypha.demo import commands, corpus
from hypha.demo.loglines import LogFile
from hypha.demo.nodes import DATA, GATEWAY, SCHEDULER, Cast, free_port, write_configs
from hypha.demo.performance import environment_for_nodes
from hypha.demo.processes import Processes, processes
from hypha.demo.progress import Progress

MEMORY_WANTED_MB = 150.0
CPU_WANTED_PERCENT = 2.0
HELP_WANTED_S = 0.5
HELP_RUNS = 5
# Imports, first dials and the DHT's first lookups are over by then.
SETTLE_S = 8.0
WATCH_S = 10.0
READY_S = 60.0
POLL_S = 0.1
# Nobody has it, so the scheduler goes on advertising.
NO_SUCH_EXECUTOR = "scheduler.job.resources.executor=nobody-has-this"
WORKER = "worker-1"
LINE, LINES = "the quick brown fox jumps over the lazy dog\n", 1000
CAST_OF_FOUR = (GATEWAY, DATA, WORKER, SCHEDULER)


class Rest(Struct, frozen=True):
    """One process at rest: resident memory in MB (10^6 bytes), share of one core in per cent, and what is loaded."""

    memory_mb: float
    cpu_percent: float
    torch: bool


def set_up(directory: Path) -> Cast:
    """Write configurations, and a text so small that preparing it takes no time."""
    cast = Cast(workers=2, rounds=1, port=free_port())
    (directory / "logs").mkdir()
    write_configs(directory / "configs", cast)
    (directory / "text").write_text(LINE * LINES)
    return cast


async def measure(directory: Path, cast: Cast) -> dict[str, Rest]:
    """Start the four and watch them."""
    with processes(directory, environment_for_nodes(os.environ, otlp=False), _lost) as running:
        for command in [*commands.authorities(), *commands.certificates(cast)]:
            await running.step(command.name, command.arguments)
        await running.step("dataset", commands.dataset(corpus.given([directory / "text"])).arguments)
        async with trio.open_nursery() as nursery:
            for name in CAST_OF_FOUR:
                arguments = commands.node(name, cast.roles[name]).arguments
                extra = ("--set", NO_SUCH_EXECUTOR) if name == SCHEDULER else ()
                nursery.start_soon(running.attend, name, (*arguments, *extra))
            await _until_ready(directory)
            await trio.sleep(SETTLE_S)
            found = await _watch(running)
            nursery.cancel_scope.cancel()
    return found


async def _until_ready(directory: Path) -> None:
    progress = Progress()
    logs = [LogFile(directory / "logs" / f"{name}.log") for name in CAST_OF_FOUR]
    with trio.fail_after(READY_S):
        while not progress.ready >= {GATEWAY, DATA, WORKER}:
            for log in logs:
                for line in log.news():
                    progress.take(line)
            await trio.sleep(POLL_S)


async def _watch(running: Processes) -> dict[str, Rest]:
    nodes = {name: psutil.Process(pid) for name, pid in running.running.items()}
    before = {name: _cpu_s(node) for name, node in nodes.items()}
    began = time.monotonic()
    await trio.sleep(WATCH_S)
    seconds = time.monotonic() - began
    return {
        name: Rest(
            memory_mb=round(node.memory_info().rss / 1e6, 1),
            cpu_percent=round(100 * (_cpu_s(node) - before[name]) / seconds, 2),
            torch=any("libtorch" in each.path for each in node.memory_maps()),
        )
        for name, node in nodes.items()
    }


def _cpu_s(node: psutil.Process) -> float:
    times = node.cpu_times()
    return float(times.user + times.system)


def _lost(name: str, how: str) -> None:
    raise RuntimeError(f"{name} is lost: {how}")


def help_s() -> list[float]:
    """Return the wall seconds of several runs of `hypha-scheduler --help`."""
    program = str(commands.programs() / "hypha-scheduler")
    taken = []
    for _ in range(HELP_RUNS):
        began = time.monotonic()
        subprocess.run([program, "--help"], check=True, stdout=subprocess.DEVNULL)
        taken.append(round(time.monotonic() - began, 3))
    return taken


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    starts = help_s()
    with tempfile.TemporaryDirectory() as directory:
        nodes = trio.run(measure, Path(directory), set_up(Path(directory)))
    figures = [Figure("start-up of --help", statistics.median(starts), HELP_WANTED_S, "lower", "s")]
    for name, rest in nodes.items():
        figures.append(Figure(f"memory of {name}", rest.memory_mb, MEMORY_WANTED_MB, "lower", "MB"))
        figures.append(Figure(f"processor of {name}", rest.cpu_percent, CPU_WANTED_PERCENT, "lower", "% of a core"))
    with_torch = sum(rest.torch for rest in nodes.values())
    figures.append(Figure("network processes that loaded torch", with_torch, 0, "lower", "processes"))
    print_report("rest", figures, {"help_s": starts, "cores": os.cpu_count(), "load": os.getloadavg()})


if __name__ == "__main__":
    main()
