"""The hold on a job's store: its leader renews it there, a standby watches until it lapses (guarantees.md).

    leader    hold/000000000007 ─ beat ─▶ hold/000000000008 ─ beat ─▶ …      older ones are removed
                 └─ with each beat: has a higher job epoch begun in the chain? ─▶ Deposed
    standby   a new number? ─▶ wait on │ the same for `hold_s` of its own clock ─▶ lapsed: make the next number
                                                              made by another? ─▶ wait on │ made here: take over

No time crosses machines: a beat is a number that changes, and the duration after which its silence means something.
A hold is a courtesy, like a lease it may be lost while its holder lives; what keeps two leaders apart is the chain, in
which each job epoch begins once.
"""

from collections.abc import Callable

import msgspec
from msgspec import Struct

from hypha.errors import StoreError
from hypha.runtime import Runtime
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import Deposed
from hypha.store.disk import AlreadyExists, NotFound
from hypha.store.objects import ObjectStore
from hypha.telemetry import get_logger

log = get_logger("scheduler.hold")

FOLDER = "hold"
# Beats in one `hold_s`: four may fail, or be late, before anybody takes over.
BEATS = 5
# Somebody else may beat, too, until one of them finds out: numbers that are taken are passed over.
TAKEN_MAX = 16
SUBJECT = "hold"


class Beat(Struct, frozen=True, kw_only=True):
    """What lies under the newest number."""

    scheduler: str
    hold_s: float


class Seen(Struct, frozen=True):
    """The newest beat as a watcher finds it; `name` is "" before there is one."""

    name: str
    beat: Beat | None


class Watch:
    """Whether a hold has lapsed: the rule. `hold_s` counts as long as no beat says another; `now` is the watcher's."""

    def __init__(self, hold_s: float, now: float) -> None:
        self._hold_s = hold_s
        self._name: str | None = None
        self._since = now

    def see(self, seen: Seen, now: float) -> float:
        """Take in what was found; returns in how many seconds the hold lapses if nothing changes, 0: it has."""
        if seen.name != self._name:
            self._name, self._since = seen.name, now
            self._hold_s = seen.beat.hold_s if seen.beat is not None else self._hold_s
        return max(0.0, self._since + self._hold_s - now)


class Hold:
    """One scheduler's way of holding a store, or of watching it."""

    def __init__(self, objects: ObjectStore, runtime: Runtime, *, scheduler: str, hold_s: float) -> None:
        self._objects = objects
        self._runtime = runtime
        self._mine = Beat(scheduler=scheduler, hold_s=hold_s)
        self.leader: str | None = None  # as a watcher last saw it

    # --- leading --------------------------------------------------------------------------------------------------

    async def keep(self, deposed: Callable[[], str | None], standing: Standing) -> None:
        """Renew until cancelled. Raises Deposed as soon as `deposed` (called in a thread) says why."""
        while True:
            try:
                await self._runtime.run_blocking(self._beat)
                reason = await self._runtime.run_blocking(deposed)
            except StoreError as error:
                standing.warn(SUBJECT, "The hold on the job's store cannot be renewed; tried again", str(error))
            else:
                if standing.clear(SUBJECT):
                    log.info("The hold on the job's store is renewed again")
                if reason is not None:
                    raise Deposed(reason)
            await self._runtime.sleep(self._mine.hold_s / BEATS)

    def _beat(self) -> None:
        names = self._objects.names(FOLDER)
        number = max((_number(name) for name in names), default=0)
        body = msgspec.json.encode(self._mine)
        for _ in range(TAKEN_MAX):
            number += 1
            name = f"{FOLDER}/{number:012d}"
            try:
                self._objects.create(name, [body])
            except AlreadyExists:
                continue
            for old in names:
                self._objects.remove(old)
            return
        raise StoreError(f"{FOLDER}: {TAKEN_MAX} numbers in a row were taken by others")

    # --- standing by ----------------------------------------------------------------------------------------------

    async def lapsed(self) -> None:
        """Return once nobody has renewed the hold for its duration, and the next beat is ours: of several, one goes."""
        runtime, mine = self._runtime, self._mine
        watch = Watch(mine.hold_s, runtime.now())
        while True:
            try:
                seen = await runtime.run_blocking(self.look)
                left_s = watch.see(seen, runtime.now())
                claimed = left_s <= 0 and await runtime.run_blocking(self._claim, seen)
            except StoreError as error:
                # Who cannot use the store cannot lead from it; and how long it was so says nothing about the leader.
                log.warn("The hold on the job's store cannot be read", reason=str(error))
                watch = Watch(mine.hold_s, runtime.now())
                await runtime.sleep(mine.hold_s / BEATS)
                continue
            if claimed:
                log.warn("The hold on the job's store has lapsed", leader=self.leader or "nobody", beat=seen.name)
                return
            if seen.beat is not None and seen.beat.scheduler != self.leader:
                self.leader = seen.beat.scheduler
                log.info("Standing by", leader=self.leader, hold_s=seen.beat.hold_s)
            await runtime.sleep(min(left_s or mine.hold_s, mine.hold_s / BEATS))

    def _claim(self, seen: Seen) -> bool:
        """Make the beat after this one; False where somebody else did."""
        try:
            self._objects.create(f"{FOLDER}/{_number(seen.name) + 1:012d}", [msgspec.json.encode(self._mine)])
        except AlreadyExists:
            return False
        return True

    def look(self) -> Seen:
        """Return the newest beat; one that cannot be read is a number that changes, as any other. Raises StoreError."""
        name = max(self._objects.names(FOLDER), key=_number, default="")
        if not name:
            return Seen("", None)
        try:
            return Seen(name, msgspec.json.decode(self._objects.read(name), type=Beat))
        except (NotFound, msgspec.DecodeError):
            return Seen(name, None)  # replaced meanwhile: the next look finds another


def _number(name: str) -> int:
    text = name.rpartition("/")[2]
    return int(text) if text.isascii() and text.isdigit() else 0
