"""A whole cluster in one process and in virtual time: it starts, runs a job, has faults, heals and is looked over.

    Scenario(faults=(Fault(at_s=3.0, kind="crash-worker-2", for_s=5.0), Fault(…)))   drawn from a seed, or written down
        └─▶ simulate(scenario, root) ─▶ Report: the event log, what struck, what was reached, what was broken

Everything that happens is in `chronicle`; after every line of it the invariants are checked.
"""

import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from msgspec import Struct

from hypha.errors import HyphaError
from hypha.network.memory import MemoryFabric
from hypha.protocol.job import ModelSpec, OuterOptimizer, Rounds
from hypha.protocol.resources import Resources
from hypha.scheduler.config import CheckpointConfig, JobConfig, JobResources, SchedulerTable
from hypha.scheduler.config import Config as SchedulerConfig
from tests.sim import dataset
from tests.sim.chronicle import NODE, Chronicle
from tests.sim.executors import Pace, SimExecutor
from tests.sim.invariants import Broken, Invariants
from tests.sim.machines import PEM, DataMachine, GatewayMachine, Machine, SchedulerMachine, WorkerMachine
from tests.sim.scenario import CALM, SLOW_DISK_S, Fault, Scenario
from tests.sim.virtual import NodeCrashed, Power, VirtualRuntime, run_seeded

# A seed that does more than this goes round in circles.
EVENTS_MAX = 150_000
# So many turns of trio's loop without any time passing are a task that spins.
STANDSTILL_MAX = 20_000
# After the job is over: time to say goodbye, to kill executors and for leases to be given back.
GOODBYE_TTLS = 2.5
MODEL_SEED = 7
OUTER = OuterOptimizer(learning_rate=0.7, momentum=0.9)


M = TypeVar("M", bound=Machine)


class Cluster:
    """See the module's docstring. `broken` is the first invariant that did not hold."""

    def __init__(self, scenario: Scenario, root: Path) -> None:
        self.scenario = scenario
        self.chronicle = Chronicle(str(root))
        self.fabric = MemoryFabric(scenario.seed, scenario.profile)
        self.machines: dict[str, Machine] = {}
        self.broken: Broken | None = None
        self._root = root
        self._over = trio.Event()
        self._nursery: trio.Nursery
        self._striking = trio.CancelScope()
        self._build()
        self.invariants = Invariants(self)
        self.fabric.on_event(self.chronicle.network)
        self.fabric.on_answer(self._answered)
        self.chronicle.watch(self._check)

    # --- building -------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        scenario = self.scenario
        files = dataset.write(self._root / "dataset", scenario.slices)
        self._add(GatewayMachine, "gateway-0")
        for number in range(scenario.data_nodes):
            self._add(DataMachine, f"data-{number}").dataset = files
        for number in range(scenario.trainers + scenario.parameter_servers + scenario.spares):
            worker = self._add(WorkerMachine, f"worker-{number}")
            worker.ttl_s, worker.chronicle = scenario.ttl_s, self.chronicle
            if number < len(scenario.paces):
                worker.pace = Pace(batch_s=scenario.paces[number])
        self._add(SchedulerMachine, "scheduler").config = self._config()

    def _add(self, kind: type[M], name: str) -> M:
        rates = self.scenario.rates
        rate = rates[len(self.machines)] if len(self.machines) < len(rates) else 1.0
        # Nobody's clock shows what another's shows.
        machine = kind(name, self._root / name, rate=rate, offset=1000.0 * len(self.machines))
        self.machines[name] = machine
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
                parameter_servers=scenario.parameter_servers,
                executor="sim",
                worker=Resources(cpu=1.0),
                parameter_server=Resources(cpu=1.0),
            ),
            checkpoint=CheckpointConfig(every=scenario.checkpoint_every, keep=2),
        )
        table = SchedulerTable(job=job, welcome_s=1.0, retry_s=0.5, patience_s=2.0)
        return SchedulerConfig(cert_pem=PEM, key_pem=PEM, trust_pem=PEM, scheduler=table)

    # --- running --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Cluster"]:
        """Start everything; whatever still runs is taken down at the end."""
        with self.chronicle.listening():
            async with trio.open_nursery() as self._nursery:
                for name in self.machines:
                    self.start(name)
                self._nursery.start_soon(self._strike_all)
                if self.scenario.disk_s >= SLOW_DISK_S:
                    self.chronicle.struck("slow disk", "scheduler", f"takes {self.scenario.disk_s:g} s for each write")
                yield self
                self._nursery.cancel_scope.cancel()

    def start(self, name: str) -> None:
        """Start a machine, or start it again."""
        self._nursery.start_soon(self._live, self.machines[name])

    async def _live(self, machine: Machine) -> None:
        machine.incarnation += 1
        machine.power = Power()
        machine.runtime = VirtualRuntime(
            self.scenario.seed,
            machine.name,
            incarnation=machine.incarnation,
            rate=machine.rate,
            offset=machine.offset,
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
            if isinstance(machine, SchedulerMachine):
                self._break("the job failed", _words(errors))
        finally:
            machine.is_up = False

    async def finish(self) -> None:
        """Wait for the end of the job, for as long as it may take, and look the cluster over."""
        scenario = self.scenario
        with trio.move_on_after(scenario.healed_at_s + scenario.patience_s) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._heal)
                nursery.start_soon(self._end_with, nursery)
                await self.scheduler.finished.wait()
                nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            waited = self.scheduler.waiting()
            self._break("L7 progress returns after the network heals", f"not finished in time; waiting for: {waited}")
        self._striking.cancel()
        self._make_whole()
        if self.broken is None:
            await trio.sleep(GOODBYE_TTLS * scenario.ttl_s)
            self.invariants.at_the_end()

    def _make_whole(self) -> None:
        """End every fault that is still there: what stands still goes on, what is cut heals, what is down starts."""
        self.fabric.calm(CALM)
        self.fabric.heal()
        for machine in self.machines.values():
            if self.fabric.gate(machine.name).stopped:
                self.fabric.go(machine.name)
            if not machine.is_up and not isinstance(machine, SchedulerMachine):
                self.start(machine.name)

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
        try:
            self.invariants.check()
        except Broken as broken:
            self._break(broken.invariant, broken.how)

    def _answered(self, asker: str, answerer: str, request: bytes, reply: bytes) -> None:
        try:
            self.invariants.answered(asker, answerer, request, reply)
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
    def workers(self) -> list[WorkerMachine]:
        """The workers' machines."""
        return [machine for machine in self.machines.values() if isinstance(machine, WorkerMachine)]

    def working(self, work: str | None) -> list[WorkerMachine]:
        """Workers that are up and run an executor of this class; with None, those that run none."""
        return [
            machine
            for machine in self.workers
            if machine.is_up and (work in machine.work() if work is not None else not machine.work())
        ]

    # --- faults ---------------------------------------------------------------------------------------------------

    async def _strike_all(self) -> None:
        with self._striking:
            async with trio.open_nursery() as nursery:
                for fault in self.scenario.faults:
                    nursery.start_soon(self._strike, fault)

    async def _strike(self, fault: Fault) -> None:
        await trio.sleep(fault.at_s)
        how, _, target = fault.kind.partition("-")
        found = self._targets(target)
        if not found:
            self.chronicle.note("-", f"no {target} to {how}")
            return
        name = found[int(fault.pick * len(found))].name
        await self._faults[how](self, name, target, fault.for_s)

    def _targets(self, target: str) -> list[Machine]:
        match target:
            case "trainer":
                return list(self.working("train"))
            case "server":
                return list(self.working("aggregate"))
            case "spare":
                return list(self.working(None))
            case _:
                named = [each for each in self.machines.values() if target in (each.role, each.name)]
                return [each for each in named if each.is_up]

    async def crash(self, name: str, target: str, for_s: float, *, silent: bool = False) -> None:
        """Let a machine go down without warning, and start again after a while."""
        self.chronicle.struck(f"crash of a {target}", name, "crashes" + (" silently" if silent else ""))
        self.machines[name].crash()
        self.fabric.crash(name, silent=silent)
        await trio.sleep(for_s)
        if not self.machines[name].is_up:
            self.chronicle.note(name, "starts again")
            self.start(name)

    async def pause(self, name: str, target: str, for_s: float) -> None:
        """Let a machine stand still for a while, as SIGSTOP of everything on it does."""
        self.chronicle.struck(f"pause of a {target}", name, f"stands still for {for_s:g} s")
        self.fabric.stop(name)
        await trio.sleep(for_s)
        self.fabric.go(name)

    async def cut(self, name: str, target: str, for_s: float, *, one_way: bool = False) -> None:
        """Cut a trainer from the scheduler, anything else from the workers, for a while."""
        others = ["scheduler"] if target == "trainer" else [each.name for each in self.workers if each.name != name]
        self.chronicle.struck(f"cut of a {target}", name, f"is cut from {', '.join(others)} for {for_s:g} s")
        for other in others:
            self.fabric.partition(name, other, one_way=one_way)
        await trio.sleep(for_s)
        for other in others:
            self.fabric.heal(name, other)

    async def executor_fails(self, name: str, _target: str, _for_s: float, *, how: str) -> None:
        """Let the executors of a worker exit or stall, while the worker lives."""
        self.chronicle.struck(f"{how} of an executor", name, f"has its executors {how}")
        for executor in self.executors(name):
            executor.fail(how)

    def executors(self, name: str) -> list[SimExecutor]:
        """The executors that run on a worker."""
        machine = self.machines[name]
        assert isinstance(machine, WorkerMachine)
        return machine.executors()

    _faults = {  # noqa: RUF012 - a table of methods
        "crash": crash,
        "silent": partial(crash, silent=True),
        "pause": pause,
        "cut": cut,
        "oneway": partial(cut, one_way=True),
        "exit": partial(executor_fails, how="exit"),
        "stall": partial(executor_fails, how="stall"),
    }


class Standstill(trio.abc.Instrument):
    """Ends a simulation in which virtual time stands still because a task never sleeps."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._turns = 0
        self._now = -1.0

    def before_io_wait(self, timeout: float) -> None:
        """Count the turns of trio's loop."""
        now = trio.current_time()
        self._turns = self._turns + 1 if now == self._now else 0
        self._now = now
        if self._turns > STANDSTILL_MAX:
            self._cluster.give_up("no task spins", f"{self._turns} turns at {now:.6f}")


class Report(Struct, frozen=True, kw_only=True):
    """What became of one seed."""

    scenario: Scenario
    broken: str | None
    lines: tuple[str, ...]
    simulated_s: float
    faults: dict[str, int]
    situations: dict[str, int]


def simulate(scenario: Scenario, root: Path) -> Report:
    """Run one scenario to its end, in an empty directory."""
    cluster = Cluster(scenario, root)
    simulated_s = 0.0
    try:
        simulated_s = run_seeded(scenario.seed, _simulate, cluster)
    except Exception as error:  # noqa: BLE001 - whatever escapes from a role is what this looks for
        cluster.broken = cluster.broken or Broken("no exception escapes", "; ".join(_leaves(error)))
    return Report(
        scenario=scenario,
        broken=None if cluster.broken is None else str(cluster.broken),
        lines=tuple(cluster.chronicle.lines),
        simulated_s=simulated_s,
        faults=dict(sorted(cluster.chronicle.faults.items())),
        situations=cluster.invariants.situations(),
    )


def _leaves(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [words for each in error.exceptions for words in _leaves(each)]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return [f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno} in {where.name})"]


async def _simulate(cluster: Cluster) -> float:
    trio.lowlevel.add_instrument(Standstill(cluster))
    async with cluster.running():
        await cluster.finish()
    return trio.current_time()


def _words(errors: BaseExceptionGroup[HyphaError]) -> str:
    return "; ".join(_words(e) if isinstance(e, BaseExceptionGroup) else str(e) for e in errors.exceptions)
