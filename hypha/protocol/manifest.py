"""The chain of commits: what a job's store must hold, in this order, for the job to be where it is (rounds.md).

    0 JobEpochStarted(1) ◀── 1 RoundCommitted(1) ◀── 2 RoundCommitted(2) ◀── 3 JobEpochStarted(2) ◀── …

Every entry has a number and names its predecessor by digest; the store makes entry n at most once. Whoever replays
the chain knows the round, the model, the samples used and whose turn it is: nothing else at start-up is believed.
Entries are canonical JSON (sorted keys); the sha256 over these bytes is computed by the caller and passed in.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from math import isfinite

import msgspec
from msgspec import Struct

from hypha.errors import LocalProtocolError, RemoteProtocolError
from hypha.protocol.intervals import Spans, intervals_of
from hypha.protocol.messages import Contribution, Count, Digest, Interval, Merged, Name, PeerId, SliceRef

# One entry holds every contribution of a round with its intervals; more than a control message, yet bounded.
ENTRY_BYTES_MAX = 64 << 20


class Entry(Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """What all entries have. `nonce` tells one's own entry from a competitor's with the same content."""

    number: Count
    previous: Digest | None  # None for entry 0 only
    job_id: Name
    job_epoch: Count
    nonce: Name


class JobEpochStarted(Entry, frozen=True, kw_only=True):
    """From here on the job is this scheduler's; entries of lower epochs can no longer be made."""

    scheduler: PeerId
    # What the job is, in its scheduler's words; every epoch of a chain says the same.
    settings: str = ""


class RoundCommitted(Entry, frozen=True, kw_only=True, omit_defaults=True):
    """Outer step `merged.round` happened, once and for all, from exactly these contributions."""

    merged: Merged  # of the whole
    parts: tuple[Merged, ...] = ()  # by shard, where there are several
    contributions: tuple[Contribution, ...]  # all that the Close named, empty ones too, in (peer id, fence) order
    samples: Count  # in this round

    @property
    def shards(self) -> tuple[Merged, ...]:
        """What each shard's parameter server made, in their order."""
        return self.parts or (self.merged,)


AnyEntry = JobEpochStarted | RoundCommitted


class Found(Enum):
    """What lies where our entry was to be made."""

    OURS = "ours"  # it was made after all: success
    RELOAD = "reload"  # another's: drop in-memory state and replay the chain
    DEPOSED = "deposed"  # a higher epoch has begun: stop


class ChainState(Struct, frozen=True, kw_only=True):
    """Where a job is. `epoch` counts passes over the dataset, `used` are the samples of that pass."""

    job_id: str
    number: int = 0  # of the next entry
    digest: str | None = None  # of the newest entry
    job_epoch: int = 0
    scheduler: str | None = None
    round: int = 0
    # By shard; empty: no outer step yet, the initial model is not pinned down.
    models: tuple[str, ...] = ()
    momenta: tuple[str, ...] = ()
    model_digest: str | None = None  # of the whole
    close: int = 0
    records: tuple[str, ...] = ()  # record digests of rounds 1 … round
    epoch: int = 0
    used: tuple[Interval, ...] = ()
    samples: int = 0  # over the whole job


def to_bytes(entry: AnyEntry) -> bytes:
    """Return the entry's canonical bytes. Raises LocalProtocolError: over ENTRY_BYTES_MAX, or not finite."""
    # JSON has no NaN: it would be written as null, and never read again.
    if isinstance(entry, RoundCommitted) and not all(map(isfinite, _floats(entry))):
        raise LocalProtocolError(f"chain entry {entry.number} holds a number that is not finite")
    data = msgspec.json.encode(entry, order="deterministic")
    if len(data) > ENTRY_BYTES_MAX:
        raise LocalProtocolError(f"chain entry {entry.number} of {len(data)} bytes exceeds {ENTRY_BYTES_MAX}")
    return data


def _floats(entry: RoundCommitted) -> list[float]:
    norms = [merged.update_norm for merged in (entry.merged, *entry.parts)]
    return [*norms, *(contribution.loss for contribution in entry.contributions)]


def from_bytes(data: bytes) -> AnyEntry:
    """Return the entry in `data`. Raises RemoteProtocolError: too big, wrong shape, or not canonical."""
    if len(data) > ENTRY_BYTES_MAX:
        raise RemoteProtocolError(f"chain entry of {len(data)} bytes exceeds {ENTRY_BYTES_MAX}")
    try:
        entry: AnyEntry = msgspec.json.decode(data, type=AnyEntry)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"chain entry has the wrong shape: {error}") from error
    if to_bytes(entry) != data:
        raise RemoteProtocolError(f"chain entry {entry.number} is not in canonical form")
    return entry


def judge_existing(mine: AnyEntry, found: AnyEntry) -> Found:
    """Return what to do when the store says that entry `mine.number` exists and `found` is it."""
    if found.nonce == mine.nonce and found == mine:
        return Found.OURS
    return Found.DEPOSED if found.job_epoch > mine.job_epoch else Found.RELOAD


class Chain:
    """Replays entries one by one and refuses, with the reason, whatever cannot follow; a refusal changes nothing."""

    def __init__(self, job_id: str, slices: Sequence[SliceRef]) -> None:
        self._slices = tuple(slices)
        self._samples_per_epoch = sum(ref.samples for ref in slices)
        self._used: dict[int, Spans] = {}
        self._samples_used = 0
        self._records: list[str] = []
        self._state = ChainState(job_id=job_id)

    @property
    def state(self) -> ChainState:
        """Where the job is after the entries so far."""
        used = intervals_of(self._state.epoch, self._used.items())
        return msgspec.structs.replace(self._state, used=used, records=tuple(self._records))

    def epoch_entry(self, *, scheduler: str, nonce: str, settings: str = "", skipped: int = 0) -> JobEpochStarted:
        """Return the entry by which `scheduler` would take the job over.

        `skipped`: how many epochs may have begun in entries that are no longer readable.
        """
        state = self._state
        return JobEpochStarted(
            number=state.number,
            previous=state.digest,
            job_id=state.job_id,
            job_epoch=state.job_epoch + 1 + skipped,
            nonce=nonce,
            scheduler=scheduler,
            settings=settings,
        )

    def round_entry(
        self,
        merged: Merged,
        contributions: Iterable[Contribution],
        *,
        job_epoch: int,
        nonce: str,
        parts: Sequence[Merged] = (),
    ) -> RoundCommitted:
        """Return the entry that commits `merged`, by shard `parts` where there are several.

        `job_epoch` is the writer's own, whatever the chain has become.
        """
        named = tuple(sorted(contributions, key=lambda c: (c.peer_id, c.fence)))
        return RoundCommitted(
            number=self._state.number,
            previous=self._state.digest,
            job_id=self._state.job_id,
            job_epoch=job_epoch,
            nonce=nonce,
            merged=merged,
            parts=tuple(parts),
            contributions=named,
            samples=sum(c.samples for c in named),
        )

    def append(self, digest: str, entry: AnyEntry) -> None:
        """Take the next entry, whose bytes have `digest`. Raises RemoteProtocolError when it cannot follow."""
        state = self._state
        where = f"chain entry {entry.number}"
        if entry.job_id != state.job_id:
            raise RemoteProtocolError(f"{where} is of job {entry.job_id}, not {state.job_id}")
        if entry.number != state.number:
            raise RemoteProtocolError(f"{where} cannot follow {state.number - 1}: the chain has a gap")
        if entry.previous != state.digest:
            raise RemoteProtocolError(f"{where} names predecessor {entry.previous}, which is not {state.digest}")
        following = self._after_epoch(entry) if isinstance(entry, JobEpochStarted) else self._after_round(entry, where)
        self._state = msgspec.structs.replace(following, number=entry.number + 1, digest=digest)

    def _after_epoch(self, entry: JobEpochStarted) -> ChainState:
        if entry.job_epoch <= self._state.job_epoch:
            raise RemoteProtocolError(
                f"chain entry {entry.number} starts job epoch {entry.job_epoch}, but {self._state.job_epoch} has begun"
            )
        return msgspec.structs.replace(self._state, job_epoch=entry.job_epoch, scheduler=entry.scheduler)

    def _after_round(self, entry: RoundCommitted, where: str) -> ChainState:
        state, merged = self._state, entry.merged
        if not state.job_epoch or entry.job_epoch != state.job_epoch:
            raise RemoteProtocolError(f"{where} is of job epoch {entry.job_epoch}, but it is {state.job_epoch}'s turn")
        if merged.round != state.round + 1:
            raise RemoteProtocolError(f"{where} commits round {merged.round} after round {state.round}")
        bases = tuple(shard.base_digest for shard in entry.shards)
        if state.models and (merged.base_digest, bases) != (state.model_digest, state.models):
            raise RemoteProtocolError(f"{where}: round {merged.round} was not made from model {state.round}")
        epoch = self._use(entry, where)
        self._records.append(merged.record_digest)
        return msgspec.structs.replace(
            state,
            round=merged.round,
            models=tuple(shard.model_digest for shard in entry.shards),
            momenta=tuple(shard.momentum_digest for shard in entry.shards),
            model_digest=merged.model_digest,
            close=merged.close,
            epoch=epoch,
            samples=state.samples + entry.samples,
        )

    def _use(self, entry: RoundCommitted, where: str) -> int:
        """Mark the entry's samples USED and return the pass over the dataset that they belong to."""
        begins = self._samples_used == self._samples_per_epoch
        epoch = self._state.epoch + 1 if begins else self._state.epoch
        touched: dict[int, Spans] = {}
        for interval in self._intervals(entry, where):
            number = interval.slice
            known = number < len(self._slices) and interval.stop <= self._slices[number].samples
            if not known or interval.epoch != epoch or interval.start >= interval.stop:
                raise RemoteProtocolError(f"{where} uses {interval}, which epoch {epoch} of this dataset does not have")
            if number not in touched:
                touched[number] = Spans(() if begins else self._used.get(number, ()))
            if touched[number].within(interval.start, interval.stop):
                raise RemoteProtocolError(f"{where} uses samples of slice {number} twice")
            touched[number].add(interval.start, interval.stop)
        if begins:
            self._used = {}
        self._used.update(touched)
        self._samples_used = entry.samples if begins else self._samples_used + entry.samples
        return epoch

    def _intervals(self, entry: RoundCommitted, where: str) -> list[Interval]:
        named = entry.contributions
        if len({(c.peer_id, c.fence) for c in named}) != len(named):
            raise RemoteProtocolError(f"{where} names one lease twice")
        for c in named:
            if c.round != entry.merged.round or c.samples != sum(i.samples for i in c.intervals):
                raise RemoteProtocolError(f"{where}: the contribution of {c.peer_id} contradicts itself")
        if not entry.samples or entry.samples != sum(c.samples for c in named):
            raise RemoteProtocolError(f"{where} says {entry.samples} samples; its contributions say otherwise")
        return [interval for c in named for interval in c.intervals]


def replay(job_id: str, slices: Sequence[SliceRef], entries: Iterable[tuple[str, AnyEntry]]) -> ChainState:
    """Return where a job is by its (digest, entry) chain. Raises RemoteProtocolError at an entry that cannot follow."""
    chain = Chain(job_id, slices)
    for digest, entry in entries:
        chain.append(digest, entry)
    return chain.state
