"""Who plays in the tests of leases: workers without jobs and schedulers without rounds, on the in-memory network.

async with cast.worker("w-1", cpu=2) as worker, cast.scheduler("s") as scheduler: …
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hypha.errors import Refused
from hypha.network.memory import MemoryFabric
from hypha.network.seam import Network, Peer
from hypha.protocol.auction import OfferConfig
from hypha.protocol.lease import Gone, Kept, Ledger, Sender, Stale
from hypha.protocol.messages import (
    Ack,
    Ask,
    Choice,
    LeaseGone,
    LeaseMessage,
    ReleaseLease,
    Renewed,
    RenewLease,
    WorkerOffer,
)
from hypha.protocol.messages import TaskAdvertisement as Advertisement
from hypha.protocol.resources import Resources
from hypha.scheduler.pool import LeasedWorker, NotHeld, Pool
from hypha.store.fences import FenceFile
from hypha.store.memory_disk import MemoryDisk
from hypha.worker.arbiter import Arbiter
from hypha.worker.config import Config, ExecutorConfig, LeaseConfig
from hypha.worker.fences import FenceKeeper
from tests.sim.virtual import Clock, VirtualRuntime

TRAIN = ExecutorConfig(work="train", name="diloco-transformer")
AGGREGATE = ExecutorConfig(work="aggregate", name="parameter-server", runtime="parameter-server")
TTL_S = 30.0
OFFER_TTL_S = 5.0
ONE_CPU = Resources(cpu=1)
FLEXIBLE = OfferConfig()


def worker_config(offer: OfferConfig, executors: tuple[ExecutorConfig, ...]) -> Config:
    pem = Path("unused.pem")
    return Config(
        cert_pem=pem,
        key_pem=pem,
        trust_pem=pem,
        offer=offer,
        lease=LeaseConfig(offer_ttl_s=OFFER_TTL_S, ttl_s=TTL_S),
        executors=executors,
    )


class Worker:
    """The part of a worker that leases out what it has."""

    def __init__(self, network: Network, runtime: VirtualRuntime, config: Config, capacity: Resources) -> None:
        self.network = network
        self.runtime = runtime
        self.disk = MemoryDisk()
        self.ledger = Ledger(capacity)
        fences = FenceKeeper(FenceFile(self.disk, network.peer_id), runtime)
        self.arbiter = Arbiter(network, runtime, self.ledger, fences, config)
        network.serve(RenewLease, self._renew, roles=frozenset({"scheduler"}))
        network.serve(ReleaseLease, self._release, roles=frozenset({"scheduler"}))

    @property
    def free(self) -> Resources:
        return self.ledger.free(self.runtime.now())

    def leases(self) -> list[tuple[str, str]]:
        """(holder, state) of every lease."""
        return [(lease.holder, lease.state.value) for lease in self.ledger.leases(self.runtime.now())]

    async def _renew(self, peer: Peer, message: RenewLease) -> Renewed | LeaseGone:
        match self.ledger.renew(message.lease_id, sender(peer, message), ttl_s=TTL_S, now=self.runtime.now()):
            case Kept(remaining_s=remaining_s):
                return Renewed(lease_id=message.lease_id, remaining_s=remaining_s)
            case Gone(reason=reason):
                return LeaseGone(lease_id=message.lease_id, reason=reason)
            case Stale(reason=reason):
                raise Refused(reason, "stale")

    async def _release(self, peer: Peer, message: ReleaseLease) -> Ack:
        self.ledger.release(message.lease_id, sender(peer, message), reason=message.reason, now=self.runtime.now())
        return Ack()


class Scheduler:
    """The part of a scheduler that holds leases; `deaths` is what the pool told."""

    def __init__(self, network: Network, runtime: VirtualRuntime, job_epoch: int) -> None:
        self.network = network
        self.runtime = runtime
        self.deaths: list[tuple[str, str]] = []
        self.pool = Pool(network, runtime, job_epoch=job_epoch, died=self._died)

    def _died(self, worker: LeasedWorker, reason: str) -> None:
        self.deaths.append((worker.member.peer_id, reason))

    async def lease_from(self, worker: Worker, *, job_epoch: int = 1) -> LeasedWorker | NotHeld:
        """Grant an offer there and accept it here, without an auction."""
        offer = offered(worker, self.network.peer_id, job_epoch=job_epoch)
        return await self.pool.accept(
            worker.network.peer_id,
            offer,
            work="train",
            executor=TRAIN.name,
            price=1.0,
            received_at=self.runtime.now(),
        )


class Cast:
    """Makes them, all on one fabric."""

    def __init__(self, fabric: MemoryFabric) -> None:
        self.fabric = fabric

    def runtime(self, name: str, **clock: float) -> VirtualRuntime:
        return VirtualRuntime(self.fabric.seed, name, gate=self.fabric.gate(name), clock=Clock(**clock))

    @asynccontextmanager
    async def worker(
        self,
        name: str,
        *,
        cpu: float = 1,
        offer: OfferConfig = FLEXIBLE,
        executors: tuple[ExecutorConfig, ...] = (TRAIN, AGGREGATE),
        **clock: float,
    ) -> AsyncIterator[Worker]:
        async with self.fabric.node(name, {"worker"}) as network, trio.open_nursery() as nursery:
            worker = Worker(network, self.runtime(name, **clock), worker_config(offer, executors), Resources(cpu=cpu))
            await nursery.start(worker.arbiter.run)
            yield worker
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def scheduler(self, name: str = "s", *, job_epoch: int = 1, **clock: float) -> AsyncIterator[Scheduler]:
        async with self.fabric.node(name, {"scheduler"}) as network, trio.open_nursery() as nursery:
            scheduler = Scheduler(network, self.runtime(name, **clock), job_epoch)
            await nursery.start(scheduler.pool.run)
            yield scheduler
            nursery.cancel_scope.cancel()


def sender(peer: Peer, message: LeaseMessage[Any]) -> Sender:
    return Sender(peer=peer.peer_id, fence=message.fence, job_epoch=message.job_epoch, attempt=message.attempt)


def offered(worker: Worker, holder: str, *, job_epoch: int = 1) -> WorkerOffer:
    """A temporary lease on one core, as the offer that the holder receives."""
    now = worker.runtime.now()
    fence = len(worker.ledger.leases(now)) + int(now * 1000) + 1
    lease = worker.ledger.grant(
        worker.runtime.new_id(), holder, ONE_CPU, ttl_s=OFFER_TTL_S, fence=fence, now=now, job_epoch=job_epoch
    )
    return WorkerOffer(
        advertisement_id="none",
        choices=(Choice(ask=0, price=1.0),),
        lease_id=lease.lease_id,
        fence=lease.fence,
        resources=lease.resources,
        ttl_s=OFFER_TTL_S,
        addresses=worker.network.signed_addresses(),
    )


def ask(work: str = "train", *, count: int = 1, bid: float = 1.0, cpu: float = 1) -> Ask:
    executor = {"train": TRAIN.name, "aggregate": AGGREGATE.name}[work]
    return Ask(work=work, executor=executor, resources=Resources(cpu=cpu), count=count, bid=bid)


def advertised(scheduler: Network, name: str, *asks: Ask, **fields: Any) -> Advertisement:
    known = {
        "scheduler": scheduler.peer_id,
        "addresses": scheduler.signed_addresses(),
        "job_id": f"job-{name}",
        "job_epoch": 1,
        "welcome_s": 2.0,
    }
    return Advertisement(advertisement_id=name, asks=asks or (ask(),), **(known | fields))
