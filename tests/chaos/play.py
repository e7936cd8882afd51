"""One run of the job on the network, calm or with strikes; a scheduler is started again whenever it was killed.

    every TICK_S: logs ─▶ Story ─▶ due repairs ─▶ next strike, if its moment has come ─▶ a blow ─▶ healed when the
                  first round that opened after it is committed with every trainer

Nothing here waits for a time to strike: moments are lines of the leader's log and growth of its journal. Only the end
may be one: after `limit_s` nobody is struck any more, and the job is given up once the last strike has healed.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from hypha.demo.loglines import LogFile
from tests.chaos import cast, troupe
from tests.chaos.blows import Blow, Blows, Victim
from tests.chaos.cast import SCHEDULERS, Job
from tests.chaos.growth import Growth
from tests.chaos.plan import Strike
from tests.chaos.record import Archive
from tests.chaos.story import Story
from tests.chaos.troupe import DEPOSED, STANDBY, Node

TICK_S = 0.02
# Without a committed round for so long, and for so many ttls, something waits for ever.
STUCK_S, STUCK_TTLS = 120.0, 6
# A run that is not whole again by then is struck all the same: too few may be left to be whole.
HEAL_S, HEAL_TTLS = 30.0, 3
# Of nodes that died though nobody struck them; more is no accident.
CRASHES_MAX = 5
CRASH_PAUSE_S = 1.0
# A worker that was asked to leave, and a scheduler whose job is given up, have so long to go.
GO_S = 20.0


class ChaosFailed(Exception):
    """The run cannot go on; the message says why."""


class Play:
    """Plays one job to its end, or to `limit_s`; two schedulers are a leader and its standby."""

    def __init__(
        self,
        directory: Path,
        nodes: dict[str, Node],
        schedulers: Sequence[Node],
        run: str,
        job: Job,
        *,
        limit_s: float = float("inf"),
    ) -> None:
        self.story = Story()
        self.crashes: list[str] = []
        self.growth = Growth()
        self.run = run
        self.ttl_s = job.ttl_s
        self.stopped_early = False
        self.store = cast.store(directory, run)
        self.kept = directory / f"kept-{run}"
        self._directory = directory
        self._job = job
        self._schedulers = {node.name: node for node in schedulers}
        self._nodes = {**nodes, **self._schedulers}
        self._archive = Archive(self.store, self.kept)
        self._logs = [LogFile(node.log) for node in schedulers]
        self._began = time.monotonic()
        self._ends_at = self._began + limit_s
        self._progress_at = self._began
        self.blows = Blows(directory, job.ttl_s, self._leads, self._say)

    def stop_early(self) -> None:
        """Strike nobody any more."""
        self._ends_at = 0.0

    async def perform(self, strikes: Sequence[Strike]) -> None:
        """Play until the job is over. Raises ChaosFailed."""
        first, *others = self._schedulers.values()
        first.start()
        for each in others:
            each.start(STANDBY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._strike_all, strikes)
            while not self._over():
                self._tick()
                await trio.sleep(TICK_S)
            nursery.cancel_scope.cancel()
        await self._clear_up()
        if self.story.failure is not None:
            raise ChaosFailed(f"the job failed: {self.story.failure}")
        if len(self.blows.made) < len(strikes) and not self.stopped_early:
            raise ChaosFailed(f"the job was over after {len(self.blows.made)} of {len(strikes)} strikes")

    def _leads(self) -> str:
        """The name of the scheduler whose log tells the job's story."""
        titles = {cast.title(name, self.run): name for name in self._schedulers}
        return titles.get(self.story.leader, next(iter(self._schedulers)))

    def _over(self) -> bool:
        leader = self._schedulers[self._leads()]
        told = self.story.finished is not None or self.story.failure is not None
        if told and not leader.runs:
            leader.wanted = False
            return True
        return self.stopped_early

    async def _clear_up(self) -> None:
        """End the schedulers that are left, and bring back everybody else."""
        self.blows.over = True
        for node in self._schedulers.values():
            code = await trio.to_thread.run_sync(node.end, GO_S) if node.process is not None else 0
            if code != 0:
                self.crashes.append(f"{node.name}: exit code {code} when asked to end")
        for log in self._logs:
            for line in log.news():
                self.story.take(line, time.monotonic())
        self._archive.keep()
        with trio.move_on_after(GO_S):
            while any(leaving.ended_s is None for leaving in self.blows.leavings):
                self.blows.look_after(time.monotonic())
                await trio.sleep(TICK_S)
        self.blows.repair(time.monotonic(), everything=True)

    # --- looking on ---------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        before = self.story.round
        for log in self._logs:
            for line in log.news():
                self.story.take(line, now)
        if self.story.round > before:
            self._progress_at = now
            self._archive.keep()
        self.blows.repair(now)
        self._count_the_dead(now)
        self._look_after(now)
        quiet_s = now - self._progress_at
        if quiet_s > STUCK_S + STUCK_TTLS * self._job.ttl_s:
            raise ChaosFailed(f"no round was committed for {quiet_s:.0f} s; round {self.story.open_round} is open")

    def _count_the_dead(self, now: float) -> None:
        for node in self._nodes.values():
            code = node.died()
            if code is None or (node.name in self._schedulers and (self.story.finished or self.story.failure)):
                continue
            node.wanted = False
            if node.name in self._schedulers and node.said(DEPOSED):
                self._say(f"{node.name} was deposed")
                self.blows.owe(now + CRASH_PAUSE_S, f"{node.name} stands by", lambda node=node: node.start(STANDBY))
                continue
            self.crashes.append(f"{node.name}: exit code {code} in round {self.story.open_round}")
            self._say(f"CRASH {self.crashes[-1]}")
            if len(self.crashes) > CRASHES_MAX:
                raise ChaosFailed(f"too many crashes: {'; '.join(self.crashes)}")
            self.blows.owe(now + CRASH_PAUSE_S, f"{node.name} starts again", node.start)

    def _look_after(self, now: float) -> None:
        self.blows.look_after(now)
        for blow in self.blows.made:
            if blow.healed_s is None:
                whole = self.story.whole_again(blow.round_open, blow.at)
                blow.healed_s = None if whole is None else whole - blow.at
        self.growth.look(self._nodes.values(), lambda: troupe.executors(self._directory), now)
        if now > self._ends_at and self._rested(now):
            self.stopped_early = True

    # --- strikes ------------------------------------------------------------------------------------------------------

    async def _strike_all(self, strikes: Sequence[Strike]) -> None:
        for strike in strikes:
            victims = await self._moment_of(strike)
            now = time.monotonic()
            if now > self._ends_at:
                return
            self.blows.hit(strike, victims, self.story.open_round, now)

    async def _moment_of(self, strike: Strike) -> Sequence[Victim]:
        """Return the victims when the moment has come."""
        await self._until(lambda: self._may(strike))
        seen = self.story.counts[strike.moment]
        await self._until(lambda: self.story.counts[strike.moment] > seen)
        journal = cast.journal(self._directory, self._leads(), self.run)
        size = _bytes_of(journal) + strike.journal_bytes
        # A journal that is another one's by now has been left behind: the moment is over.
        await self._until(lambda: _bytes_of(journal) >= size or not self._is_up(self._leads()))
        while not (victims := self._victims(strike)):  # noqa: ASYNC110 - other processes set no event
            await trio.sleep(TICK_S)
        return victims

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - logs and files set no event
            await trio.sleep(TICK_S)

    def _may(self, strike: Strike) -> bool:
        if self.story.round < strike.round:
            return False
        return strike.overlaps or self._rested(time.monotonic())

    def _rested(self, now: float) -> bool:
        last: Blow | None = self.blows.made[-1] if self.blows.made else None
        return last is None or last.healed_s is not None or now - last.at > HEAL_S + HEAL_TTLS * self._job.ttl_s

    def _victims(self, strike: Strike) -> Sequence[Victim]:
        """Return who is struck; nobody where the role is not played now, or a standby is missing."""
        up = {name: node for name, node in self._nodes.items() if self._is_up(name)}
        executors = [each for each in troupe.executors(self._directory) if each.worker in up]
        serving = sorted({each.worker for each in executors if each.work == "aggregate"})
        leader = self._leads()
        candidates: dict[str, Sequence[Victim]] = {
            "gateway": [up[name] for name in cast.GATEWAYS if name in up],
            "data": [up[name] for name in cast.DATA_NODES if name in up],
            "worker": [up[name] for name in cast.WORKERS if name in up and name not in serving],
            "parameter-server": [up[name] for name in serving],
            "executor": executors,
            "scheduler": [up[leader]] if leader in up else [],
        }
        found = candidates[strike.role]
        if strike.act == "all":
            return found
        if strike.act == "take-over" and not all(up[name].ready if name in up else False for name in SCHEDULERS):
            return []
        return [found[int(strike.pick * len(found))]] if found else []

    def _is_up(self, name: str) -> bool:
        node = self._nodes[name]
        return node.wanted and node.runs and not node.stopped

    def _say(self, text: str) -> None:
        at = time.monotonic() - self._began
        sys.stderr.write(f"{at:7.2f} {self.run} round {self.story.open_round:3d}: {text}\n")
        sys.stderr.flush()


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
