"""One run of the job on the network, calm or with strikes; the scheduler is started again whenever it was killed.

    every TICK_S: logs ─▶ Story ─▶ due repairs ─▶ next strike, if its moment has come ─▶ a blow ─▶ healed when the
                  first round that opened after it is committed with every trainer

Nothing here waits for a time to strike: moments are lines of the scheduler's log and growth of its journal.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import trio
from msgspec import Struct

from hypha.demo.loglines import LogFile
from tests.chaos import cast, troupe
from tests.chaos.cast import SCHEDULER, Job
from tests.chaos.plan import Strike
from tests.chaos.record import Archive
from tests.chaos.story import Story
from tests.chaos.troupe import Node, Running

TICK_S = 0.02
# Without a committed round for so long, and for so many ttls, something waits for ever.
STUCK_S, STUCK_TTLS = 120.0, 6
# A run that is not whole again by then is struck all the same: too few may be left to be whole.
HEAL_S, HEAL_TTLS = 30.0, 3
# Who stays away comes back with the next strike, and no later than this: who is left may be too few to go on.
AWAY_TTLS = 5
# Of nodes that died though nobody struck them; more is no accident.
CRASHES_MAX = 5
CRASH_PAUSE_S = 1.0


class ChaosFailed(Exception):
    """The run cannot go on; the message says why."""


class Blow(Struct):
    """A strike that was made: on whom, when, in which round."""

    strike: Strike
    victim: str
    at: float
    round_open: int
    healed_s: float | None = None


class Outlived(Struct):
    """An executor whose worker was killed: it must end by itself."""

    executor: Running
    since: float
    ended_s: float | None = None


class Repair(Struct, frozen=True):
    """What is owed to a victim: at `due`, or with the next strike where it `stays_away`."""

    due: float
    stays_away: bool
    what: str
    act: Callable[[], None]


class Play:
    """Plays one job to its end."""

    def __init__(self, directory: Path, nodes: dict[str, Node], scheduler: Node, run: str, job: Job) -> None:
        self.story = Story()
        self.blows: list[Blow] = []
        self.crashes: list[str] = []
        self.outlived: list[Outlived] = []
        self._directory = directory
        self.run = run
        self.ttl_s = job.ttl_s
        self.scheduler = scheduler
        self._nodes = {**nodes, SCHEDULER: scheduler}
        self._job = job
        self.state = directory / "state" / run
        self.kept = directory / f"kept-{run}"
        self._archive = Archive(self.state, self.kept)
        self._log = LogFile(scheduler.log)
        self._repairs: list[Repair] = []
        self._began = time.monotonic()
        self._progress_at = self._began

    async def perform(self, strikes: Sequence[Strike]) -> None:
        """Play until the job is over. Raises ChaosFailed."""
        self._nodes[SCHEDULER].start()
        waiting = list(strikes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._strike_all, waiting)
            while not self._over():
                self._tick()
                await trio.sleep(TICK_S)
            nursery.cancel_scope.cancel()
        self._repair(time.monotonic(), everything=True)
        if self.story.failure is not None:
            raise ChaosFailed(f"the job failed: {self.story.failure}")
        if len(self.blows) < len(strikes):
            raise ChaosFailed(f"the job was over after {len(self.blows)} of {len(strikes)} strikes")

    def _over(self) -> bool:
        scheduler = self._nodes[SCHEDULER]
        told = self.story.finished is not None or self.story.failure is not None
        if not (told and not scheduler.runs):
            return False
        scheduler.wanted = False
        return True

    def _tick(self) -> None:
        now = time.monotonic()
        for line in self._log.news():
            before = self.story.round
            self.story.take(line, now)
            if self.story.round > before:
                self._progress_at = now
                self._archive.keep()
        self._repair(now)
        self._count_the_dead(now)
        self._look_after(now)
        quiet_s = now - self._progress_at
        if quiet_s > STUCK_S + STUCK_TTLS * self._job.ttl_s:
            raise ChaosFailed(f"no round was committed for {quiet_s:.0f} s; round {self.story.open_round} is open")

    def _repair(self, now: float, *, everything: bool = False, stayed_away: bool = False) -> None:
        due = [each for each in self._repairs if everything or each.due <= now or (stayed_away and each.stays_away)]
        self._repairs = [repair for repair in self._repairs if repair not in due]
        for repair in due:
            self._say(repair.what)
            repair.act()

    def _count_the_dead(self, now: float) -> None:
        for node in self._nodes.values():
            code = node.died()
            if code is None or (node.name == SCHEDULER and (self.story.finished or self.story.failure)):
                continue
            self.crashes.append(f"{node.name}: exit code {code} in round {self.story.open_round}")
            self._say(f"CRASH {self.crashes[-1]}")
            if len(self.crashes) > CRASHES_MAX:
                raise ChaosFailed(f"too many crashes: {'; '.join(self.crashes)}")
            node.wanted = False
            self._owe(now + CRASH_PAUSE_S, f"{node.name} starts again", node.start)

    def _look_after(self, now: float) -> None:
        for each in self.outlived:
            if each.ended_s is None and not each.executor.lives:
                each.ended_s = now - each.since
                work, worker = each.executor.work, each.executor.worker
                self._say(f"the {work} executor of {worker} ended {each.ended_s:.2f} s after its worker was killed")
        for blow in self.blows:
            if blow.healed_s is None:
                whole = self.story.whole_again(blow.round_open, blow.at)
                blow.healed_s = None if whole is None else whole - blow.at

    # --- strikes ------------------------------------------------------------------------------------------------------

    async def _strike_all(self, strikes: list[Strike]) -> None:
        for strike in strikes:
            self._hit(strike, await self._moment_of(strike))

    async def _moment_of(self, strike: Strike) -> str | Running:
        """Return the victim when the moment has come."""
        await self._until(lambda: self._may(strike))
        seen = self.story.counts[strike.moment]
        await self._until(lambda: self.story.counts[strike.moment] > seen)
        size = self._journal_bytes() + strike.journal_bytes
        await self._until(lambda: self._journal_bytes() >= size)
        while (victim := self._victim(strike)) is None:  # noqa: ASYNC110 - other processes set no event
            await trio.sleep(TICK_S)
        return victim

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - logs and files set no event
            await trio.sleep(TICK_S)

    def _may(self, strike: Strike) -> bool:
        if self.story.round < strike.round:
            return False
        if not self.blows or strike.overlaps:
            return True
        last = self.blows[-1]
        return last.healed_s is not None or time.monotonic() - last.at > HEAL_S + HEAL_TTLS * self._job.ttl_s

    def _journal_bytes(self) -> int:
        try:
            return (self.state / "journal").stat().st_size
        except FileNotFoundError:
            return 0

    def _victim(self, strike: Strike) -> str | Running | None:
        """Return a node's name or an executor; None where nobody plays the role now."""
        executors = [each for each in troupe.executors(self._directory) if self._is_up(each.worker)]
        serving = sorted({each.worker for each in executors if each.work == "aggregate"})
        candidates: dict[str, Sequence[str | Running]] = {
            "gateway": [name for name in cast.GATEWAYS if self._is_up(name)],
            "data": [name for name in cast.DATA_NODES if self._is_up(name)],
            "worker": [name for name in cast.WORKERS if self._is_up(name) and name not in serving],
            "parameter-server": serving,
            "executor": executors,
            "scheduler": [SCHEDULER] if self._is_up(SCHEDULER) else [],
        }
        found = candidates[strike.role]
        return found[int(strike.pick * len(found))] if found else None

    def _is_up(self, name: str) -> bool:
        node = self._nodes[name]
        return node.wanted and node.runs and not node.stopped

    def _hit(self, strike: Strike, victim: str | Running) -> None:
        now = time.monotonic()
        name = victim if isinstance(victim, str) else f"{victim.work} executor of {victim.worker}"
        self._say(f"strike {strike.number + 1}: {'SIGSTOP' if strike.stop else 'SIGKILL'} {strike.role} {name}")
        # Those who were to stay away until now come back: somebody must be left for the next strike.
        self._repair(now, stayed_away=True)
        self.blows.append(Blow(strike=strike, victim=name, at=now, round_open=self.story.open_round))
        if isinstance(victim, Running):
            self._hit_executor(strike, victim, now)
        else:
            self._hit_node(strike, self._nodes[victim], now)

    def _hit_executor(self, strike: Strike, victim: Running, now: float) -> None:
        if not strike.stop:
            troupe.signal_group(victim.pgid, signal.SIGKILL)
            return
        troupe.signal_group(victim.pgid, signal.SIGSTOP)
        self._owe(
            now + 2 * self._job.ttl_s,
            f"the executor of {victim.worker} goes on",
            lambda: troupe.signal_group(victim.pgid, signal.SIGCONT) if victim.lives else None,
        )

    def _hit_node(self, strike: Strike, node: Node, now: float) -> None:
        if strike.stop:
            node.stop()
            self._owe(now + 2 * self._job.ttl_s, f"{node.name} goes on", node.go_on)
            return
        for each in troupe.executors(self._directory):
            if each.worker == node.name:
                self.outlived.append(Outlived(each, now))
        node.kill()
        stays_away = strike.long and node.name != SCHEDULER
        due = now + (AWAY_TTLS * self._job.ttl_s if stays_away else strike.pause_s)
        self._owe(due, f"{node.name} starts again", node.start, stays_away=stays_away)

    def _owe(self, due: float, what: str, act: Callable[[], None], *, stays_away: bool = False) -> None:
        self._repairs.append(Repair(due, stays_away, what, act))

    def _say(self, text: str) -> None:
        at = time.monotonic() - self._began
        sys.stderr.write(f"{at:7.2f} {self.run} round {self.story.open_round:3d}: {text}\n")
        sys.stderr.flush()
