"""The machines of a simulated cluster: real role code, each on a clock, a disk and a network node of its own.

Machine ── incarnation n ──▶ VirtualRuntime, MemoryNetwork ──▶ its role, until it ends, crashes or is taken down
           what outlives a crash: MemoryDisk (minus what was not synced), the work directory on tmpfs
           what does not: its clock's zero; with `wipe` not even the disk, and then it is another node
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from hypha import gateway
from hypha.data_node import DataNode, open_datasets
from hypha.errors import StoreError
from hypha.network.seam import Network
from hypha.protocol.manifest import RoundCommitted
from hypha.protocol.resources import Resources
from hypha.protocol.slices import Grant
from hypha.scheduler.config import Config as SchedulerConfig
from hypha.scheduler.coordinator import Coordinator
from hypha.scheduler.hold import FOLDER as HOLD_FOLDER
from hypha.scheduler.hold import HeldByAnother, Hold
from hypha.scheduler.place import Place
from hypha.scheduler.records import Excluded, Granted, JobOpened, Record
from hypha.scheduler.service import Scheduler
from hypha.scheduler.store import Deposed, JobStore
from hypha.store.fences import FILE_NAME as FENCES_FILE
from hypha.store.fences import FenceFile
from hypha.store.memory_disk import Fault, MemoryDisk
from hypha.store.objects import DirectoryObjects
from hypha.worker.config import Config as WorkerConfig
from hypha.worker.config import ExecutorConfig, LeaseConfig, ResourcesConfig, TransferConfig
from hypha.worker.fences import FenceKeeper
from hypha.worker.jobs import JOB_DIRECTORY_PREFIX, remove_leftovers
from hypha.worker.service import Worker
from tests.sim.chronicle import Chronicle
from tests.sim.executors import Pace, SimExecutor, SimLauncher
from tests.sim.virtual import Clock, Power, VirtualRuntime

PEM = Path("unused.pem")
CAPACITY = Resources(cpu=1.0, memory=1.0, storage=1.0)
STALL_S = 12.0
# A machine's clock begins anew when it boots.
BOOT_S = 61.0


@contextmanager
def unseen(disk: MemoryDisk) -> Iterator[MemoryDisk]:
    """Look at a disk, or change it, without counting as an operation or being struck by a fault."""
    before = disk.plan, disk.operations, disk.capacity_bytes
    disk.plan, disk.capacity_bytes = {}, None
    try:
        yield disk
    finally:
        disk.plan, disk.operations, disk.capacity_bytes = before


class Machine:
    """One node's machine; `power` and `runtime` belong to its current incarnation."""

    role: str

    def __init__(self, name: str, directory: Path, *, rate: float = 1.0, offset: float = 0.0) -> None:
        self.name = name
        self.rate = rate
        self.offset = offset
        self.directory = directory
        self.disk = MemoryDisk(seed=sum(name.encode()))
        self.incarnation = -1
        self.is_up = False
        self.gone = False  # for ever: what comes back in its place is another node
        self.troubled_until = 0.0  # its disk may say no, and its role may end of it, until then
        self.power = Power()
        self.clock = Clock(rate=rate, offset=offset)
        self.runtime: VirtualRuntime
        directory.mkdir()

    @property
    def is_alive(self) -> bool:
        """Whether it runs: one that crashed is up until its tasks are gone, but does nothing that counts."""
        return self.is_up and not self.power.off

    def boot(self, fails: Callable[[], None]) -> None:
        """Begin the next incarnation; `fails` is told when the power goes in the midst of a write."""
        self.incarnation += 1
        self.power = Power(fails)
        offset = self.offset + BOOT_S * self.incarnation
        self.clock = Clock(rate=self.rate, offset=offset, since=trio.current_time())

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """Play the role until it ends."""
        raise NotImplementedError

    def crash(self) -> None:
        """The machine goes down: nothing is cleaned up, and what was not synced may be lost."""
        self.power.off = True
        self.disk.crash()

    def wipe(self) -> None:
        """It went down, and its disk is gone, too."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self.disk = MemoryDisk(seed=sum(self.name.encode()))


class GatewayMachine(Machine):
    """A gateway."""

    role = "gateway"

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """Serve."""
        await gateway.serve(network, runtime)


class DataMachine(Machine):
    """A data node; all serve the same dataset."""

    role = "data"
    dataset: Path

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """Serve the dataset."""
        await DataNode(network, runtime, open_datasets([self.dataset]), streams_max=8).run()


class WorkerMachine(Machine):
    """A worker with simulated executors."""

    role = "worker"
    ttl_s: float
    pace = Pace()
    worker: Worker | None = None
    launcher: SimLauncher | None = None
    stopping: trio.Event
    chronicle: Chronicle

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """As `hypha.worker.service.run`, with the in-memory network and disk."""
        with self.disk.lock(f"{FENCES_FILE}.lock"):
            fences = FenceKeeper(await runtime.run_blocking(FenceFile, self.disk, network.peer_id), runtime)
            remove_leftovers(self.directory)
            self.launcher = SimLauncher(runtime, self.pace, lambda what: self.chronicle.note(self.name, what))
            self.worker = Worker(network, runtime, self.config(), self.launcher, fences)
            self.stopping = trio.Event()
            await self.worker.run(stopping=self.stopping)

    def config(self) -> WorkerConfig:
        """A machine for one job at a time, impatient enough for short simulations."""
        return WorkerConfig(
            cert_pem=PEM,
            key_pem=PEM,
            trust_pem=PEM,
            work_dir=self.directory,
            resources=ResourcesConfig(cpu=CAPACITY.cpu, memory=CAPACITY.memory, storage=CAPACITY.storage, gpu=0.0),
            lease=LeaseConfig(offer_ttl_s=min(5.0, self.ttl_s), ttl_s=self.ttl_s),
            transfers=TransferConfig(stall_s=4.0, backoff_max_s=2.0),
            executors=(
                ExecutorConfig(work="train", name="sim", stall_s=STALL_S),
                ExecutorConfig(work="aggregate", name="parameter-server", runtime="parameter-server", stall_s=STALL_S),
            ),
            cache_bytes=1 << 20,
        )

    def executors(self) -> list[SimExecutor]:
        """What runs here, in the order of its starting."""
        return list(self.launcher.running.values()) if self.launcher is not None else []

    def work(self) -> set[str]:
        """The classes of what runs here."""
        return {executor.what.job.work for executor in self.executors()}

    def left_behind(self) -> list[str]:
        """Job directories that are still there."""
        return sorted(path.name for path in self.directory.glob(f"{JOB_DIRECTORY_PREFIX}*"))


class ShelvedObjects(DirectoryObjects):
    """Objects on a MemoryDisk, handed out as files where somebody wants to send one; `is_cut`: nobody answers."""

    shelf: Path
    is_cut = False
    on_beat: Callable[[str], None] = staticmethod(lambda _name: None)  # of a scheduler that holds the store

    def _reach(self) -> None:
        if self.is_cut:
            raise StoreError("the job's store does not answer")

    def create(self, name: str, chunks: Iterable[bytes]) -> None:
        """See `DirectoryObjects`."""
        self._reach()
        super().create(name, chunks)
        if name.startswith(f"{HOLD_FOLDER}/"):
            self.on_beat(name)

    def read(self, name: str) -> bytes:
        """See `DirectoryObjects`."""
        self._reach()
        return super().read(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """See `DirectoryObjects`."""
        self._reach()
        return super().chunks(name)

    def names(self, folder: str) -> list[str]:
        """See `DirectoryObjects`."""
        self._reach()
        return super().names(folder)

    def local_path(self, name: str) -> Path | None:
        """Copy the object to the shelf."""
        if name not in self.names(name.rpartition("/")[0]):
            return None
        path = self.shelf / name.replace("/", "-")
        if not path.exists():
            path.write_bytes(self.read(name))
        return path


class WatchedScheduler(Scheduler):
    """A scheduler whose state can be looked at: what its journal held when it was opened, and acknowledged since."""

    coordinator: Coordinator | None = None
    on_open: Callable[[list[Record]], None]
    on_write: Callable[[], None]
    on_record: Callable[[Record], None]
    on_commit: Callable[[], None]
    on_conflict: Callable[[], None]

    def _coordinator(self, *arguments: Any, **named: Any) -> Coordinator:
        self.coordinator = super()._coordinator(*arguments, **named)
        return self.coordinator

    async def _run_job(self, store: JobStore, *arguments: Any) -> None:
        self.on_open(store._journal.records)
        note = store.note

        def noted(*records: Record) -> None:
            self.on_write()
            note(*records)
            for record in records:
                self.on_record(record)

        self._watch_commits(store)
        store.note = noted  # type: ignore[method-assign]
        await super()._run_job(store, *arguments)

    def _watch_commits(self, store: JobStore) -> None:
        round_entry, commit = store.round_entry, store.commit

        def made(*about: Any, **named: Any) -> RoundCommitted:
            self.on_commit()
            return round_entry(*about, **named)

        def committed(entry: RoundCommitted) -> None:
            try:
                commit(entry)
            except Deposed:
                self.on_conflict()
                raise

        store.round_entry, store.commit = made, committed  # type: ignore[method-assign]


class SchedulerMachine(Machine):
    """A scheduler; `finished` once its job is. With `stands_by` it waits until the leader's hold lapses first."""

    role = "scheduler"
    config: SchedulerConfig
    scheduler: WatchedScheduler | None = None
    stands_by = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.finished = trio.Event()
        self.tears_journal: Fault | None = None  # strikes the next record
        self.acknowledged: list[Record] = []
        self.lost: str | None = None  # of what its journal had acknowledged
        self.excluded: set[tuple[str, int, int]] = set()  # (peer, fence, round), durably
        self.granted: set[Grant] = set()  # durably
        self.holds_as = self.name  # its identity
        self.on_turn: Callable[[], None] = lambda: None
        self.on_refusal: Callable[[], None] = lambda: None  # it was to lead at once, and another does
        self.on_commit: Callable[[], None] = lambda: None  # an outer step's entry is made next
        self.on_conflict: Callable[[], None] = lambda: None  # it cannot be: another made one of that number
        self.on_beat: Callable[[str], None] = lambda _name: None  # it holds the store
        self.keep_objects_on(self.disk)

    def keep_objects_on(self, disk: MemoryDisk) -> None:
        """Have the job's store there."""
        self.objects = ShelvedObjects(disk, new_id=lambda: self.runtime.new_id())
        self.objects.shelf = self.directory / "shelf"
        self.objects.shelf.mkdir(exist_ok=True)
        self.objects.on_beat = lambda name: self.on_beat(name)

    @property
    def job_epoch(self) -> int:
        """Of the newest job epoch that it began, 0 before it has."""
        coordinator = self.scheduler.coordinator if self.scheduler is not None else None
        return coordinator.book.job_epoch if coordinator is not None else 0

    @property
    def is_leading(self) -> bool:
        """Whether it has begun a job epoch in this incarnation."""
        return self.is_alive and self.scheduler is not None and self.scheduler.coordinator is not None

    def wipe(self) -> None:
        """Its journal is gone; the job's store is elsewhere."""
        super().wipe()
        self.acknowledged.clear()
        self.granted.clear()
        self.objects.shelf.mkdir()

    def _opened(self, records: list[Record]) -> None:
        kept = [record for record in records if not isinstance(record, JobOpened)]
        if kept[: len(self.acknowledged)] != self.acknowledged:
            self.lost = f"{len(kept)} records are in the journal, {len(self.acknowledged)} were acknowledged"
        # What was under way when it went down may have been written, or not.
        self.acknowledged = kept

    def _writes(self) -> None:
        if self.tears_journal is not None:
            self.disk.plan[self.disk.operations] = self.tears_journal
            self.tears_journal = None

    def _noted(self, record: Record) -> None:
        self.acknowledged.append(record)
        match record:
            case Excluded(exclude=exclude):
                self.excluded.add((exclude.peer_id, exclude.fence, exclude.round))
            case Granted(grant=grant):
                self.granted.add(grant)

    def clear_shelf(self) -> None:
        """Have what is sent read from the store again."""
        for path in self.objects.shelf.iterdir():
            path.unlink()

    def waiting(self) -> str:
        """What the job waits for, in its own words."""
        coordinator = self.scheduler.coordinator if self.scheduler is not None else None
        return coordinator.waiting if coordinator is not None else "a start"

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """Run the job to its end."""
        self.scheduler = None
        hold = Hold(self.objects, runtime, scheduler=self.holds_as, hold_s=self.config.scheduler.hold_s)
        if self.stands_by or not await self._takes(hold, runtime):
            await hold.lapsed()
            self.on_turn()
        downloads = self.directory / f"downloads-{self.incarnation}"
        downloads.mkdir()
        place = Place(disk=self.disk, objects=self.objects, directory=downloads)
        self.scheduler = WatchedScheduler(network, runtime, self.config, place)
        self.scheduler._hold = hold
        self.scheduler.on_open, self.scheduler.on_record = self._opened, self._noted
        self.scheduler.on_write = self._writes
        self.scheduler.on_commit, self.scheduler.on_conflict = self.on_commit, self.on_conflict
        await self.scheduler.run()
        self.finished.set()

    async def _takes(self, hold: Hold, runtime: VirtualRuntime) -> bool:
        try:
            await runtime.run_blocking(hold.take)
        except HeldByAnother:
            self.on_refusal()
            return False
        return True


class TwinMachine(SchedulerMachine):
    """A second scheduler, started by mistake on the disk of one that runs."""

    def share(self, first: SchedulerMachine) -> None:
        """Use the other's state directory."""
        self.disk, self.config, self.holds_as = first.disk, first.config, first.name
        self.objects, self.acknowledged = first.objects, first.acknowledged

    def crash(self) -> None:
        """The process ends; the machine, which is the other's, does not."""
        self.power.off = True
