"""A simulated cluster that a test directs: real roles, virtual time, and a script that waits for what they say.

stage = Stage(tmp_path, trainers=2, quorum=2)
stage.play(script)        async def script(stage): await stage.said("Round opened", "round=2"); stage.crash_now(…)
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from hypha.network.seam import Network
from hypha.protocol.manifest import JobEpochStarted, RoundCommitted, from_bytes
from hypha.protocol.messages import Health, HealthReport
from hypha.scheduler.config import Config, JobResources
from hypha.scheduler.coordinator import Coordinator
from hypha.store.chain import Chain
from tests.sim.cluster import Cluster, M
from tests.sim.machines import WorkerMachine
from tests.sim.scenario import Scenario
from tests.sim.virtual import run_seeded

# Virtual; no script needs more, whatever goes wrong.
PATIENCE_S = 600.0
QUIET = {"seed": 0, "flavour": "directed", "trainers": 2, "spares": 0, "rounds": 2, "samples": 24, "evaluate_every": 1}


class Stage(Cluster):
    """`resources` changes what the job asks for, `worker` is the workers' machine; the test starts `absent`."""

    def __init__(
        self,
        root: Path,
        *,
        resources: dict[str, Any] | None = None,
        worker: type[WorkerMachine] = WorkerMachine,
        absent: str = "",
        **scenario: Any,
    ) -> None:
        self._resources = resources or {}
        self._worker = worker
        self._absent = absent
        self._heard = trio.Event()
        super().__init__(Scenario(**(QUIET | scenario)), root)
        self.chronicle.watch(self._hear)

    def _add(self, kind: type[M], name: str) -> M:
        return super()._add(self._worker if kind is WorkerMachine else kind, name)  # type: ignore[arg-type,return-value]

    def _config(self) -> Config:
        config = super()._config()
        job = config.scheduler.job
        wanted = msgspec.convert(msgspec.structs.asdict(job.resources) | self._resources, JobResources)
        return replace(config, scheduler=replace(config.scheduler, job=replace(job, resources=wanted)))

    def start(self, name: str) -> None:
        """See `Cluster.start`; the absent machine waits for the second call."""
        if name == self._absent:
            self._absent = ""
        else:
            super().start(name)

    def _hear(self) -> None:
        self._heard.set()

    # --- directing ------------------------------------------------------------------------------------------------

    def play(self, script: Callable[["Stage"], Awaitable[None]]) -> None:
        """Run the script beside the cluster."""
        run_seeded(self.scenario.seed, self._play, script)

    async def _play(self, script: Callable[["Stage"], Awaitable[None]]) -> None:
        async with self.running():
            with trio.fail_after(PATIENCE_S):
                await script(self)

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait; asked again after each event."""
        while not happened():
            self._heard = trio.Event()
            await self._heard.wait()

    async def said(self, *words: str) -> str:
        """Wait for a line that holds all these words and return it."""
        await self.until(lambda: bool(self.lines(*words)))
        return self.lines(*words)[0]

    def lines(self, *words: str) -> list[str]:
        """Every line so far that holds all these words."""
        return [line for line in self.chronicle.lines if all(word in line for word in words)]

    def crash_now(self, name: str, *, silent: bool = False) -> None:
        """Let a machine go down; `start` brings it up again."""
        self.machines[name].crash()
        self.fabric.crash(name, silent=silent)

    async def restart(self, name: str, *, after_s: float = 0.5) -> None:
        """Let a machine go down and come up again."""
        self.crash_now(name)
        await self.until(lambda: not self.machines[name].is_up)
        await trio.sleep(after_s)
        self.start(name)

    async def done(self) -> None:
        """Wait for the end of the job; fails with whatever broke on the way."""
        await self.finish()
        assert self.broken is None, str(self.broken)

    async def failed(self) -> str:
        """Wait until the job has failed and return why."""
        await self.until(lambda: self.broken is not None)
        return str(self.broken)

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def job(self) -> Coordinator:
        """The job as the scheduler leads it."""
        assert self.scheduler.scheduler is not None
        coordinator = self.scheduler.scheduler.coordinator
        assert coordinator is not None
        return coordinator

    def network(self, name: str) -> Network:
        """A worker's own access to the network."""
        machine = self.machines[name]
        assert isinstance(machine, WorkerMachine)
        assert machine.worker is not None
        return machine.worker._network

    async def health(self) -> HealthReport:
        """What the scheduler says of itself to a worker that asks."""
        asker = next(worker.name for worker in self.workers if worker.is_up)
        return await self.network(asker).request("scheduler", Health())

    def chain(self) -> list[JobEpochStarted | RoundCommitted]:
        """Every entry of the chain, as it lies in the store."""
        return [from_bytes(link.payload) for link in Chain(self.scheduler.objects).load()]

    def rounds(self) -> list[RoundCommitted]:
        """The committed rounds."""
        return [entry for entry in self.chain() if isinstance(entry, RoundCommitted)]

    def trainers(self) -> list[str]:
        """Names of the workers that train now."""
        return [machine.name for machine in self.working("train")]

    def server(self) -> str:
        """Name of the parameter server."""
        return self.working("aggregate")[0].name
