"""From an advertisement to four leased workers on loopback.

    hypha-gateway, 4 × hypha-worker   processes of their own, certificates of their own; executors are never started
    here                              a scheduler's network, pool and allocator

    allocate(3 train, 1 aggregate) ─ release all ─ allocate … REPETITIONS times, each one auction

200 ms of each are the workers' window and 50 ms the scheduler's last moment for a better offer (leases.md).
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

import trio

from benchmarks.report import Figure, print_report
from hypha.config import NodeConfig, load_config
from hypha.demo.nodes import free_port
from hypha.network.host import open_network
from hypha.pki import issue_node, issue_org, issue_root, load_identity, save
from hypha.protocol.auction import GATHER_S, SETTLE_S
from hypha.protocol.resources import Resources
from hypha.runtime import RealRuntime
from hypha.scheduler.allocator import Allocator, Wanted
from hypha.scheduler.pool import LeasedWorker, Pool

P50_WANTED_MS = 350.0
WORKERS = 4
REPETITIONS = 40
# The first auctions find processes that still start and a mesh that still forms; they are reported apart.
COLD_S_MAX = 60.0
STOP_S = 5.0
WELCOME_S = 2.0
RETRY_S = 2.0
ONE = Resources(cpu=1, memory=0.5)
ASKS = (
    Wanted(work="train", executor="diloco-transformer", resources=ONE, count=3, minimum=3, bid=1, limit=1),
    Wanted(work="aggregate", executor="parameter-server", resources=ONE, count=1, minimum=1, bid=1, limit=1),
)


class Keys:
    """Issues certificates, and writes them and configurations that name them into one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        root = issue_root("Benchmark root")
        self._org = issue_org(root, "Benchmark org")
        save(directory / "trust.pem", root.certificate_pem())

    def configure(self, name: str, role: str, *lines: str) -> Path:
        """Write a node's certificate and NAME.toml; return the latter."""
        issued = issue_node(self._org, name, [role])
        save(self._directory / f"{name}.pem", issued.certificate_pem() + self._org.certificate_pem())
        save(self._directory / f"{name}-key.pem", issued.key_pem(), private=True)
        keys = [f'cert_pem = "{name}.pem"', f'key_pem = "{name}-key.pem"', 'trust_pem = "trust.pem"']
        path = self._directory / f"{name}.toml"
        path.write_text("\n".join([*keys, *lines]) + "\n")
        return path


@contextmanager
def nodes(directory: Path) -> Iterator[NodeConfig]:
    """Run gateway and workers while the context is open; give the scheduler's configuration."""
    keys, port = Keys(directory), free_port()
    gateway = keys.configure("gateway", "gateway", f'listen_addresses = ["/ip4/127.0.0.1/tcp/{port}"]')
    gateway_id = load_identity(load_config(NodeConfig, gateway, {})).peer_id
    join = (
        f'gateway_addresses = ["/ip4/127.0.0.1/tcp/{port}/p2p/{gateway_id}"]',
        'listen_addresses = ["/ip4/127.0.0.1/tcp/0"]',
    )
    commands = [("hypha-gateway", gateway)]
    for number in range(WORKERS):
        name = f"worker-{number}"
        here = (*join, f'work_dir = "{name}"', "[resources]", "cpu = 1", "memory = 1")
        commands.append(("hypha-worker", keys.configure(name, "worker", *here)))
    running = []
    try:
        for program, path in commands:
            with path.with_suffix(".log").open("wb") as log:
                arguments = [str(Path(sys.executable).parent / program), "run", "-c", str(path)]
                running.append(subprocess.Popen(arguments, stdout=log, stderr=log))
        yield load_config(NodeConfig, keys.configure("scheduler", "scheduler", *join), {})
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


async def measure(config: NodeConfig) -> tuple[float, list[float], int]:
    """Return ms until four were leased the first time, ms for each further time, and auctions that fell short."""
    runtime, deaths = RealRuntime(), []

    def died(worker: LeasedWorker, reason: str) -> None:
        deaths.append(reason)

    async with open_network(load_identity(config), config, role="scheduler", runtime=runtime) as network:
        pool = Pool(network, runtime, job_epoch=1, died=died)
        allocator = Allocator(
            network, runtime, pool, job_id="placement", job_epoch=1, welcome_s=WELCOME_S, retry_s=RETRY_S
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            began, taken, short = time.perf_counter(), [], 0
            with trio.fail_after(COLD_S_MAX):
                while not (await allocator.allocate(ASKS)).workers:
                    pass
            cold_ms = _ms_since(began)
            for _ in range(REPETITIONS):
                await pool.release_all("next repetition")
                began = time.perf_counter()
                allocation = await allocator.allocate(ASKS)
                if allocation.shortfall is None:
                    taken.append(_ms_since(began))
                else:
                    short += 1
            await pool.release_all("done")
            nursery.cancel_scope.cancel()
    if deaths:
        raise RuntimeError(f"leases were lost: {deaths}")
    return cold_ms, taken, short


def _ms_since(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 1)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory, nodes(Path(directory)) as config:
        cold_ms, taken, short = trio.run(measure, config)
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    detail = {
        "p99_ms": round(cuts[98], 1),
        "min_ms": min(taken),
        "max_ms": max(taken),
        "of_which_fixed_ms": 1000 * (GATHER_S + SETTLE_S),
        "cold_ms": cold_ms,
        "repetitions": len(taken),
        "auctions_that_fell_short": short,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    print_report("placement", [Figure("p50", round(statistics.median(taken), 1), P50_WANTED_MS, "lower", "ms")], detail)


if __name__ == "__main__":
    main()
