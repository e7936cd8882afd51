"""Thousands of workers in one process: real role code, the in-memory network, virtual time.

    Crowd: a fabric, a scheduler's pool and allocator, N × hypha.worker.service.Worker
    messages counted as they arrive, by kind and by who gets them; CPU by the process's own clock

The fabric is paid for, too: CPU per lease here covers both ends of every message and the network between them.
"""

import gc
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil
import trio
import trio.testing
from msgspec import Struct

from benchmarks.report import Figure
from hypha.errors import JobFailed
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import Event
from hypha.network.seam import Network
from hypha.protocol.auction import GATHER_S, SETTLE_S
from hypha.protocol.resources import Resources
from hypha.scheduler.allocator import Allocator, Wanted
from hypha.scheduler.pool import LeasedWorker, Pool
from hypha.store.fences import FenceFile
from hypha.store.memory_disk import MemoryDisk
from hypha.worker.config import Config, ResourcesConfig
from hypha.worker.fences import FenceKeeper
from hypha.worker.process import Executor, Launch
from hypha.worker.service import Worker

T = TypeVar("T")

SCHEDULER = "scheduler"
THOUSAND = 1000
LEASES = 16
WELCOME_S, RETRY_S = 2.0, 2.0
# Window and settling are waited for; each message takes a virtual millisecond.
VIRTUAL_MS_WANTED = 1000 * (GATHER_S + SETTLE_S) + 50
# About five offers for a place, each offered, answered, released or accepted, and that answered.
MESSAGES_WANTED = 24.0
# Sixty workers' share of one millisecond each, who hear the advertisement.
CPU_MS_WANTED = 60.0
ONE = Resources(cpu=1, memory=0.5, storage=0.1)


class VirtualRuntime:
    """Time as the fabric has it, counted ids, seeded chance, blocking work at once."""

    def __init__(self, name: str) -> None:
        self.random = random.Random(name)
        self._name = name
        self._ids = 0

    def now(self) -> float:
        """Seconds of virtual time."""
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        """Sleep in virtual time."""
        await trio.sleep(seconds)

    def new_id(self) -> str:
        """Return the next id."""
        self._ids += 1
        return f"{self._name}-{self._ids}"

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        """Call it."""
        await trio.lowlevel.checkpoint()
        return function(*args)


class NoExecutors:
    """No job is dispatched here."""

    def launch(self, what: Launch) -> AbstractAsyncContextManager[Executor]:
        """Raise JobFailed."""
        raise JobFailed(f"{what} is not run in this benchmark")


class Placement(Struct, frozen=True, kw_only=True):
    """One auction: virtual ms, CPU ms, messages that arrived in all and at the scheduler, and the leases it gave."""

    workers: int
    leases: int
    virtual_ms: float
    cpu_ms: float
    messages: dict[str, int]
    at_scheduler: int

    @property
    def total(self) -> int:
        """All messages."""
        return sum(self.messages.values())

    @property
    def beside_advertising(self) -> int:
        """All messages but the advertisement's arrivals."""
        return self.total - self.messages.get("TaskAdvertisement", 0)

    def report(self) -> dict[str, object]:
        """Return it for people."""
        return {
            "virtual_ms": round(self.virtual_ms, 1),
            "cpu_ms_per_lease": round(self.cpu_ms / self.leases, 2),
            "messages_per_lease": round(self.total / self.leases, 1),
            "at_scheduler_per_lease": round(self.at_scheduler / self.leases, 1),
            "messages": self.messages,
        }


class Measured(Struct, frozen=True, kw_only=True):
    """The auctions of one process, and its memory at the end in MB."""

    placements: list[Placement]
    memory_mb: float


class Crowd:
    """A scheduler and as many workers as wanted; `count` tells what arrived."""

    def __init__(
        self, network: Network, runtime: VirtualRuntime, pool: Pool, arrived: Counter[tuple[str, str]]
    ) -> None:
        self.runtime = runtime
        self.pool = pool
        self._arrived = arrived
        self.allocator = Allocator(
            network, runtime, pool, job_id="bench", job_epoch=1, welcome_s=WELCOME_S, retry_s=RETRY_S
        )

    async def place(self, workers: int, leases: int) -> Placement:
        """Hold one auction for so many leases and let the losers go. Raises RuntimeError where it falls short."""
        self._arrived.clear()
        began, cpu = self.runtime.now(), time.process_time()
        allocation = await self.allocator.allocate(asks(leases))
        virtual_ms = 1000 * (self.runtime.now() - began)
        # Releases of losers are under way; they belong to it.
        await trio.sleep(GATHER_S)
        if allocation.shortfall is not None:
            raise RuntimeError(f"{workers} workers, {leases} wanted: {allocation.shortfall}")
        return Placement(
            workers=workers,
            leases=len(allocation.workers),
            virtual_ms=virtual_ms,
            cpu_ms=1000 * (time.process_time() - cpu),
            messages=_by_kind(self._arrived),
            at_scheduler=sum(count for (_, dst), count in self._arrived.items() if dst == SCHEDULER),
        )


def asks(leases: int) -> tuple[Wanted, ...]:
    """Return what to ask for: one parameter server, the rest to train."""
    one = Wanted(work="aggregate", executor="parameter-server", resources=ONE, count=1, minimum=1, bid=1, limit=1)
    rest = leases - 1
    return (
        Wanted(work="train", executor="diloco-transformer", resources=ONE, count=rest, minimum=rest, bid=1, limit=1),
        one,
    )


def _by_kind(arrived: Counter[tuple[str, str]]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for (what, _), count in arrived.items():
        kinds[what] += count
    return dict(kinds)


@asynccontextmanager
async def crowd(directory: Path, workers: int) -> AsyncIterator[Crowd]:
    """Run so many workers and a scheduler's pool while the context is open."""
    fabric, arrived = MemoryFabric(workers), Counter[tuple[str, str]]()

    def count(event: Event) -> None:
        if event.outcome == "arrived":
            arrived[event.what, event.dst] += 1

    fabric.on_event(count)
    runtime = VirtualRuntime(SCHEDULER)
    async with fabric.node(SCHEDULER, {"scheduler"}) as network, trio.open_nursery() as nursery:
        for number in range(workers):
            await nursery.start(_worker, fabric, directory, f"worker-{number}")
        pool = Pool(network, runtime, job_epoch=1, died=_died)
        await nursery.start(pool.run)
        yield Crowd(network, runtime, pool, arrived)
        nursery.cancel_scope.cancel()


async def _worker(fabric: MemoryFabric, directory: Path, name: str, *, task_status: trio.TaskStatus[None]) -> None:
    unused, runtime = Path("unused.pem"), VirtualRuntime(name)
    config = Config(
        cert_pem=unused,
        key_pem=unused,
        trust_pem=unused,
        work_dir=directory / name,
        resources=ResourcesConfig(cpu=1, memory=1, storage=1, gpu=0),
    )
    async with fabric.node(name, {"worker"}) as network:
        fences = FenceKeeper(FenceFile(MemoryDisk(), name), runtime)
        await Worker(network, runtime, config, NoExecutors(), fences).run(task_status=task_status)


def _died(worker: LeasedWorker, reason: str) -> None:
    raise RuntimeError(f"a lease was lost: {reason}")


def measured(workers: int, leases: Sequence[int]) -> Measured:
    """Hold an auction for each of these numbers of leases among so many workers, in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, str(workers), *map(str, leases)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=Measured)


async def _place(directory: Path, workers: int, leases: Sequence[int]) -> None:
    placements = []
    async with crowd(directory, workers) as everybody:
        # What stands now stays: the collector would look through it again and again.
        gc.collect()
        gc.freeze()
        for wanted in leases:
            placements.append(await everybody.place(workers, wanted))
            await everybody.pool.release_all("next")
        memory_mb = psutil.Process().memory_info().rss / 1e6
        sys.stdout.buffer.write(msgspec.json.encode(Measured(placements=placements, memory_mb=memory_mb)))
        sys.stdout.flush()
        # Each node that goes down is told to all the others: nobody needs to see ten thousand do so.
        shutil.rmtree(directory)
        os._exit(0)


def thousand() -> tuple[list[Figure], dict[str, object]]:
    """One advertisement to a thousand workers, then others; returns the figures and the detail."""
    found = measured(THOUSAND, (LEASES, LEASES, LEASES, THOUSAND // 2))
    usual = found.placements[1:3]
    ms = statistics.median(each.virtual_ms for each in usual)
    beside = statistics.median(each.beside_advertising / each.leases for each in usual)
    cpu_ms = statistics.median(each.cpu_ms / each.leases for each in usual)
    figures = [
        Figure("1000 workers: virtual time to 16 leases", round(ms, 1), VIRTUAL_MS_WANTED, "lower", "ms"),
        Figure("1000 workers: messages per lease", round(beside, 1), MESSAGES_WANTED, "lower", "beside advertising"),
        Figure("1000 workers: processor per lease", round(cpu_ms, 1), CPU_MS_WANTED, "lower", "ms, all nodes"),
    ]
    names = ("first 16", "second 16", "third 16", "500")
    detail: dict[str, object] = {name: each.report() for name, each in zip(names, found.placements, strict=True)}
    return figures, detail | {"memory_mb_all_nodes": round(found.memory_mb)}


def main() -> None:
    """Measure one size; arguments: workers, then the leases wanted in each auction. Prints JSON."""
    workers, *leases = map(int, sys.argv[1:])
    directory = Path(tempfile.mkdtemp())
    trio.run(_place, directory, workers, leases, clock=trio.testing.MockClock(autojump_threshold=0))


if __name__ == "__main__":
    main()
