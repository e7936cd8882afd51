"""One scenario from start to end, in virtual time: what became of it.

simulate(scenario, root) ─▶ Report: the event log, what struck, what was reached, what was broken
"""

import traceback
from pathlib import Path

import trio
from msgspec import Struct

from tests.sim.broken import Broken
from tests.sim.cluster import Cluster
from tests.sim.scenario import Scenario
from tests.sim.virtual import run_seeded

# So many turns of trio's loop without any time passing are a task that spins.
STANDSTILL_MAX = 20_000


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
        situations=cluster.situations.counts(),
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
