"""From an advertisement to sixteen leased workers, each a process of its own on loopback.

    hypha-gateway, 16 × hypha-worker  processes with certificates of their own; executors are never started
    here                              a scheduler's network, pool and allocator

    allocate(15 train, 1 aggregate) ─ release all ─ allocate … REPETITIONS times, each one auction

200 ms of each are the workers' window and 50 ms the scheduler's last moment for a better offer (leases.md). Beside the
time stands what an auction costs each process, which says more on a machine that is busy with other things.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import trio
from msgspec import Struct

from benchmarks.certificates import Files, issue
from benchmarks.ending import end
from benchmarks.report import Figure
from hypha.config import NodeConfig, load_config
from hypha.demo.nodes import free_port
from hypha.network.host import Libp2pNetwork, open_network
from hypha.pki import load_identity
from hypha.protocol.auction import GATHER_S, SETTLE_S
from hypha.protocol.resources import Resources
from hypha.runtime import RealRuntime
from hypha.scheduler.allocator import Allocator, Wanted
from hypha.scheduler.pool import LeasedWorker, Pool

WORKERS = 16
# The auction's window and as much again.
P50_WANTED_MS = 400.0
REPETITIONS = 40
# The first auctions find processes that still start; they are reported apart.
COLD_S_MAX = 120.0
STOP_S = 5.0
WELCOME_S = 2.0
RETRY_S = 2.0
# The manual's capacity: 100 MB and 10 MB for each worker.
MEMORY_BASE_MB, MEMORY_PER_WORKER_MB = 100.0, 10.0
ONE = Resources(cpu=1, memory=0.5)
TRAIN, SERVE = "diloco-transformer", "parameter-server"
REST = WORKERS - 1
ASKS = (
    Wanted(work="train", executor=TRAIN, resources=ONE, count=REST, minimum=REST, bid=1, limit=1),
    Wanted(work="aggregate", executor=SERVE, resources=ONE, count=1, minimum=1, bid=1, limit=1),
)


class Taken(Struct, frozen=True, kw_only=True):
    """What was measured: ms for each auction, CPU ms of one auction by process, MB of the scheduler's process."""

    cold_ms: float
    taken_ms: list[float]
    short: int
    cpu_ms: dict[str, float]
    scheduler_mb: float


def configured(path: Path, files: Files, *lines: str) -> Path:
    """Write a node's configuration and return its path."""
    keys = [f'{key} = "{getattr(files, key)}"' for key in ("cert_pem", "key_pem", "trust_pem")]
    path.write_text("\n".join([*keys, *lines]) + "\n")
    return path


@contextmanager
def nodes(directory: Path) -> Iterator[tuple[NodeConfig, list[psutil.Process]]]:
    """Run gateway and workers while the context is open; give the scheduler's configuration and the processes."""
    workers = [f"worker-{number}" for number in range(WORKERS)]
    files = issue(directory, dict.fromkeys(workers, "worker") | {"gateway": "gateway", "scheduler": "scheduler"})
    port = free_port()
    listen = f'listen_addresses = ["/ip4/127.0.0.1/tcp/{port}"]'
    join = (
        f'gateway_addresses = ["/ip4/127.0.0.1/tcp/{port}/p2p/{files["gateway"].identity().peer_id}"]',
        'listen_addresses = ["/ip4/127.0.0.1/tcp/0"]',
    )
    paths = [configured(directory / "gateway.toml", files["gateway"], listen)]
    for name in workers:
        more = (f'work_dir = "{directory / name}"', "[resources]", "cpu = 1", "memory = 1")
        paths.append(configured(directory / f"{name}.toml", files[name], *join, *more))
    running = []
    try:
        for path in paths:
            program = "hypha-gateway" if path.stem == "gateway" else "hypha-worker"
            with path.with_suffix(".log").open("wb") as log:
                arguments = [str(Path(sys.executable).parent / program), "run", "-c", str(path)]
                running.append(subprocess.Popen(arguments, stdout=log, stderr=log))
        config = load_config(NodeConfig, configured(directory / "scheduler.toml", files["scheduler"], *join), {})
        yield config, [psutil.Process(process.pid) for process in running]
    finally:
        end(running, STOP_S)


async def measure(config: NodeConfig, processes: list[psutil.Process]) -> Taken:
    """Hold one auction after the other. Raises RuntimeError where a lease was lost."""
    runtime, deaths = RealRuntime(), []

    def died(worker: LeasedWorker, reason: str) -> None:
        deaths.append(reason)

    async with open_network(load_identity(config), config, role="scheduler", runtime=runtime) as network:
        pool = Pool(network, runtime, job_epoch=1, died=died)
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            taken = await _auctions(network, runtime, pool, processes)
            nursery.cancel_scope.cancel()
    if deaths:
        raise RuntimeError(f"leases were lost: {deaths}")
    return taken


async def _auctions(network: Libp2pNetwork, runtime: RealRuntime, pool: Pool, processes: list[psutil.Process]) -> Taken:
    allocator = Allocator(network, runtime, pool, job_id="bench", job_epoch=1, welcome_s=WELCOME_S, retry_s=RETRY_S)
    began, taken_ms, short = time.perf_counter(), [], 0
    with trio.fail_after(COLD_S_MAX):
        while not (await allocator.allocate(ASKS)).workers:
            pass
    cold_ms = ms_since(began)
    me = psutil.Process()
    before = [cpu_ms(process) for process in (me, *processes)]
    for _ in range(REPETITIONS):
        await pool.release_all("next repetition")
        began = time.perf_counter()
        if (await allocator.allocate(ASKS)).shortfall is None:
            taken_ms.append(ms_since(began))
        else:
            short += 1
    spent = [(cpu_ms(each) - then) / REPETITIONS for each, then in zip((me, *processes), before, strict=True)]
    memory_mb = me.memory_info().rss / 1e6
    await pool.release_all("done")
    return Taken(
        cold_ms=cold_ms,
        taken_ms=taken_ms,
        short=short,
        cpu_ms={"scheduler": spent[0], "gateway": spent[1], "worker": statistics.mean(spent[2:]), "all": sum(spent)},
        scheduler_mb=round(memory_mb, 1),
    )


def ms_since(began: float) -> float:
    """Return the milliseconds of wall time since `began`."""
    return round(1000 * (time.perf_counter() - began), 1)


def cpu_ms(process: psutil.Process) -> float:
    """Return the milliseconds that a process has computed so far."""
    times = process.cpu_times()
    return 1000 * float(times.user + times.system)


def run() -> tuple[list[Figure], dict[str, object]]:
    """Measure; returns the figures and the detail."""
    with tempfile.TemporaryDirectory() as directory, nodes(Path(directory)) as (config, processes):
        taken = trio.run(measure, config, processes)
    cuts = statistics.quantiles(taken.taken_ms, n=100, method="inclusive")
    detail: dict[str, object] = {
        "p99_ms": round(cuts[98], 1),
        "min_ms": min(taken.taken_ms),
        "max_ms": max(taken.taken_ms),
        "of_which_fixed_ms": 1000 * (GATHER_S + SETTLE_S),
        "cold_ms": taken.cold_ms,
        "repetitions": len(taken.taken_ms),
        "auctions_that_fell_short": taken.short,
        "cpu_ms_per_auction": {name: round(ms, 2) for name, ms in taken.cpu_ms.items()},
        "load": os.getloadavg(),
    }
    bound_mb = MEMORY_BASE_MB + WORKERS * MEMORY_PER_WORKER_MB
    figures = [
        Figure("p50 of 16 leased", round(statistics.median(taken.taken_ms), 1), P50_WANTED_MS, "lower", "ms"),
        Figure("scheduler's memory with 16 workers", taken.scheduler_mb, bound_mb, "lower", "MB"),
    ]
    return figures, detail
