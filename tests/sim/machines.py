"""The machines of a simulated cluster: real role code, each on a clock, a disk and a network node of its own.

Machine ── incarnation n ──▶ VirtualRuntime, MemoryNetwork ──▶ its role, until it ends, crashes or is taken down
           what outlives a crash: MemoryDisk (minus what was not synced), the work directory on tmpfs
"""

from pathlib import Path
from typing import Any

import trio

from hypha import gateway
from hypha.data_node import DataNode, open_datasets
from hypha.network.seam import Network
from hypha.protocol.resources import Resources
from hypha.scheduler.config import Config as SchedulerConfig
from hypha.scheduler.coordinator import Coordinator
from hypha.scheduler.place import Place
from hypha.scheduler.service import Scheduler
from hypha.store.fences import FILE_NAME as FENCES_FILE
from hypha.store.fences import FenceFile
from hypha.store.memory_disk import MemoryDisk
from hypha.store.objects import DirectoryObjects
from hypha.worker.config import Config as WorkerConfig
from hypha.worker.config import ExecutorConfig, LeaseConfig, ResourcesConfig, TransferConfig
from hypha.worker.fences import FenceKeeper
from hypha.worker.jobs import JOB_DIRECTORY_PREFIX, remove_leftovers
from hypha.worker.service import Worker
from tests.sim.chronicle import Chronicle
from tests.sim.executors import Pace, SimExecutor, SimLauncher
from tests.sim.virtual import Power, VirtualRuntime

PEM = Path("unused.pem")
CAPACITY = Resources(cpu=1.0, memory=1.0, storage=1.0)
STALL_S = 12.0


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
        self.power = Power()
        self.runtime: VirtualRuntime
        directory.mkdir()

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """Play the role until it ends."""
        raise NotImplementedError

    def crash(self) -> None:
        """The machine goes down: nothing is cleaned up, and what was not synced may be lost."""
        self.power.off = True
        self.disk.crash()


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
            fences = FenceKeeper(FenceFile(self.disk, network.peer_id), runtime)
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
    """Objects on a MemoryDisk, handed out as files where somebody wants to send one."""

    shelf: Path

    def local_path(self, name: str) -> Path | None:
        """Copy the object to the shelf."""
        if name not in self.names(name.rpartition("/")[0]):
            return None
        path = self.shelf / name.replace("/", "-")
        if not path.exists():
            path.write_bytes(self.read(name))
        return path


class WatchedScheduler(Scheduler):
    """A scheduler whose state can be looked at."""

    coordinator: Coordinator | None = None

    def _coordinator(self, *arguments: Any, **named: Any) -> Coordinator:
        self.coordinator = super()._coordinator(*arguments, **named)
        return self.coordinator


class SchedulerMachine(Machine):
    """A scheduler; `finished` once its job is."""

    role = "scheduler"
    config: SchedulerConfig
    scheduler: WatchedScheduler | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.finished = trio.Event()
        self.objects = ShelvedObjects(self.disk, new_id=lambda: self.runtime.new_id())
        self.objects.shelf = self.directory / "shelf"
        self.objects.shelf.mkdir()

    def waiting(self) -> str:
        """What the job waits for, in its own words."""
        coordinator = self.scheduler.coordinator if self.scheduler is not None else None
        return coordinator.waiting if coordinator is not None else "a start"

    async def main(self, network: Network, runtime: VirtualRuntime) -> None:
        """Run the job to its end."""
        downloads = self.directory / f"downloads-{self.incarnation}"
        downloads.mkdir()
        place = Place(disk=self.disk, objects=self.objects, directory=downloads)
        self.scheduler = WatchedScheduler(network, runtime, self.config, place)
        await self.scheduler.run()
        self.finished.set()
