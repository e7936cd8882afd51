"""When each worker should contribute, so that all finish together and the round has its samples (rounds.md).

    target 400 samples          done   batch     speed       the round is full at t = 5 s
    a   ■■■■■■■■■■············  160    32/0.5 s  64 per s    sync after 15 batches (10 more)
    b   ■■■··                    24     8/0.5 s  16 per s    …

Everybody's next batches are known from the mean time of the last ones; the round is full at the first batch, in order
of X
"""

from heapq import heapify, heapreplace
from math import ceil, floor, inf

from msgspec import Struct

from hypha.protocol.messages import Member

# A share is fetched in about this many requests: small enough to follow a change of speed, few enough to be cheap.
REQUESTS_PER_SHARE = 4
# Batch times of one machine vary by so much (1/8) without meaning anything; equal machines keep equal batches.
STEADY_SHARE = 0.125
# A batch that takes no measurable time would make every forecast infinite.
BATCH_S_MIN = 1e-6


class Pace(Struct, frozen=True, kw_only=True):
    """A member's totals since the start of the round, as measured at `at` (seconds). batch_s 0: not measured yet."""

    batches: int
    samples: int
    batch_size: int
    batch_s: float
    at: float

    @property
    def speed(self) -> float:
        """Samples per second."""
        return self.batch_size / max(self.batch_s, BATCH_S_MIN) if self.batch_s > 0 else 0.0


class SyncPlan(Struct, frozen=True, kw_only=True):
    """`full_in_s`: when the target is reached, None if it never is; `batches`: after how many each should sync."""

    full_in_s: float | None
    batches: dict[Member, int]


def sync_points(target_samples: int, paces: dict[Member, Pace], *, given: int = 0, now: float) -> SyncPlan:
    """Plan one round in which `given` samples were contributed already.

    The sum of samples is at least the target, and without the last batch it would be below it, except that everybody
    does at least one batch, and that nobody undoes what is done.
    """
    planned = {member: max(1, pace.batches) for member, pace in paces.items()}
    have = given + sum(pace.samples + (pace.batches == 0) * pace.batch_size for pace in paces.values())
    measured = {member: pace for member, pace in paces.items() if pace.speed > 0}
    missing = target_samples - have
    if missing <= 0 or not measured:
        return SyncPlan(full_in_s=0.0 if missing <= 0 else None, batches=planned)
    at, missing = _skip_ahead(measured, planned, missing)
    ends = [(_end(pace, planned[member] + 1), member) for member, pace in measured.items()]
    heapify(ends)
    while missing > 0:
        at, member = ends[0]
        planned[member] += 1
        missing -= measured[member].batch_size
        heapreplace(ends, (_end(measured[member], planned[member] + 1), member))
    return SyncPlan(full_in_s=max(0.0, at - now), batches=planned)


def _end(pace: Pace, batches: int) -> float:
    """When the member completes that many batches."""
    return pace.at + (batches - pace.batches) * max(pace.batch_s, BATCH_S_MIN)


def _skip_ahead(measured: dict[Member, Pace], planned: dict[Member, int], missing: int) -> tuple[float, int]:
    """Plan at once what surely is needed; leaves about a batch or two of each member to be planned singly.

    Were batches endlessly divisible, the target would be reached at `full_at`. It is reached no sooner with whole ones,
    so all that are complete by then are needed. Members still busy then add nothing before it.
    """
    rate = head = 0.0
    full_at = inf
    for end, member in sorted((_end(pace, planned[member]), member) for member, pace in measured.items()):
        if end >= full_at:
            break
        rate += measured[member].speed
        head += measured[member].speed * end
        full_at = (missing + head) / rate
    for member, pace in measured.items():
        # One batch less than complete by then, so that rounding never plans one too many.
        more = max(0, floor((full_at - _end(pace, planned[member])) / max(pace.batch_s, BATCH_S_MIN)) - 1)
        planned[member] += more
        missing -= more * pace.batch_size
    return full_at, missing


class Forecast:
    """The sync points of one round, told once and changed only when they move by more than one batch."""

    def __init__(self, target_samples: int) -> None:
        self.target_samples = target_samples
        self._paces: dict[Member, Pace] = {}
        self._given: dict[Member, int] = {}  # samples of members that have contributed, dead ones too
        self._told: dict[Member, int] = {}

    def measure(self, member: Member, pace: Pace) -> None:
        """Take a progress report; one that is older than what is known is ignored."""
        known = self._paces.get(member)
        if member not in self._given and (known is None or pace.batches >= known.batches):
            self._paces[member] = pace

    def contributed(self, member: Member, samples: int) -> None:
        """A member is done with this round."""
        self._given[member] = samples
        self._paces.pop(member, None)

    def gone(self, member: Member) -> None:
        """A member's lease ended: what it has not contributed, the others have to do."""
        self._paces.pop(member, None)
        self._told.pop(member, None)

    def plan(self, now: float) -> SyncPlan:
        """Return the newest plan, before it is steadied."""
        return sync_points(self.target_samples, self._paces, given=sum(self._given.values()), now=now)

    def sync_after(self, member: Member, now: float) -> int | None:
        """Return after how many batches of this round the member should contribute; None: not known yet."""
        pace = self._paces.get(member)
        if pace is None:
            return None
        told = self._told.get(member)
        if told is not None and pace.batches >= told:
            return told
        if pace.speed == 0.0:
            return told
        wanted = self.plan(now).batches[member]
        if told is None or abs(wanted - told) > 1:
            self._told[member] = wanted
        return self._told[member]


def grant_size(sync_after: int | None, pace: Pace | None, *, batch_size: int) -> int:
    """Return how many samples to grant at a time: a part of what remains of the member's share, in whole batches."""
    if sync_after is None or pace is None:
        return batch_size
    remaining = max(1, sync_after - pace.batches)
    return batch_size * ceil(remaining / REQUESTS_PER_SHARE)


def batch_sizes(speeds: dict[Member, float], *, batch_size_max: int) -> dict[Member, int]:
    """Return batch sizes in proportion to samples per second, so that all batches take about as long.

    The fastest gets `batch_size_max`, everybody at least 1, and whoever has not been measured (speed 0) the most.
    """
    fastest = max(speeds.values(), default=0.0)
    if fastest in (0.0, inf):
        return dict.fromkeys(speeds, batch_size_max)
    return {
        member: max(1, round(batch_size_max * speed / fastest)) if speed > 0 else batch_size_max
        for member, speed in speeds.items()
    }


def steadied(wanted: dict[Member, int], told: dict[Member, int]) -> dict[Member, int]:
    """Return the sizes to use: those told before where what is wanted now differs by no more than an eighth of it.

    Who was told nothing yet has had the most that anybody is wanted to have.
    """
    before = dict.fromkeys(wanted, max(wanted.values(), default=0)) | told
    return {
        member: size if abs(size - before[member]) > STEADY_SHARE * before[member] else before[member]
        for member, size in wanted.items()
    }
