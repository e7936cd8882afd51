"""The hold on a job's store: its leader renews it there, everybody else watches until it lapses (guarantees.md).

    start     nobody's, or this identity's own? ─▶ make the next number: lead       another's? ─▶ stand by
    leader    hold/000000000007 ─ beat ─▶ hold/000000000008 ─ beat ─▶ …             older ones are removed
                 └─ with each beat: has a higher job epoch begun in the chain? ─▶ Deposed
    standby   a new number? ─▶ wait on │ the same for `hold_s` of its own clock ─▶ lapsed: make the next number
                                                              made by another? ─▶ wait on │ made here: take over

Each number is made once, after the newest: a hold changes hands only when it lapses, and of several contenders one has
it. No time crosses machines: a beat is a number that changes, and the duration after which its silence means something.
A hold may be lost while its holder lives, like a lease; what keeps two leaders apart is the chain, in which each job
epoch begins once. Who leads on without it watches as a standby does, and has it back if nothing comes of the other.
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
# The newest beat may be replaced while it is looked at: so often in a row it is not.
LOOKS_MAX = 16
SUBJECT = "hold"


class Beat(Struct, frozen=True, kw_only=True):
    """What lies under the newest number."""

    scheduler: str
    hold_s: float


class Seen(Struct, frozen=True):
    """The newest beat as a watcher finds it; `name` is "" before there is one."""

    name: str
    beat: Beat | None


class HeldByAnother(Deposed):
    """Another scheduler holds the job's store, and this one has begun no job epoch: stand by."""


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

    def take(self) -> None:
        """Make the next beat: the hold is nobody's, or was this identity's, which is back. Blocks.

        Raises HeldByAnother, or StoreError.
        """
        other = self._renew()
        if other is not None:
            raise HeldByAnother(f"the hold on the job's store: {_words(other)}")

    async def keep(self, deposed: Callable[[], str | None], standing: Standing) -> None:
        """Renew until cancelled. Raises Deposed as soon as `deposed` (called in a thread) says why."""
        watch = Watch(self._mine.hold_s, self._runtime.now())
        while True:
            try:
                other = await self._runtime.run_blocking(self._renew)
                if other is not None and watch.see(other, self._runtime.now()) <= 0:
                    await self._runtime.run_blocking(self._follow, other)
                reason = await self._runtime.run_blocking(deposed)
            except StoreError as error:
                standing.warn(SUBJECT, "The hold on the job's store cannot be renewed; tried again", str(error))
            else:
                if reason is not None:
                    raise Deposed(reason)
                if other is not None:
                    standing.warn(SUBJECT, "The hold on the job's store is another scheduler's; watched", _words(other))
                elif standing.clear(SUBJECT):
                    log.info("The hold on the job's store is renewed again")
            await self._runtime.sleep(self._mine.hold_s / BEATS)

    def _renew(self) -> Seen | None:
        """Make the next beat; returns the newest one instead where another scheduler has made that."""
        for _ in range(LOOKS_MAX):
            seen = self.look()
            if seen.beat is not None and seen.beat.scheduler != self._mine.scheduler:
                return seen
            if self._follow(seen):
                return None
        raise StoreError(f"{FOLDER}: {LOOKS_MAX} numbers in a row were taken by others")

    def _follow(self, seen: Seen) -> bool:
        """Make the beat after this one, and remove those before; False where the hold has gone on without it."""
        name = f"{FOLDER}/{_number(seen.name) + 1:012d}"
        try:
            self._objects.create(name, [msgspec.json.encode(self._mine)])
        except AlreadyExists:
            return False
        names = self._objects.names(FOLDER)
        if max(names, key=_number, default=name) != name:
            # What was seen is long gone, and its number was free again.
            self._objects.remove(name)
            return False
        for old in names:
            if old != name:
                self._objects.remove(old)
        return True

    # --- standing by ----------------------------------------------------------------------------------------------

    async def lapsed(self) -> None:
        """Return once nobody has renewed the hold for its duration, and the next beat is ours: of several, one goes."""
        runtime, mine = self._runtime, self._mine
        watch = Watch(mine.hold_s, runtime.now())
        while True:
            try:
                seen = await runtime.run_blocking(self.look)
                left_s = watch.see(seen, runtime.now())
                claimed = left_s <= 0 and await runtime.run_blocking(self._follow, seen)
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


def _words(seen: Seen) -> str:
    if seen.beat is None:
        return "nobody has it"
    return f"{seen.beat.scheduler} has it, and loses it once it was silent for {seen.beat.hold_s:g} s"
