"""The job's durable state: chain and artifacts in its store, the journal beside it. Every call blocks.

{state_dir}/{job}/journal                      what happened since the last commit
{checkpoint_url or state_dir}/{job}/chain/…    the commit points
                              …/record/…       merged pseudo-gradients, one per round
                              …/model, momentum/…   checkpoints
                              …/record-1/… …    the same of the other shards, where several servers share the model

Calls that touch the journal come one at a time (`scribe`), and so do those that touch the chain (`committer`); the two
may overlap, and artifacts may be read beside both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from msgspec import Struct

from hypha.errors import ConfigError, RemoteProtocolError, StoreError
from hypha.protocol import manifest
from hypha.protocol.closing import whole_merged
from hypha.protocol.job import ResumePoint
from hypha.protocol.manifest import AnyEntry, ChainState, Found
from hypha.protocol.messages import Contribution, Member, Merged, SliceRef
from hypha.protocol.shards import kind_of
from hypha.protocol.slices import Grant, SliceTable
from hypha.protocol.tally import Exclude
from hypha.scheduler.config import CheckpointConfig
from hypha.scheduler.records import Excluded, Granted, JobOpened, LeaseEnded, LeaseHeld, Record
from hypha.scheduler.settings import Settings, insist_same, parsed
from hypha.store.blobs import Artifact, Blobs, Retention
from hypha.store.chain import Chain, StoreConflict
from hypha.store.disk import Disk, NotFound
from hypha.store.journal import Foreign, Journal, open_journal
from hypha.store.objects import ObjectStore
from hypha.telemetry import get_logger

log = get_logger("scheduler.store")

# A journal this large is rewritten with what still matters; a grant takes about 200 bytes.
JOURNAL_REWRITE_BYTES = 4 << 20


class Deposed(StoreError):
    """Another scheduler has begun a higher epoch of this job: stop."""


class Remembered(Struct, frozen=True, kw_only=True):
    """What the journal says beyond the chain."""

    grants: tuple[Grant, ...]
    excluded: tuple[Exclude, ...]
    leases: tuple[LeaseHeld, ...]


class JobStore:
    """One job's chain, artifacts and journal; opened by `open_store`, used by one scheduler at a time."""

    def __init__(
        self, opened: JobOpened, journal: Journal[Any], objects: ObjectStore, slices: Sequence[SliceRef]
    ) -> None:
        self.opened = opened
        self.slices = tuple(slices)
        self.shards = opened.settings.parameter_servers
        self.blobs = Blobs(objects)
        self._journal = journal
        self._links = Chain(objects)
        self._chain = manifest.Chain(opened.job_id, slices)
        self._merged: dict[int, tuple[Merged, ...]] = {}  # by round, then by shard
        self._leases: dict[Member, LeaseHeld] = {}
        self._live: list[Record] = []
        self._fences: dict[str, int] = {}
        self.state: ChainState = self._chain.state  # replaced whole, so that any thread may look

    def load(self) -> Remembered:
        """Replay chain and journal; a damaged newest entry is set aside, and said.

        Raises StoreError for a chain that is damaged further back, or another job's.
        """
        mended = self._links.mend()
        self._chain = manifest.Chain(self.opened.job_id, self.slices)
        for link in self._links.links:
            try:
                self._take(link.digest, manifest.from_bytes(link.payload))
            except RemoteProtocolError as error:
                raise StoreError(f"chain: {error}") from error
        remembered = self._remember(self._journal.records)
        if mended is None:
            return remembered
        log.warn(
            "The newest chain entry is damaged, the one before is used",
            damaged=mended.damaged,
            used=mended.used or "none",
            set_aside=mended.set_aside,
            reason=mended.reason,
        )
        # Its workers may know a round that does not count any more: they are leased anew.
        self.note(*(LeaseEnded(member=held.member) for held in remembered.leases))
        return Remembered(grants=remembered.grants, excluded=remembered.excluded, leases=())

    def _take(self, digest: str, entry: AnyEntry) -> None:
        self._chain.append(digest, entry)
        if isinstance(entry, manifest.RoundCommitted):
            self._merged[entry.merged.round] = entry.shards
            for each in entry.contributions:
                self._saw(each.peer_id, each.fence)
        self.state = self._chain.state

    def _remember(self, records: Sequence[Record]) -> Remembered:
        grants: list[Grant] = []
        excluded: list[Exclude] = []
        for record in records:
            match record:
                case Granted(grant=grant):
                    grants.append(grant)
                case Excluded(exclude=exclude):
                    excluded.append(exclude)
                case LeaseHeld(member=member):
                    self._leases[member] = record
                    self._saw(member.peer_id, member.fence)
                case LeaseEnded(member=member):
                    self._leases.pop(member, None)
                case JobOpened():
                    pass  # checked when the store was opened
        self._live = [record for record in records if isinstance(record, Granted | Excluded)]
        return Remembered(grants=tuple(grants), excluded=tuple(excluded), leases=tuple(self._leases.values()))

    def _saw(self, peer_id: str, fence: int) -> None:
        self._fences[peer_id] = max(fence, self._fences.get(peer_id, fence))

    def fences(self) -> dict[str, int]:
        """Return the highest fence of each worker that this job ever leased, as far as chain and journal know."""
        return dict(self._fences)

    def table(self, remembered: Remembered) -> SliceTable:
        """Return the slice table as chain and journal have it."""
        state = self.state
        return SliceTable.restore(
            self.slices, epoch=state.epoch, used=state.used, grants=remembered.grants, committed=state.round
        )

    # --- journal --------------------------------------------------------------------------------------------------

    def note(self, *records: Record) -> None:
        """Return once these are durable. Raises StoreError: then none is acknowledged."""
        self._journal.append(*records)
        for record in records:
            match record:
                case LeaseHeld(member=member):
                    self._leases[member] = record
                    self._saw(member.peer_id, member.fence)
                case LeaseEnded(member=member):
                    self._leases.pop(member, None)
                case _:
                    self._live.append(record)

    def compact(self) -> None:
        """Forget grants and exclusions of committed rounds once the journal has grown. Raises StoreError."""
        if self._journal.size_bytes < JOURNAL_REWRITE_BYTES:
            return
        committed = self.state.round
        self._live = [record for record in self._live if _round_of(record) > committed]
        self._journal.rewrite([self.opened, *self._leases.values(), *self._live])

    # --- chain ----------------------------------------------------------------------------------------------------

    def begin_epoch(self, *, scheduler: str, nonce: str) -> int:
        """Take the job over and return the new job epoch. Raises Deposed when somebody else was faster."""
        settings = self.opened.settings.canonical()
        skipped = self._links.set_aside()
        entry = self._chain.epoch_entry(scheduler=scheduler, nonce=nonce, settings=settings, skipped=skipped)
        self._append(entry)
        return entry.job_epoch

    def taken_over(self, job_epoch: int) -> str | None:
        """Return who has begun a higher epoch, None where nobody has. May overlap with everything else."""
        link = self._links.peek()
        found = None if link is None else manifest.from_bytes(link.payload)
        if not isinstance(found, manifest.JobEpochStarted) or found.job_epoch <= job_epoch:
            return None
        return f"{found.scheduler} leads the job under epoch {found.job_epoch}; this one was {job_epoch}"

    def commit(self, entry: manifest.RoundCommitted) -> None:
        """Make a round durable; calling again with the same entry after a StoreError finds out what became of it."""
        self._append(entry)

    def round_entry(
        self, merged: Sequence[Merged], contributions: Sequence[Contribution], *, job_epoch: int, nonce: str
    ) -> manifest.RoundCommitted:
        """Return the entry that would commit this outcome, `merged` by shard, now."""
        whole, parts = whole_merged(merged, sha256), merged if len(merged) > 1 else ()
        return self._chain.round_entry(whole, contributions, job_epoch=job_epoch, nonce=nonce, parts=parts)

    def _append(self, entry: AnyEntry) -> None:
        payload = manifest.to_bytes(entry)
        try:
            link = self._links.append(payload)
        except StoreConflict as conflict:
            found = manifest.from_bytes(conflict.link.payload)
            if manifest.judge_existing(entry, found) is not Found.OURS:
                raise Deposed(
                    f"{conflict}: job epoch {found.job_epoch} is at work; this one is {entry.job_epoch}"
                ) from conflict
            link = conflict.link
        self._take(link.digest, entry)

    # --- artifacts ------------------------------------------------------------------------------------------------

    def resume_point(self, shard: int = 0) -> ResumePoint | None:
        """Return a shard's newest sound checkpoint and its records from there to the last commit; None before one.

        Each file is read whole and checked: a damaged checkpoint is said, and the one before it used. Raises StoreError
        where none leads to the last committed round.
        """
        state, faults = self.state, []
        for model, momentum in self._checkpoints(state.round, shard):
            later = range(model.round + 1, state.round + 1)
            records = tuple(self._merged[made_in][shard].record_digest for made_in in later)
            try:
                self._verify(model, momentum, records, shard)
            except StoreError as error:
                faults.append(f"round {model.round}: {error}")
                continue
            if faults:
                log.warn("Checkpoint unusable, an older one is used", damaged="; ".join(faults), used=model.name)
            return ResumePoint(
                round=model.round, model_digest=model.digest, momentum_digest=momentum.digest, records=records
            )
        if state.round:
            why = "; ".join(faults) or "there is none"
            raise StoreError(f"no checkpoint leads to the committed round {state.round}: {why}")
        return None

    def _checkpoints(self, committed: int, shard: int) -> list[tuple[Artifact, Artifact]]:
        """Model and momentum of committed rounds, newest first. Rounds that were lost may have left others."""
        momenta = {(a.round, a.digest): a for a in self.blobs.artifacts(kind_of("momentum", shard))}
        found = []
        for model in self.blobs.artifacts(kind_of("model", shard)):
            made = self._merged.get(model.round)
            merged = made[shard] if made is not None else None
            if model.round == 0:
                momentum = next((a for (round_made, _), a in sorted(momenta.items()) if round_made == 0), None)
            elif merged is None or merged.model_digest != model.digest or model.round > committed:
                continue
            else:
                momentum = momenta.get((model.round, merged.momentum_digest))
            if momentum is not None:
                found.append((model, momentum))
        return sorted(found, reverse=True)

    def _verify(self, model: Artifact, momentum: Artifact, records: Sequence[str], shard: int) -> None:
        self.blobs.verify(model)
        self.blobs.verify(momentum)
        for number, digest in enumerate(records, start=model.round + 1):
            self.blobs.verify(Artifact(kind=kind_of("record", shard), round=number, digest=digest))

    def put(self, kind: str, round_made: int, digest: str, source: Path) -> None:
        """Store a copy of a file under its digest."""
        self.blobs.put_file(Artifact(kind=kind, round=round_made, digest=digest), source)

    def find(self, kind: str, round_made: int, digest: str, scratch: Path) -> Path | None:
        """Return a local file of an artifact, a copy in `scratch` where the store is elsewhere; None: not stored."""
        artifact = Artifact(kind=kind, round=round_made, digest=digest)
        path = self.blobs.local_path(artifact)
        if path is not None:
            return path if path.is_file() else None
        copy = scratch / f"{kind}-{digest}.stored"
        if not copy.is_file():
            try:
                self.blobs.copy_to(artifact, copy)
            except NotFound:
                return None
        return copy

    def prune(self, checkpoint: CheckpointConfig) -> int:
        """Remove what no resume needs; returns how many artifacts went."""
        retention = Retention(keep_last=checkpoint.keep, keep_every=checkpoint.keep_every)
        return sum(len(self.blobs.prune(retention, shard)) for shard in range(self.shards))


def _round_of(record: Record) -> int:
    match record:
        case Granted(grant=grant):
            return grant.round
        case Excluded(exclude=exclude):
            return exclude.round
        case _:
            return 0


@contextmanager
def open_store(
    disk: Disk, objects: ObjectStore, *, job_id: str, settings: Settings, slices: Sequence[SliceRef]
) -> Iterator[JobStore]:
    """Open or begin a job's store, alone. `job_id` is used when there is none yet.

    A damaged journal is set aside, and said: the chain alone says where the job is. Raises StoreError (damaged) or
    ConfigError (in use, or it belongs to another job, or to one of other settings).
    """
    name = settings.name
    try:
        with open_journal(disk, "journal", label=name, record_type=Record, mend=True) as journal:
            _say_mended(journal)
            opened = next((record for record in journal.records if isinstance(record, JobOpened)), None)
            begun = chain_says(objects)
            if opened is None:
                opened = JobOpened(job_id=begun[0] if begun else job_id, settings=settings)
                journal.append(opened)
            insist_same(opened.settings, settings, where=f"state_dir (job {opened.job_id})")
            if begun is not None:
                insist_same(begun[1], settings, where=f"the checkpoint store (job {begun[0]})")
                _insist_together(opened.job_id, begun[0])
            yield JobStore(opened, journal, objects, slices)
    except Foreign as error:
        raise ConfigError(f"state_dir: {error}; name the job as it was, or use another directory") from error


def _insist_together(journaled: str, chained: str) -> None:
    if journaled != chained:
        raise ConfigError(
            f"the journal in state_dir is of job {journaled}, the chain in the checkpoint store of job {chained}: "
            f"bring those together that belong together, or use an empty state_dir to go on with job {chained}"
        )


def chain_says(objects: ObjectStore) -> tuple[str, Settings] | None:
    """Return id and settings of the job whose chain lies in a store; None where there is no entry to tell.

    Raises StoreError.
    """
    first = Chain(objects).first()
    if first is None:
        return None
    try:
        entry = manifest.from_bytes(first.payload)
    except RemoteProtocolError as error:
        raise StoreError(f"chain: {error}") from error
    if not isinstance(entry, manifest.JobEpochStarted):
        raise StoreError("chain: its first entry starts no job epoch")
    return entry.job_id, parsed(entry.settings, "chain entry 0")


def _say_mended(journal: Journal[Any]) -> None:
    if journal.mended is not None:
        reason, aside = journal.mended
        log.warn(
            "The journal is damaged: the chain is used alone, workers are leased anew", set_aside=aside, reason=reason
        )
    if journal.cut_bytes:
        log.warn("The journal's end was torn: what had not been acknowledged is dropped", bytes=journal.cut_bytes)
