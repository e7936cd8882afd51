"""Which samples are free, whose they are, and which are used: each sample once per epoch (rounds.md, invariant L6).

    AVAILABLE ──grant──▶ ASSIGNED(member, round) ──commit, named──▶ USED ──all samples used──▶ next epoch
        ▲                       │
        └── settle: what a contribution leaves · commit without it · excluded or lease gone

A grant never crosses a slice, continues where its member stopped, and avoids slices that others are reading. All state
belongs to one epoch: the next begins only when every sample of this one is USED, so nothing older can be in flight.
Costs: a grant is a few binary searches; nothing walks over all slices except the start of an epoch.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from msgspec import Struct

from hypha.errors import ConfigError, LocalProtocolError
from hypha.protocol.intervals import Spans, intervals_of, overlap
from hypha.protocol.messages import (
    INTERVALS_PER_CONTRIBUTION_MAX,
    Contribution,
    Count,
    Interval,
    Member,
    SliceRef,
)


class Grant(Struct, frozen=True, kw_only=True):
    """One grant as the journal keeps it, written before the SliceGrant is sent."""

    member: Member
    round: Count
    request: Count
    interval: Interval


class Holding(Struct, frozen=True, kw_only=True):
    """What a member holds for a round, and which requests were answered by what."""

    member: Member
    round: Count
    held: tuple[Interval, ...]
    requests: tuple[tuple[Count, Interval], ...]


class TableState(Struct, frozen=True, kw_only=True):
    """A whole table as plain data: what is in neither list is AVAILABLE."""

    epoch: Count
    used: tuple[Interval, ...]
    holdings: tuple[Holding, ...]


class Later(Struct, frozen=True, kw_only=True):
    """No grant yet, but soon: ask again after the earlier round is committed."""

    reason: str


class _Held:
    """The samples of one (member, round) by slice, and the grant that answered each request number."""

    __slots__ = ("requests", "spans")

    def __init__(self) -> None:
        self.spans: dict[int, Spans] = {}
        self.requests: dict[int, Interval] = {}

    def covers(self, interval: Interval) -> bool:
        spans = self.spans.get(interval.slice)
        return spans is not None and spans.covers(interval.start, interval.stop)

    def add(self, number: int, start: int, stop: int) -> None:
        self.spans.setdefault(number, Spans()).add(start, stop)

    def remove(self, number: int, start: int, stop: int) -> None:
        spans = self.spans[number]
        spans.remove(start, stop)
        if not spans:
            del self.spans[number]

    @property
    def pieces(self) -> int:
        return sum(len(spans) for spans in self.spans.values())


class SliceTable:
    """The samples of a dataset over one epoch after another. Every mutation is atomic: it raises or it happens."""

    def __init__(self, slices: Sequence[SliceRef], *, epoch: int = 0) -> None:
        """Start an epoch with everything AVAILABLE. Raises ConfigError for a dataset without samples."""
        self.slices = tuple(slices)
        self.samples_per_epoch = sum(ref.samples for ref in self.slices)
        if not self.samples_per_epoch:
            raise ConfigError("the dataset has no training samples")
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.samples_used = 0
        self._held: dict[tuple[Member, int], _Held] = {}
        self._touched = bytearray(len(self.slices))  # 0: wholly AVAILABLE, and in none of the maps below
        self._free: dict[int, Spans] = {}  # touched slices that still have AVAILABLE samples
        self._used: dict[int, Spans] = {}
        self._cursor = 0  # every slice below it is touched
        self._reading: dict[Member, tuple[int, int]] = {}  # where each member's last grant ended
        self._reader: dict[int, Member] = {}  # the one member a slice is read by, while it lasts
        self._loose: list[int] = []  # heap of slices with AVAILABLE samples and no reader
        self._queued: set[int] = set()  # what is in that heap, once

    # --- granting -------------------------------------------------------------------------------------------------

    def grant(self, member: Member, *, round: int, request: int, wanted: int) -> Interval | Later | None:
        """Assign up to `wanted` samples of one slice to (member, round); a repeated `request` gets the same again.

        None is NoMore: every sample of the epoch is used or assigned. Later: some are assigned to an earlier round,
        whose commit will free them or begin the next epoch.
        """
        if wanted < 1:
            raise LocalProtocolError(f"{wanted} samples cannot be granted")
        held = self._held.get((member, round)) or _Held()
        before = held.requests.get(request)
        if before is not None and held.covers(before):
            return before
        if held.pieces >= INTERVALS_PER_CONTRIBUTION_MAX:
            return None  # a contribution could not list more
        number = self._choose(member)
        if number is None:
            return self._starved(round)
        slice_read, position = self._reading.get(member, (number, 0))
        start, stop = self._free[number].next_from(position if slice_read == number else 0, wanted)
        self._take(number, start, stop)
        held.add(number, start, stop)
        self._held[member, round] = held
        self._reading[member] = (number, stop)
        granted = Interval(epoch=self.epoch, slice=number, start=start, stop=stop)
        held.requests[request] = granted
        return granted

    def _starved(self, round: int) -> Later | None:
        earlier = min((r for _, r in self._held), default=round)
        if earlier < round:
            return Later(reason=f"the rest of epoch {self.epoch} is in round {earlier}, which is not committed yet")
        return None

    def _choose(self, member: Member) -> int | None:
        """Return a slice with AVAILABLE samples: the member's own, one nobody reads, else one that is shared."""
        current = self._reading.get(member)
        if current is not None:
            if current[0] in self._free:
                return current[0]
            self._stop_reading(member)
        number = self._unread()
        if number is not None:
            self._reader[number] = member
            return number
        return max(
            (n for n in self._reader if n in self._free), key=lambda n: (self._free[n].samples, -n), default=None
        )

    def _unread(self) -> int | None:
        while self._loose:
            number = heappop(self._loose)
            self._queued.discard(number)
            if number in self._free and number not in self._reader:
                return number
        while self._cursor < len(self.slices):
            number = self._cursor
            self._cursor += 1
            self._touch(number)
            if number in self._free and number not in self._reader:
                return number
        return None

    def _touch(self, number: int) -> None:
        if not self._touched[number]:
            self._touched[number] = 1
            if self.slices[number].samples:
                self._free[number] = Spans([(0, self.slices[number].samples)])

    def _take(self, number: int, start: int, stop: int) -> None:
        spans = self._free[number]
        spans.remove(start, stop)
        if not spans:
            del self._free[number]

    def _stop_reading(self, member: Member) -> None:
        number, _ = self._reading.pop(member)
        if self._reader.get(number) == member:
            del self._reader[number]
            self._queue(number)

    def _queue(self, number: int) -> None:
        if number in self._free and number not in self._reader and number not in self._queued:
            self._queued.add(number)
            heappush(self._loose, number)

    # --- judging and using ----------------------------------------------------------------------------------------

    def check(self, contribution: Contribution) -> str | None:
        """Return why a Close may not name this contribution now, or None (rounds.md)."""
        member = Member(peer_id=contribution.peer_id, fence=contribution.fence, lease_id=contribution.lease_id)
        total = sum(interval.samples for interval in contribution.intervals)
        if total != contribution.samples:
            return f"it says {contribution.samples} samples, its intervals hold {total}"
        twice = overlap(contribution.intervals)
        if twice is not None:
            return f"its intervals {_say(twice[0])} and {_say(twice[1])} overlap"
        held = self._held.get((member, contribution.round))
        for interval in contribution.intervals:
            if interval.epoch != self.epoch:
                return f"{_say(interval)} is not of epoch {self.epoch}"
            if interval.start >= interval.stop or held is None or not held.covers(interval):
                return f"{_say(interval)} is not assigned to lease {member.lease_id} in round {contribution.round}"
        return None

    def settle(self, contribution: Contribution) -> tuple[Interval, ...]:
        """Split off what the contribution leaves of its grants; that becomes AVAILABLE and is returned.

        Raises LocalProtocolError when `check` would refuse the contribution.
        """
        self._insist(contribution)
        member = Member(peer_id=contribution.peer_id, fence=contribution.fence, lease_id=contribution.lease_id)
        held = self._held.get((member, contribution.round))
        if held is None:
            return ()
        kept: dict[int, Spans] = {}
        for interval in contribution.intervals:
            kept.setdefault(interval.slice, Spans()).add(interval.start, interval.stop)
        before, held.spans = held.spans, kept
        left = {n: Spans(spans) for n, spans in before.items()}
        for interval in contribution.intervals:
            left[interval.slice].remove(interval.start, interval.stop)
        if not kept:
            del self._held[member, contribution.round]
        return self._release(left)

    def commit(self, round: int, contributions: Iterable[Contribution]) -> tuple[Interval, ...]:
        """Make the contributions' samples USED, free the rest of this round's grants, perhaps begin an epoch.

        Returns what became AVAILABLE. Raises LocalProtocolError, changing nothing, when `check` refuses one of them,
        one is of another round, or two are of one lease.
        """
        named = list(contributions)
        if len({(c.peer_id, c.fence) for c in named}) != len(named) or any(c.round != round for c in named):
            raise LocalProtocolError(f"round {round} cannot be committed with these contributions")
        for contribution in named:
            self._insist(contribution)
        for c in named:
            held = self._held.get((Member(peer_id=c.peer_id, fence=c.fence, lease_id=c.lease_id), round))
            for interval in c.intervals:
                assert held is not None, "checked above"
                held.remove(interval.slice, interval.start, interval.stop)
                self._use(interval)
        returned = self.return_round(round)
        if self.samples_used == self.samples_per_epoch:
            self._begin(self.epoch + 1)
        return returned

    def _insist(self, contribution: Contribution) -> None:
        reason = self.check(contribution)
        if reason is not None:
            raise LocalProtocolError(f"contribution {contribution.digest[:12]} of {contribution.peer_id}: {reason}")

    def _use(self, interval: Interval) -> None:
        self._used.setdefault(interval.slice, Spans()).add(interval.start, interval.stop)
        self.samples_used += interval.samples

    # --- returning ------------------------------------------------------------------------------------------------

    def return_member(self, member: Member, round: int) -> tuple[Interval, ...]:
        """Free what (member, round) holds: it is excluded, or never contributed. Returns what became AVAILABLE."""
        held = self._held.pop((member, round), None)
        return self._release(held.spans) if held is not None else ()

    def return_round(self, round: int) -> tuple[Interval, ...]:
        """Free every grant of this and earlier rounds. Returns what became AVAILABLE."""
        keys = sorted(key for key in self._held if key[1] <= round)
        return tuple(interval for member, r in keys for interval in self.return_member(member, r))

    def forget(self, member: Member) -> None:
        """Let others read on in this member's slice: its lease is gone."""
        if member in self._reading:
            self._stop_reading(member)

    def _release(self, spans: dict[int, Spans]) -> tuple[Interval, ...]:
        released = intervals_of(self.epoch, spans.items())
        for interval in released:
            self._free.setdefault(interval.slice, Spans()).add(interval.start, interval.stop)
            self._queue(interval.slice)
        return released

    # --- looking --------------------------------------------------------------------------------------------------

    def holders(self) -> list[tuple[Member, int]]:
        """Every (member, round) that holds samples or has been answered, in order."""
        return sorted(self._held)

    def held(self, member: Member, round: int) -> tuple[Interval, ...]:
        """What (member, round) holds now."""
        held = self._held.get((member, round))
        return intervals_of(self.epoch, held.spans.items()) if held is not None else ()

    def used(self) -> tuple[Interval, ...]:
        """Every USED sample of this epoch."""
        return intervals_of(self.epoch, self._used.items())

    @property
    def samples_assigned(self) -> int:
        """How many samples are ASSIGNED."""
        return sum(spans.samples for held in self._held.values() for spans in held.spans.values())

    # --- keeping --------------------------------------------------------------------------------------------------

    def snapshot(self) -> TableState:
        """Return the table as plain data."""
        holdings = tuple(
            Holding(member=m, round=r, held=self.held(m, r), requests=tuple(sorted(self._held[m, r].requests.items())))
            for m, r in self.holders()
        )
        return TableState(epoch=self.epoch, used=self.used(), holdings=holdings)

    @classmethod
    def from_snapshot(cls, slices: Sequence[SliceRef], state: TableState) -> "SliceTable":
        """Return the table that `snapshot` described (who reads which slice is forgotten; it only is a preference)."""
        table = cls.restore(slices, epoch=state.epoch, used=state.used)
        for holding in state.holdings:
            held = table._held[holding.member, holding.round] = _Held()
            held.requests.update(holding.requests)
            for interval in holding.held:
                table._touch(interval.slice)
                table._take(interval.slice, interval.start, interval.stop)
                held.add(interval.slice, interval.start, interval.stop)
        return table

    @classmethod
    def restore(
        cls,
        slices: Sequence[SliceRef],
        *,
        epoch: int,
        used: Iterable[Interval],
        grants: Iterable[Grant] = (),
        committed: int = 0,
    ) -> "SliceTable":
        """Return the table that the manifests' USED intervals and the journal's grants, in order, describe.

        A later grant of the same samples proves that the earlier holder had lost them, so it wins. What is USED stays
        USED. Grants of other epochs and of rounds up to `committed` are void. Raises LocalProtocolError for USED
        samples that are not in the dataset, or twice.
        """
        table = cls(slices, epoch=epoch)
        for interval in used:
            if interval.epoch != epoch or interval.slice >= len(table.slices):
                raise LocalProtocolError(f"{_say(interval)} is not of epoch {epoch} of this dataset")
            table._touch(interval.slice)
            if not table._available(interval):
                raise LocalProtocolError(f"{_say(interval)} is used twice or not in the dataset")
            table._take(interval.slice, interval.start, interval.stop)
            table._use(interval)
        if table.samples_used == table.samples_per_epoch:
            table._begin(epoch + 1)
        for grant in grants:
            if grant.interval.epoch == table.epoch and grant.interval.slice < len(table.slices):
                table._replay(grant, void=grant.round <= committed)
        return table

    def _available(self, interval: Interval) -> bool:
        return interval.slice in self._free and self._free[interval.slice].covers(interval.start, interval.stop)

    def _replay(self, grant: Grant, *, void: bool) -> None:
        number, start, stop = grant.interval.slice, grant.interval.start, grant.interval.stop
        self._touch(number)
        for held in self._held.values():
            spans = held.spans.get(number)
            for lost in spans.within(start, stop) if spans is not None else ():
                held.remove(number, *lost)
                self._release({number: Spans([lost])})
        if void:
            return
        mine = self._held.setdefault((grant.member, grant.round), _Held())
        mine.requests[grant.request] = grant.interval
        free = self._free.get(number)
        for piece in free.within(start, stop) if free is not None else ():
            self._take(number, *piece)
            mine.add(number, *piece)


def _say(interval: Interval) -> str:
    return f"[{interval.start}, {interval.stop}) of slice {interval.slice} in epoch {interval.epoch}"
