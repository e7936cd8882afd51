"""What a fault does to the machine that it strikes, and what mends it.

Strike(cluster, fault, machine) ─▶ ACTS[what] ─▶ counted, done ─▶ `for_s` later undone

`flavours` says what the kinds mean; every one that strikes is counted under `kinds.name_of`.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from hypha.store.memory_disk import Fault as DiskFault
from hypha.store.memory_disk import MemoryDisk
from tests.sim.flavours import MOMENT_S, STORM, Fault
from tests.sim.kinds import TWICE_THE_TTL, name_of
from tests.sim.machines import GatewayMachine, Machine, SchedulerMachine, WorkerMachine, unseen
from tests.sim.scenario import CLOCK_DRIFT
from tests.sim.wall import HOUR_S

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

Act = Callable[["Strike"], Awaitable[None]]
# A fault of a disk strikes one of so many operations after the time it is drawn for.
OPERATIONS = 40
# A worker's disk has its fence counter only: opened at a boot, and written before the first offer.
FENCE_OPERATIONS = 8
# A role that a bad disk ended is started again, and may find it bad again, until so long after.
TROUBLE_S = 10.0
POLL_S = 0.1
# A restarted leader leads at once in one of so many cases; else it stands by as the other one does.
LEADS_AGAIN_BELOW = 0.3
# Echoes of what a scheduler said come so often, and until so long after it is started again.
ECHO_EVERY_S = 1.0
ECHO_S = 3.0
CHECKPOINT_KINDS = ("model", "momentum")


class Strike:
    """One fault and the machine it is about."""

    def __init__(self, cluster: "Cluster", fault: Fault, machine: Machine) -> None:
        self.cluster, self.fault, self.machine = cluster, fault, machine
        self.name = machine.name

    def struck(self, words: str) -> None:
        """Put it down."""
        self.cluster.chronicle.struck(name_of(self.fault.kind), self.name, words)

    async def lasting(self) -> None:
        """Let it last."""
        await trio.sleep(self.fault.for_s)

    @property
    def scheduler(self) -> SchedulerMachine:
        """The machine, which is a scheduler's."""
        assert isinstance(self.machine, SchedulerMachine)
        return self.machine

    @property
    def worker(self) -> WorkerMachine:
        """The machine, which is a worker's."""
        assert isinstance(self.machine, WorkerMachine)
        return self.machine


# --- machines --------------------------------------------------------------------------------------------------------


async def crash(strike: Strike) -> None:
    """Let a machine go down, and start again after a while."""
    strike.struck("crashes")
    strike.cluster.take_down(strike.machine)
    await _start_again(strike)


async def silent(strike: Strike) -> None:
    """Likewise, and nobody learns of it."""
    strike.struck("crashes silently")
    strike.cluster.take_down(strike.machine, silent=True)
    await _start_again(strike)


async def echo(strike: Strike) -> None:
    """Let a scheduler crash; until a while after it is back, what it said last arrives again and again."""
    strike.struck("crashes, and what it said is heard again and again")
    said = strike.cluster.echoes.of(strike.name)
    strike.cluster.take_down(strike.machine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_start_again, strike)
        with trio.move_on_after(strike.fault.for_s + ECHO_S):
            while True:
                await trio.sleep(ECHO_EVERY_S)
                strike.cluster.echoes.say_again(strike.name, said)


async def crash_all(strike: Strike) -> None:
    """Let every gateway go down."""
    strike.struck("and every other gateway crash")
    down = [each for each in strike.cluster.machines.values() if isinstance(each, GatewayMachine) and each.is_up]
    for each in down:
        strike.cluster.take_down(each)
    await strike.lasting()
    for each in down:
        strike.cluster.start_again(each)


async def wipe(strike: Strike) -> None:
    """Let a machine go down and lose its disk: a worker comes back as another node, a scheduler with its own key."""
    strike.struck("crashes, and its disk is gone")
    strike.cluster.take_down(strike.machine)
    if isinstance(strike.machine, SchedulerMachine):
        strike.machine.wipe()
        await _start_again(strike)
        return
    strike.machine.gone = True
    strike.machine.wipe()
    await strike.lasting()
    strike.cluster.reach("worker back as another node")
    strike.cluster.join(f"{strike.name}-anew")


async def power(strike: Strike) -> None:
    """Let the power go in the midst of a write: of a scheduler's next ones, or when a worker boots."""
    cluster, machine, pick = strike.cluster, strike.machine, strike.fault.pick
    victims: list[Machine] = []

    def lost(victim: Machine) -> None:
        victims.append(victim)
        # Before anybody looks: what was being written must not be taken for written.
        cluster.take_down(victim)
        cluster.chronicle.struck(name_of(strike.fault.kind), victim.name, "lost power in the midst of a write")

    cluster.power_lost = lost
    failure = DiskFault.CRASH_AFTER if int(pick * 1e6) % 3 == 0 else DiskFault.CRASH
    if isinstance(machine, SchedulerMachine) and int(pick * 1000) % 2:
        machine.tears_journal = failure
    elif isinstance(machine, WorkerMachine):
        await _reboot(strike, failure)
    else:
        _plan(strike, failure, OPERATIONS)
    with trio.move_on_after(MOMENT_S):
        while not victims:  # noqa: ASYNC110 - virtual time costs nothing
            await trio.sleep(POLL_S)
    if isinstance(machine, SchedulerMachine):
        machine.tears_journal = None
    for disk in (cluster.store, machine.disk):
        disk.plan.clear()
    for victim in victims:
        await _start_again(Strike(cluster, strike.fault, victim))


async def _reboot(strike: Strike, failure: DiskFault) -> None:
    """Start a machine again on a disk on which one of the first operations fails."""
    strike.cluster.take_down(strike.machine)
    await strike.lasting()
    await strike.cluster.until_down(strike.machine)
    _plan(strike, failure, FENCE_OPERATIONS)
    strike.cluster.start_again(strike.machine)


def _plan(strike: Strike, failure: DiskFault, within: int) -> None:
    disk = strike.cluster.disk_struck(strike.machine, strike.fault.pick)
    disk.plan[disk.operations + int(strike.fault.pick * 1e5) % within] = failure


async def pause(strike: Strike) -> None:
    """Let a machine stand still for a while, as SIGSTOP of everything on it does."""
    cluster, for_s = strike.cluster, strike.fault.for_s
    strike.struck(f"stands still for {for_s:g} s")
    if for_s >= 2 * cluster.scenario.ttl_s:
        cluster.chronicle.faults[TWICE_THE_TTL] += 1
    cluster.fabric.stop(strike.name)
    await strike.lasting()
    cluster.fabric.go(strike.name)


async def leave(strike: Strike) -> None:
    """Let a worker leave politely, as SIGTERM asks it to, and come back later."""
    strike.struck("is asked to leave")
    strike.worker.stopping.set()
    await _start_again(strike)


async def join(strike: Strike) -> None:
    """Let one more worker come."""
    strike.struck("is told that a worker joins")
    strike.cluster.join(f"worker-{len(strike.cluster.workers)}")


async def twin(strike: Strike) -> None:
    """Start a second scheduler on the same journal."""
    strike.struck("gets a second scheduler on its journal")
    strike.machine.troubled_until = trio.current_time() + TROUBLE_S
    await strike.cluster.start_twin(strike.scheduler)


async def _start_again(strike: Strike) -> None:
    machine, at_once = strike.machine, strike.fault.pick < LEADS_AGAIN_BELOW
    if strike.fault.kind.startswith("back"):
        await strike.cluster.strikes.until_held_by_another(machine.name)
        at_once = True
    else:
        await strike.lasting()
    if isinstance(machine, SchedulerMachine) and strike.cluster.scenario.standby:
        machine.stands_by = not at_once
    await strike.cluster.until_down(machine)
    strike.cluster.start_again(machine)


# --- the network -----------------------------------------------------------------------------------------------------


async def cut(strike: Strike) -> None:
    """Cut a trainer from the scheduler, anything else from the workers, for a while."""
    await _cut(strike, out=True, back=True)


async def oneway(strike: Strike) -> None:
    """Likewise, but only what it says is lost."""
    await _cut(strike, out=True, back=False)


async def deaf(strike: Strike) -> None:
    """Likewise, but only what it is told is lost."""
    await _cut(strike, out=False, back=True)


async def _cut(strike: Strike, *, out: bool, back: bool) -> None:
    cluster, name = strike.cluster, strike.name
    kind: type[Machine] = SchedulerMachine if strike.fault.kind.endswith("trainer") else WorkerMachine
    others = [each.name for each in cluster.machines.values() if isinstance(each, kind) and each.name != name]
    strike.struck(f"is cut from {', '.join(others)} for {strike.fault.for_s:g} s")
    for other in others:
        if out:
            cluster.fabric.partition(name, other, one_way=True)
        if back:
            cluster.fabric.partition(other, name, one_way=True)
    await strike.lasting()
    for other in others:
        cluster.fabric.heal(name, other)


async def storm(strike: Strike) -> None:
    """Let every link be bad for a while."""
    strike.struck("sees bad weather come up")
    strike.cluster.fabric.calm(STORM)
    await strike.lasting()
    strike.cluster.fabric.calm(strike.cluster.scenario.profile)


async def unstored(strike: Strike) -> None:
    """Cut a scheduler from the job's store for a while."""
    strike.struck(f"is cut from the store for {strike.fault.for_s:g} s")
    strike.scheduler.objects.is_cut = True
    strike.machine.troubled_until = trio.current_time() + strike.fault.for_s + TROUBLE_S
    await strike.lasting()
    strike.scheduler.objects.is_cut = False


# --- disks and clocks ------------------------------------------------------------------------------------------------


async def full(strike: Strike) -> None:
    """Let no more fit on a disk for a while."""
    machine, for_s = strike.machine, strike.fault.for_s
    strike.struck(f"has a full disk for {for_s:g} s")
    machine.troubled_until = trio.current_time() + for_s + TROUBLE_S
    if isinstance(machine, SchedulerMachine):
        disk = strike.cluster.disk_struck(machine, strike.fault.pick)
        disk.capacity_bytes = disk.used_bytes()
        await strike.lasting()
        disk.capacity_bytes = None
    else:
        machine.power.full = True
        await strike.lasting()
        machine.power.full = False


async def error(strike: Strike) -> None:
    """Let an operation of a disk fail, a write in its midst: one of a scheduler's next, or a worker's first ones."""
    strike.struck("has a disk that fails once")
    failure = DiskFault.EIO if int(strike.fault.pick * 1e6) % 2 else DiskFault.ENOSPC
    strike.machine.troubled_until = trio.current_time() + strike.fault.for_s + TROUBLE_S
    if isinstance(strike.machine, WorkerMachine):
        await _reboot(strike, failure)
    else:
        _plan(strike, failure, OPERATIONS)


async def decay(strike: Strike) -> None:
    """Flip a byte of the newest checkpoint once there are two, and let the parameter server die: it needs one then."""
    cluster, kind = strike.cluster, CHECKPOINT_KINDS[int(strike.fault.pick * 2)]
    with trio.move_on_after(MOMENT_S):
        while len(_checkpoints(cluster.store)) < 2:  # noqa: ASYNC110 - likewise
            await trio.sleep(POLL_S)
    checkpoints = _checkpoints(cluster.store)
    if len(checkpoints) < 2 or cluster.decayed:
        return
    cluster.decayed = True
    with unseen(cluster.store) as disk:
        name = next(each for each in _names(disk, kind) if each.startswith(checkpoints[-1]))
        disk.corrupt(f"{kind}/{name}", disk.size(f"{kind}/{name}") - 1)
    strike.struck(f"has a decayed {kind} {name[:16]}")
    for scheduler in cluster.schedulers:
        scheduler.clear_shelf()
    for server in cluster.working("aggregate"):
        cluster.take_down(server)
        await strike.lasting()
        cluster.start_again(server)


def _names(disk: MemoryDisk, kind: str) -> list[str]:
    return [name for name in disk.listdir(kind) if not name.endswith(".part")] if disk.exists(kind) else []


def _checkpoints(store: MemoryDisk) -> list[str]:
    """Rounds, as their objects are called, of which model and momentum are both stored."""
    with unseen(store) as disk:
        rounds = [{name.partition("-")[0] for name in _names(disk, kind)} for kind in CHECKPOINT_KINDS]
    return sorted(rounds[0] & rounds[1])


async def wall(strike: Strike) -> None:
    """Set a machine's wall clock an hour forward or back, and later right again."""
    by_s = HOUR_S if strike.fault.pick < 0.5 else -HOUR_S
    strike.struck(f"has its wall clock set by {by_s:+g} s")
    strike.cluster.wall.jumps[strike.name] = by_s
    await strike.lasting()
    strike.cluster.wall.jumps[strike.name] = 0.0


async def drift(strike: Strike) -> None:
    """Let a machine's clock run at another rate from now on."""
    rate = 1 - CLOCK_DRIFT + 2 * CLOCK_DRIFT * ((strike.fault.pick * 17) % 1.0)
    strike.struck(f"has a clock that runs at {rate:.3f}")
    strike.machine.rate = rate
    strike.machine.clock.turn(rate)


# --- executors -------------------------------------------------------------------------------------------------------


async def exit_(strike: Strike) -> None:
    """Let the executors of a worker exit, while the worker lives."""
    strike.struck("has its executors exit")
    for executor in strike.worker.executors():
        executor.fail("exit")


async def stall(strike: Strike) -> None:
    """Let them stall."""
    strike.struck("has its executors stall")
    for executor in strike.worker.executors():
        executor.fail("stall")


async def spoil(strike: Strike) -> None:
    """Let the next update of a trainer be of no use."""
    strike.struck("will send an update that is not finite")
    for executor in strike.worker.executors():
        executor.does_wrong = "spoil"


async def claim(strike: Strike) -> None:
    """Let it name samples that it was not granted."""
    strike.struck("will claim samples that it was not granted")
    for executor in strike.worker.executors():
        executor.does_wrong = "claim"


ACTS: dict[str, Act] = {
    "crash": crash,
    "back": crash,
    "silent": silent,
    "echo": echo,
    "wipe": wipe,
    "power": power,
    "pause": pause,
    "leave": leave,
    "join": join,
    "twin": twin,
    "cut": cut,
    "oneway": oneway,
    "deaf": deaf,
    "storm": storm,
    "unstored": unstored,
    "full": full,
    "error": error,
    "decay": decay,
    "wall": wall,
    "drift": drift,
    "exit": exit_,
    "stall": stall,
    "spoil": spoil,
    "claim": claim,
}
