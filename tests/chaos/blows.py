"""Strikes as they are made, and what is owed to those who were struck.

victims ─▶ hit ─▶ Blow, and a Repair: when it is due, and what it does
                    kill, all  started again after a pause, or at the latest with the next strike
                    stop       goes on after two ttls
                    leave      started again a pause after it has gone
                    take-over  started again, standing by, once the other leads
executors and spares of a killed worker ─▶ Outlived: how long they lived on
"""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from tests.chaos import troupe
from tests.chaos.plan import Strike
from tests.chaos.troupe import STANDBY, Node, Running

# Who stays away comes back with the next strike, and no later than this: who is left may be too few to go on.
AWAY_TTLS = 5
Victim = Node | Running


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


class Leaving(Struct):
    """A worker that was asked to leave: with exit code 0, and soon."""

    node: Node
    since: float
    ended_s: float | None = None
    code: int | None = None


class Repair(Struct, frozen=True):
    """What is owed to a victim: as soon as it `is_due`, or with the next strike where it `stays_away`."""

    is_due: Callable[[float], bool]
    what: str
    act: Callable[[], None]
    stays_away: bool = False


class Blows:
    """Makes strikes and repairs them. `leads` says which scheduler leads the job, by name."""

    def __init__(self, directory: Path, ttl_s: float, leads: Callable[[], str], say: Callable[[str], None]) -> None:
        self.made: list[Blow] = []
        self.outlived: list[Outlived] = []
        self.leavings: list[Leaving] = []
        self.over = False  # the job is: nobody leads it again
        self._directory = directory
        self._ttl_s = ttl_s
        self._leads = leads
        self._say = say
        self._repairs: list[Repair] = []

    def hit(self, strike: Strike, victims: Sequence[Victim], round_open: int, now: float) -> None:
        """Strike them all."""
        names = ", ".join(
            each.name if isinstance(each, Node) else f"{each.work} executor of {each.worker}" for each in victims
        )
        self._say(f"strike {strike.number + 1}: {strike.act} {strike.role} {names}")
        # Those who were to stay away until now come back: somebody must be left for the next strike.
        self._act([repair for repair in self._repairs if repair.stays_away])
        self.made.append(Blow(strike=strike, victim=names, at=now, round_open=round_open))
        for victim in victims:
            if isinstance(victim, Running):
                self._hit_executor(strike, victim, now)
            elif strike.act == "stop":
                victim.stop()
                self.owe(now + 2 * self._ttl_s, f"{victim.name} goes on", victim.go_on)
            elif strike.act == "leave":
                victim.leave()
                self.leavings.append(Leaving(victim, now))
            else:
                self._kill(strike, victim, now)

    def _hit_executor(self, strike: Strike, victim: Running, now: float) -> None:
        if strike.act != "stop":
            troupe.signal_group(victim.pgid, signal.SIGKILL)
            return
        troupe.signal_group(victim.pgid, signal.SIGSTOP)
        self.owe(
            now + 2 * self._ttl_s,
            f"the executor of {victim.worker} goes on",
            lambda: troupe.signal_group(victim.pgid, signal.SIGCONT) if victim.lives else None,
        )

    def _kill(self, strike: Strike, node: Node, now: float) -> None:
        mine = [*troupe.executors(self._directory), *troupe.spares(self._directory)]
        self.outlived += [Outlived(each, now) for each in mine if each.worker == node.name]
        node.kill()
        if node.role == "scheduler":
            self._bring_back(strike, node, now)
            return
        stays_away = strike.long and strike.act != "all"
        wait_s = AWAY_TTLS * self._ttl_s if stays_away else strike.pause_s
        self.owe(now + wait_s, f"{node.name} starts again", node.start, stays_away=stays_away)

    def _bring_back(self, strike: Strike, node: Node, now: float) -> None:
        def other_leads() -> bool:
            return self._leads() != node.name

        def start() -> None:
            if not self.over:
                node.start(*((STANDBY,) if other_leads() else ()))

        if strike.act == "take-over":
            self._repairs.append(Repair(lambda _now: other_leads(), f"{node.name} stands by", start))
        else:
            self.owe(now + strike.pause_s, f"{node.name} starts again", start)

    # --- repairs --------------------------------------------------------------------------------------------------

    def owe(self, due: float, what: str, act: Callable[[], None], *, stays_away: bool = False) -> None:
        """Remember to do something at `due`."""
        self._repairs.append(Repair(lambda now: now >= due, what, act, stays_away))

    def repair(self, now: float, *, everything: bool = False) -> None:
        """Do what is due."""
        self._act([repair for repair in self._repairs if everything or repair.is_due(now)])

    def _act(self, due: Sequence[Repair]) -> None:
        self._repairs = [repair for repair in self._repairs if repair not in due]
        for repair in due:
            self._say(repair.what)
            repair.act()

    def look_after(self, now: float) -> None:
        """See who has ended: executors of killed workers, and workers that were asked to leave."""
        for each in self.outlived:
            if each.ended_s is None and not each.executor.lives:
                each.ended_s = now - each.since
                work, worker = each.executor.work, each.executor.worker
                self._say(f"the {work} executor of {worker} ended {each.ended_s:.2f} s after its worker was killed")
        for leaving in self.leavings:
            if leaving.ended_s is None and (code := leaving.node.left()) is not None:
                leaving.code, leaving.ended_s = code, now - leaving.since
                self._say(f"{leaving.node.name} left after {leaving.ended_s:.2f} s, exit code {code}")
                strike = next(b.strike for b in reversed(self.made) if leaving.node.name == b.victim)
                self.owe(now + strike.pause_s, f"{leaving.node.name} comes back", leaving.node.start)
