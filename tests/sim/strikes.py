"""Strikes a simulated cluster: each fault of its scenario at its time.

Fault(at, "what-target", for) ─▶ whom? ─▶ acts.ACTS[what]
                                  └─ a moment: whoever is in the midst of it when it comes, if it comes
"""

from typing import TYPE_CHECKING

import trio

from hypha.network.memory_faults import Event
from tests.sim.acts import ACTS, Strike, crash_all
from tests.sim.flavours import MOMENT_S, MOMENTS, Fault
from tests.sim.machines import GatewayMachine, Machine, SchedulerMachine

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

POLL_S = 0.1


class Strikes:
    """Strikes with everything that a scenario holds."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._moments: dict[str, list[tuple[trio.Event, list[str]]]] = {moment: [] for moment in MOMENTS}
        cluster.fabric.on_event(self._watch)

    async def run(self) -> None:
        """Each at its time; returns when the last is over."""
        async with trio.open_nursery() as nursery:
            for fault in self._cluster.scenario.faults:
                nursery.start_soon(self._strike, fault)

    async def _strike(self, fault: Fault) -> None:
        await trio.sleep(fault.at_s)
        what, _, target = fault.kind.partition("-")
        found = await self._moment(target) if target in MOMENTS else self._targets(target)
        if not found:
            self._cluster.chronicle.note("-", f"no {target} to {what}")
            return
        act = crash_all if target == "gateways" else ACTS[what]
        await act(Strike(self._cluster, fault, found[int(fault.pick * len(found))]))

    def _targets(self, target: str) -> list[Machine]:
        cluster = self._cluster
        match target:
            case "trainer":
                return list(cluster.working("train"))
            case "server":
                return list(cluster.working("aggregate"))
            case "spare":
                return list(cluster.working(None))
            case "leader":
                return [each for each in cluster.schedulers if each.is_leading][-1:]
        up = [each for each in cluster.machines.values() if each.is_up]
        match target:
            case "any" | "network":
                return up
            case "store":
                return [each for each in up if isinstance(each, SchedulerMachine)]
            case "gateways":
                return [each for each in up if isinstance(each, GatewayMachine)]
            case _:
                return [each for each in up if target in (each.role, each.name)]

    # --- moments --------------------------------------------------------------------------------------------------

    async def _moment(self, target: str) -> list[Machine]:
        """Wait for whoever is next in the midst of it."""
        waiting = happened, names = trio.Event(), list[str]()
        self._moments[target].append(waiting)
        with trio.move_on_after(MOMENT_S):
            await happened.wait()
        if not happened.is_set():  # nobody is to be stopped for it any more
            self._moments[target].remove(waiting)
        machines = [self._cluster.machines[name] for name in names]
        return [machine for machine in machines if machine.is_up]

    async def until_held_by_another(self, name: str) -> None:
        """Wait until another scheduler than this has the hold on the job's store, if that happens."""
        with trio.move_on_after(MOMENT_S):
            while self._cluster.invariants.holder == name:  # noqa: ASYNC110 - virtual time
                await trio.sleep(POLL_S)

    def happens(self, moment: str, name: str) -> None:
        """Somebody is in the midst of it now."""
        if moment == "committer" and self._moments[moment]:
            self._cluster.fabric.stop(name)  # at once: what comes next takes no time
        for happened, names in self._moments[moment]:
            names.append(name)
            happened.set()
        self._moments[moment].clear()

    def _watch(self, event: Event) -> None:
        # The way is open, and the bytes go on it next.
        if event.what == "stream PushUpdate opened" and event.outcome == "arrived":
            self.happens("pusher", event.dst)
