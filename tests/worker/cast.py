"""Who plays in the worker's tests: one worker's sessions on the in-memory network, between a scheduler and servers.

async with stage(tmp_path) as here:  here.train() / here.aggregate() ─▶ a session that runs, with its JobContext
                                     here.scheduler, here.peers["p-1"] ─▶ networks whose handlers the test registers
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio
from blake3 import blake3

from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.network.memory_node import MemoryNetwork
from hypha.protocol.bridge import Event, FileRef, SendUpdate
from hypha.protocol.job import DatasetRef, InnerOptimizer, JobSpec, ModelSpec, OuterOptimizer, Rounds
from hypha.protocol.messages import Interval, Member, RoundView
from hypha.worker.aggregator import AggregateSession
from hypha.worker.cache import SliceCache
from hypha.worker.config import TransferConfig
from hypha.worker.session import JobContext, Session
from hypha.worker.trainer import TrainSession
from tests.sim.virtual import VirtualRuntime

SCHEDULER, WORKER, SERVER = "sched", "work", "serv"
STALL_S = 60.0
TRANSFERS = TransferConfig(stall_s=10.0)


def digest_of(data: bytes | str) -> str:
    return blake3(data if isinstance(data, bytes) else data.encode()).hexdigest()


def job_spec(work: str = "train", **changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "job_id": "job-1",
        "work": work,
        "executor": "x",
        "model": ModelSpec(type="torch", config={}),
        "dataset": DatasetRef(name="d", manifest_digest="0" * 64, schema={}),
        "inner": InnerOptimizer(),
        "outer": OuterOptimizer(),
        "rounds": Rounds(updates=1, samples_between_updates=1),
    }
    return JobSpec(**fields | changes)


def member(peer_id: str, *, fence: int = 1) -> Member:
    return Member(peer_id=peer_id, fence=fence, lease_id=f"lease-{peer_id}")


def view(number: int = 1, **changes: Any) -> RoundView:
    fields: dict[str, Any] = {
        "job_id": "job-1",
        "job_epoch": 1,
        "view": number,
        "round": 1,
        "base_digest": digest_of("model 0"),
        "members": (member(WORKER),),
        "servers": (member(SERVER),),
        "server_addresses": (),
        "deadline_s": 60.0,
        "committed_round": 0,
        "committed_digest": digest_of("model 0"),
    }
    return RoundView(**fields | changes)


def file_ref(directory: Path, name: str, data: bytes) -> FileRef:
    (directory / name).write_bytes(data)
    return FileRef(path=name, bytes=len(data), digest=digest_of(data))


def update_of(file: FileRef, *, round: int = 1, base: str = "model 0", samples: int = 2) -> SendUpdate:
    interval = Interval(epoch=0, slice=0, start=0, stop=samples)
    intervals = (interval,) if samples else ()
    return SendUpdate(round=round, base_digest=digest_of(base), files=(file,), samples=samples, intervals=intervals)


class Stage:
    """One worker's network and what its sessions need."""

    def __init__(self, fabric: MemoryFabric, network: MemoryNetwork, directory: Path, nursery: trio.Nursery) -> None:
        self.fabric = fabric
        self.network = network
        self.runtime = VirtualRuntime(fabric.seed, network.peer_id)
        self.directory = directory
        self.cache = SliceCache(directory / "cache", bytes_max=1 << 20, runtime=self.runtime)
        self.peers: dict[str, MemoryNetwork] = {}
        self._nursery = nursery

    @property
    def scheduler(self) -> MemoryNetwork:
        return self.peers[SCHEDULER]

    @property
    def server(self) -> MemoryNetwork:
        return self.peers[SERVER]

    def context(self, spec: JobSpec) -> JobContext:
        directory = self.directory / f"hypha-{spec.job_id}-{spec.work}"
        directory.mkdir()
        return JobContext(
            network=self.network,
            runtime=self.runtime,
            job=spec,
            scheduler=SCHEDULER,
            lease_id=f"lease-{self.network.peer_id}",
            fence=1,
            job_epoch=1,
            directory=directory,
            transfers=TRANSFERS,
            cache=self.cache,
            stall_s=STALL_S,
        )

    def train(self, **changes: Any) -> TrainSession:
        return self._running(TrainSession(self.context(job_spec("train", **changes))))

    def aggregate(self, **changes: Any) -> AggregateSession:
        return self._running(AggregateSession(self.context(job_spec("aggregate", **changes))))

    def _running(self, session: Any) -> Any:
        self._nursery.start_soon(session.run)
        return session

    def start_soon(self, function: Any, *arguments: Any) -> None:
        self._nursery.start_soon(function, *arguments)


@asynccontextmanager
async def stage(
    directory: Path, *, worker: str = WORKER, peers: tuple[str, ...] = (SERVER,), profile: FaultProfile | None = None
) -> AsyncIterator[Stage]:
    fabric = MemoryFabric(1, profile)
    async with trio.open_nursery() as nursery, fabric.node(worker, {"worker"}) as network:
        here = Stage(fabric, network, directory, nursery)
        await here.cache.open()
        async with fabric.node(SCHEDULER, {"scheduler"}) as here.peers[SCHEDULER]:
            for peer_id in peers:
                here.peers[peer_id] = await nursery.start(_up, fabric, peer_id)
            yield here
            nursery.cancel_scope.cancel()


async def _up(fabric: MemoryFabric, peer_id: str, *, task_status: trio.TaskStatus[MemoryNetwork]) -> None:
    async with fabric.node(peer_id, {"worker", "data"}) as network:
        task_status.started(network)
        await trio.sleep_forever()


class Listener:
    """The executor's ear: every event so far, and a wait for the next of a kind."""

    def __init__(self, here: Stage, session: Session) -> None:
        self.heard: list[Event] = []
        self._more = trio.Event()
        here.start_soon(self._listen, session)

    async def _listen(self, session: Session) -> None:
        async for event in session.events():
            self.heard.append(event)
            self._more.set()
            self._more = trio.Event()

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.heard]

    async def next(self, kind: type[Event], *, after: int = 0) -> Any:
        """The event number `after` of that kind, waited for."""
        while len(found := [event for event in self.heard if isinstance(event, kind)]) <= after:
            await self._more.wait()
        return found[after]


class Heard(list[Any]):
    """Messages that a handler took, answered with what `answer` makes of them."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self._any = trio.Event()

    async def first(self) -> Any:
        """The first message, waited for."""
        await self._any.wait()
        return self[0]

    async def __call__(self, _peer: Any, message: Any) -> Any:
        self.append(message)
        self._any.set()
        made = self.answer(message) if callable(self.answer) else self.answer
        if isinstance(made, BaseException):
            raise made
        return made


def fields(message: Any, *names: str) -> tuple[Any, ...]:
    return tuple(msgspec.structs.asdict(message)[name] for name in names)
