"""A whole cluster in one process and in virtual time: it starts, runs a job, has faults, heals and is looked over.

    Scenario(faults=(Fault(at_s=3.0, kind="crash-worker-2", for_s=5.0), Fault(…)))   drawn from a seed, or written down
        └─▶ Cluster(scenario, root) ─▶ running(), finish() ─▶ broken, chronicle, situations

Everything that happens is in `chronicle`; after every line of it the invariants are checked.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from hypha.errors import HyphaError, StoreError
from hypha.network.memory import MemoryFabric
from hypha.protocol.codec import decode
from hypha.protocol.job import ModelSpec, OuterOptimizer, Rounds
from hypha.protocol.messages import Merged
from hypha.protocol.resources import Resources
from hypha.scheduler.config import CheckpointConfig, JobConfig, JobResources, SchedulerTable
from hypha.scheduler.config import Config as SchedulerConfig
from hypha.scheduler.store import Deposed
from hypha.store.memory_disk import MemoryDisk
from tests.sim import dataset
from tests.sim.aftermath import look_over
from tests.sim.broken import Broken
from tests.sim.chronicle import NODE, Chronicle
from tests.sim.echoes import Echoes
from tests.sim.executors import Pace, SimExecutor
from tests.sim.flavours import CALM
from tests.sim.invariants import Invariants
from tests.sim.kinds import CLOCK_OFF, SLOW_DISK
from tests.sim.machines import PEM, DataMachine, GatewayMachine, Machine, SchedulerMachine, TwinMachine, WorkerMachine
from tests.sim.scenario import HOLD_S, SLOW_DISK_S, Scenario
from tests.sim.situations import Situations
from tests.sim.strikes import Strikes
from tests.sim.virtual import NodeCrashed, VirtualRuntime
from tests.sim.wall import Wall

# A seed that does more than this goes round in circles.
EVENTS_MAX = 150_000
# After the job is over: time to say goodbye, to kill executors and for leases to be given back.
GOODBYE_TTLS = 2.5
MODEL_SEED = 7
OUTER = OuterOptimizer(learning_rate=0.7, momentum=0.9)
# Whoever watches over a scheduler starts it again so long after it ended.
SUPERVISED_S = 1.0
# A second scheduler on one journal is refused sooner.
TWIN_S = 5.0
POLL_S = 0.1
# Requests at whose answers nobody looks are not decoded twice; the tag is near a message's beginning.
UNWATCHED = (b"\x68Progress", b"\x69Collected", b"\x6cReleaseLease", b"\x6bDispatchJob")
TAG_BYTES = 32
# A clock this much off its rate counts as one that is.
CLOCK_OFF_SHARE = 0.01


M = TypeVar("M", bound=Machine)


class Cluster:
    """See the module's docstring. `broken` is the first invariant that did not hold."""

    def __init__(self, scenario: Scenario, root: Path) -> None:
        self.scenario = scenario
        self.chronicle = Chronicle(str(root))
        self.fabric = MemoryFabric(scenario.seed, scenario.profile)
        self.machines: dict[str, Machine] = {}
        self.broken: Broken | None = None
        self.wall = Wall()
        self.joined: set[str] = set()
        self.decayed = False  # a checkpoint was
        self.power_lost: Callable[[Machine], None] = self.take_down
        self._root = root
        self._over = trio.Event()
        self._nursery: trio.Nursery
        self._striking = trio.CancelScope()
        self._build()
        self.situations = Situations(self)
        self.invariants = Invariants(self)
        self.strikes = Strikes(self)
        self.echoes = Echoes(self)
        self.fabric.on_event(self.chronicle.network)
        self.fabric.on_answer(self._answered)
        self.chronicle.watch(self._check)

    # --- building -------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        scenario = self.scenario
        files = dataset.write(self._root / "dataset", scenario.slices)
        for number in range(scenario.gateways):
            self._add(GatewayMachine, f"gateway-{number}")
        for number in range(scenario.data_nodes):
            self._add(DataMachine, f"data-{number}").dataset = files
        for number in range(scenario.trainers + scenario.parameter_servers + scenario.spares):
            self._add_worker(f"worker-{number}", number)
        first = self._add(SchedulerMachine, "scheduler")
        first.config = self._config()
        self._watch_commits(first)
        self.store = first.disk
        if scenario.standby:
            self._share_store(first)

    def _add_worker(self, name: str, number: int) -> None:
        worker, paces = self._add(WorkerMachine, name), self.scenario.paces
        worker.ttl_s, worker.chronicle = self.scenario.ttl_s, self.chronicle
        if paces and (number < len(paces) or name in self.joined):
            worker.pace = Pace(batch_s=paces[number % len(paces)])

    def _share_store(self, first: SchedulerMachine) -> None:
        """Put the job's store where two schedulers reach it."""
        self.store = MemoryDisk(seed=self.scenario.seed)
        second = self._add(SchedulerMachine, "standby")
        second.config, second.stands_by = first.config, True
        self._watch_commits(second)
        for each in (first, second):
            each.keep_objects_on(self.store)
            each.on_turn = lambda: self.reach("standby take-over")
            each.on_refusal = lambda: self.reach("started while another leads")

    def _watch_commits(self, machine: SchedulerMachine) -> None:
        machine.on_commit = lambda: self.strikes.happens("committer", machine.name)
        machine.on_conflict = lambda: self.reach("entry of the chain lost to another")
        machine.on_beat = lambda name: self._look(lambda: self.invariants.held(machine.name, name))

    def _add(self, kind: type[M], name: str) -> M:
        rates = self.scenario.rates
        rate = rates[len(self.machines)] if len(self.machines) < len(rates) else 1.0
        # Nobody's clock shows what another's shows.
        machine = kind(name, self._root / name, rate=rate, offset=1000.0 * len(self.machines))
        self.machines[name] = machine
        if abs(rate - 1) > CLOCK_OFF_SHARE:
            self.chronicle.faults[CLOCK_OFF] += 1
        return machine

    def _config(self) -> SchedulerConfig:
        scenario = self.scenario
        job = JobConfig(
            model=ModelSpec(type="torch", config={}, seed=MODEL_SEED),
            dataset=dataset.NAME,
            outer_optimizer=OUTER,
            rounds=Rounds(
                updates=scenario.rounds,
                samples_between_updates=scenario.samples,
                max_batch_size=scenario.batch,
                deadline_s=scenario.deadline_s,
                quorum=scenario.quorum,
                evaluate_every=scenario.evaluate_every,
            ),
            resources=JobResources(
                workers=scenario.trainers,
                min_workers=1,
                max_workers=scenario.trainers + scenario.growth,
                parameter_servers=scenario.parameter_servers,
                executor="sim",
                worker=Resources(cpu=1.0),
                parameter_server=Resources(cpu=1.0),
            ),
            checkpoint=CheckpointConfig(every=scenario.checkpoint_every, keep=2),
            streaming=scenario.streaming,
        )
        table = SchedulerTable(job=job, welcome_s=1.0, retry_s=0.5, patience_s=2.0, hold_s=HOLD_S)
        return SchedulerConfig(cert_pem=PEM, key_pem=PEM, trust_pem=PEM, scheduler=table)

    # --- running --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Cluster"]:
        """Start everything; whatever still runs is taken down at the end."""
        with self.chronicle.listening(), self.wall.shown():
            async with trio.open_nursery() as self._nursery:
                for name in list(self.machines):
                    self.start(name)
                self._nursery.start_soon(self._strike_all)
                if self.scenario.disk_s >= SLOW_DISK_S:
                    self.chronicle.struck(SLOW_DISK, "scheduler", f"takes {self.scenario.disk_s:g} s for each write")
                yield self
                self._nursery.cancel_scope.cancel()

    def start(self, name: str) -> None:
        """Start a machine, or start it again."""
        self._nursery.start_soon(self._live, self.machines[name])

    async def _live(self, machine: Machine) -> None:
        machine.boot(lambda: self.power_lost(machine))
        machine.runtime = VirtualRuntime(
            self.scenario.seed,
            machine.name,
            incarnation=machine.incarnation,
            clock=machine.clock,
            blocking_s=self.scenario.disk_s if machine.role == "scheduler" else self.scenario.blocking_s,
            gate=self.fabric.gate(machine.name),
            power=machine.power,
        )
        NODE.set(machine.name)
        machine.is_up = True
        try:
            async with self.fabric.node(machine.name, {machine.role}) as network:
                await machine.main(network, machine.runtime)
        except* NodeCrashed:
            pass
        except* HyphaError as errors:
            self.chronicle.note(machine.name, f"role ended: {_words(errors)}")
            self._ended(machine, errors)
        finally:
            machine.is_up = False

    def _ended(self, machine: Machine, errors: BaseExceptionGroup[HyphaError]) -> None:
        """A role ended with an error: where the reason may be over by then, it is started again."""
        troubled, deposed = trio.current_time() < machine.troubled_until, errors.subgroup(Deposed) is not None
        if isinstance(machine, TwinMachine):
            if "in use by another process" in _words(errors):
                self.reach("second scheduler on one journal refused")
        elif deposed and self.scenario.standby and isinstance(machine, SchedulerMachine):
            self.reach("deposed scheduler")
            machine.stands_by = True
            self._nursery.start_soon(self._supervise, machine)
        elif errors.subgroup(StoreError) is not None and troubled:
            self.reach("started again after a disk error")
            self._nursery.start_soon(self._supervise, machine)
        elif isinstance(machine, SchedulerMachine):
            self._break("the job failed", _words(errors))

    async def _supervise(self, machine: Machine) -> None:
        await trio.sleep(SUPERVISED_S)
        self.start_again(machine)

    async def finish(self) -> None:
        """Wait for the end of the job, for as long as it may take, and look the cluster over."""
        scenario = self.scenario
        with trio.move_on_after(scenario.healed_at_s + scenario.patience_s) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._heal)
                nursery.start_soon(self._end_with, nursery)
                await self._finished()
                nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            waited = "; ".join(each.waiting() for each in self.schedulers)
            self._break("L7 progress returns after the network heals", f"not finished in time; waiting for: {waited}")
        self._striking.cancel()
        self._make_whole()
        if self.broken is None:
            await trio.sleep(GOODBYE_TTLS * scenario.ttl_s)
            self._look(lambda: look_over(self))

    async def _finished(self) -> None:
        while not any(each.finished.is_set() for each in self.schedulers):  # noqa: ASYNC110 - virtual time
            await trio.sleep(POLL_S)

    def _make_whole(self) -> None:
        """End every fault that is still there: what stands still goes on, what is cut heals, what is down starts."""
        self.fabric.calm(CALM)
        self.fabric.heal()
        for machine in self.machines.values():
            if self.fabric.gate(machine.name).stopped:
                self.fabric.go(machine.name)
            machine.power.full = False
            if not isinstance(machine, SchedulerMachine):
                self.start_again(machine)

    async def _end_with(self, nursery: trio.Nursery) -> None:
        await self._over.wait()
        nursery.cancel_scope.cancel()

    async def _heal(self) -> None:
        await trio.sleep(self.scenario.healed_at_s)
        if self.scenario.faults:
            self.chronicle.note("-", "everything heals")
            self.fabric.calm(CALM)

    def _check(self) -> None:
        if self.broken is not None:
            return
        if len(self.chronicle.lines) > EVENTS_MAX:
            self._break("the cluster comes to rest", f"more than {EVENTS_MAX} events")
        self.situations.look()
        self._look(self.invariants.check)

    def _answered(self, asker: str, answerer: str, request: bytes, reply: bytes) -> None:
        self.echoes.said(asker, answerer, request)
        if any(kind in request[:TAG_BYTES] for kind in UNWATCHED):
            return
        message, answer = decode(request), decode(reply)
        self.situations.answered(asker, answerer, message, answer)
        if isinstance(answer, Merged):
            self.strikes.happens("merger", answerer)
            self.strikes.happens("closer", asker)
        self._look(lambda: self.invariants.answered(asker, answerer, message, answer))

    def _look(self, look: Callable[[], None]) -> None:
        try:
            look()
        except Broken as broken:
            self._break(broken.invariant, broken.how)

    def give_up(self, invariant: str, how: str) -> None:
        """Note that something is broken and take everything down now."""
        self._break(invariant, how)
        self._nursery.cancel_scope.cancel()

    def _break(self, invariant: str, how: str) -> None:
        if self.broken is None:
            self.broken = Broken(invariant, how)
            self.chronicle.note("-", f"!!! {self.broken}")
            self._over.set()

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> SchedulerMachine:
        """The scheduler's machine."""
        machine = self.machines["scheduler"]
        assert isinstance(machine, SchedulerMachine)
        return machine

    @property
    def schedulers(self) -> list[SchedulerMachine]:
        """All schedulers' machines, the one that began its job epoch last at the end."""
        found = [machine for machine in self.machines.values() if isinstance(machine, SchedulerMachine)]
        return sorted(found, key=lambda machine: machine.job_epoch)

    @property
    def workers(self) -> list[WorkerMachine]:
        """The workers' machines."""
        return [machine for machine in self.machines.values() if isinstance(machine, WorkerMachine)]

    def working(self, work: str | None) -> list[WorkerMachine]:
        """Workers that are up and run an executor of this class; with None, those that run none."""
        return [
            machine
            for machine in self.workers
            if machine.is_alive and (work in machine.work() if work is not None else not machine.work())
        ]

    def executors(self, name: str) -> list[SimExecutor]:
        """The executors that run on a worker."""
        machine = self.machines[name]
        assert isinstance(machine, WorkerMachine)
        return machine.executors()

    def reach(self, situation: str) -> None:
        """Count a rare situation."""
        self.situations.reached[situation] += 1

    # --- faults ---------------------------------------------------------------------------------------------------

    async def _strike_all(self) -> None:
        with self._striking:
            await self.strikes.run()

    def take_down(self, machine: Machine, *, silent: bool = False) -> None:
        """Let a machine crash, and the store with it where it was in the midst of a write there."""
        if not machine.is_alive:
            return
        self.situations.dies(machine)
        machine.crash()
        if self.store.is_down:
            self.store.crash()
        self.fabric.crash(machine.name, silent=silent)

    def start_again(self, machine: Machine) -> None:
        """Start a machine that is down, unless it is gone for ever."""
        if not machine.is_up and not machine.gone:
            self.chronicle.note(machine.name, "starts again")
            self.start(machine.name)

    async def until_down(self, machine: Machine) -> None:
        """Wait until nothing of it runs."""
        while machine.is_up:  # noqa: ASYNC110 - virtual time
            await trio.sleep(POLL_S)

    def join(self, name: str) -> None:
        """Let one more worker come."""
        self.joined.add(name)
        self._add_worker(name, len(self.workers))
        self.start(name)

    async def start_twin(self, first: SchedulerMachine) -> None:
        """Start a second scheduler on the first one's disk, and end it where it was not refused."""
        twin = self._add(TwinMachine, f"twin-{len(self.machines)}")
        twin.share(first)
        twin.gone = True
        self.start(twin.name)
        await trio.sleep(TWIN_S)
        self.take_down(twin)

    def disk_struck(self, machine: Machine, pick: float) -> MemoryDisk:
        """Which disk a fault of this machine's is about: a scheduler's journal and its store may be apart."""
        return self.store if isinstance(machine, SchedulerMachine) and int(pick * 100) % 2 else machine.disk


def _words(errors: BaseExceptionGroup[HyphaError]) -> str:
    return "; ".join(_words(e) if isinstance(e, BaseExceptionGroup) else str(e) for e in errors.exceptions)
