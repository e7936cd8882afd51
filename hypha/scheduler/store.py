"""The job's durable state: chain and artifacts in its store, the journal beside it. Every call blocks.

{state_dir}/{job}/journal                      what happened since the last commit
{checkpoint_url or state_dir}/{job}/chain/…    the commit points
                              …/record/…       merged pseudo-gradients, one per round
                              …/model, momentum/…   checkpoints
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from hypha.errors import ConfigError, RemoteProtocolError, StoreError
from hypha.protocol import manifest
from hypha.protocol.job import ResumePoint
from hypha.protocol.manifest import AnyEntry, ChainState, Found
from hypha.protocol.messages import Contribution, Member, Merged, SliceRef
from hypha.protocol.slices import Grant, SliceTable
from hypha.protocol.tally import Exclude
from hypha.scheduler.config import CheckpointConfig
from hypha.scheduler.records import Excluded, Granted, JobOpened, LeaseEnded, LeaseHeld, Record
from hypha.store.blobs import Artifact, Blobs, Retention
from hypha.store.chain import Chain, StoreConflict
from hypha.store.disk import Disk
from hypha.store.journal import Journal, open_journal
from hypha.store.objects import ObjectStore

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
        self.blobs = Blobs(objects)
        self._journal = journal
        self._links = Chain(objects)
        self._chain = manifest.Chain(opened.job_id, slices)
        self._leases: dict[Member, LeaseHeld] = {}
        self._live: list[Record] = []

    @property
    def state(self) -> ChainState:
        """Where the job is by its chain."""
        return self._chain.state

    def load(self) -> Remembered:
        """Replay chain and journal. Raises StoreError for a chain that is damaged or another job's."""
        self._chain = manifest.Chain(self.opened.job_id, self.slices)
        for link in self._links.load():
            try:
                self._chain.append(link.digest, manifest.from_bytes(link.payload))
            except RemoteProtocolError as error:
                raise StoreError(f"chain: {error}") from error
        return self._remember(self._journal.records)

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
                case LeaseEnded(member=member):
                    self._leases.pop(member, None)
                case JobOpened():
                    pass  # checked when the store was opened
        self._live = [record for record in records if isinstance(record, Granted | Excluded)]
        return Remembered(grants=tuple(grants), excluded=tuple(excluded), leases=tuple(self._leases.values()))

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
                case LeaseEnded(member=member):
                    self._leases.pop(member, None)
                case _:
                    self._live.append(record)

    def _compact(self) -> None:
        """Forget grants and exclusions of committed rounds once the journal has grown."""
        if self._journal.size_bytes < JOURNAL_REWRITE_BYTES:
            return
        committed = self.state.round
        self._live = [record for record in self._live if _round_of(record) > committed]
        self._journal.rewrite([self.opened, *self._leases.values(), *self._live])

    # --- chain ----------------------------------------------------------------------------------------------------

    def begin_epoch(self, *, scheduler: str, nonce: str) -> int:
        """Take the job over and return the new job epoch. Raises Deposed when somebody else was faster."""
        entry = self._chain.epoch_entry(scheduler=scheduler, nonce=nonce)
        self._append(entry)
        return entry.job_epoch

    def commit(self, entry: manifest.RoundCommitted) -> None:
        """Make a round durable; calling again with the same entry after a StoreError finds out what became of it."""
        self._append(entry)
        self._compact()

    def round_entry(
        self, merged: Merged, contributions: Sequence[Contribution], *, job_epoch: int, nonce: str
    ) -> manifest.RoundCommitted:
        """Return the entry that would commit this outcome now."""
        return self._chain.round_entry(merged, contributions, job_epoch=job_epoch, nonce=nonce)

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
        self._chain.append(link.digest, entry)

    # --- artifacts ------------------------------------------------------------------------------------------------

    def resume_point(self) -> ResumePoint | None:
        """Return the newest stored state and the records from there to the last commit; None before any was stored."""
        models = {a.round: a for a in self.blobs.artifacts("model")}
        momenta = {a.round: a for a in self.blobs.artifacts("momentum")}
        state = self.state
        usable = [r for r in models if r in momenta and r <= state.round]
        if not usable:
            if state.round:
                raise StoreError(f"no checkpoint lies at or before the committed round {state.round}")
            return None
        newest = max(usable)
        return ResumePoint(
            round=newest,
            model_digest=models[newest].digest,
            momentum_digest=momenta[newest].digest,
            records=state.records[newest:],
        )

    def put(self, kind: str, round_made: int, digest: str, source: Path) -> None:
        """Store a copy of a file under its digest."""
        self.blobs.put_file(Artifact(kind=kind, round=round_made, digest=digest), source)

    def find(self, kind: str, round_made: int, digest: str) -> Path | None:
        """Return the local file of an artifact; None where it is not stored, or not on this machine's disk."""
        path = self.blobs.local_path(Artifact(kind=kind, round=round_made, digest=digest))
        return path if path is not None and path.is_file() else None

    def prune(self, checkpoint: CheckpointConfig) -> int:
        """Remove what no resume needs; returns how many artifacts went."""
        return len(self.blobs.prune(Retention(keep_last=checkpoint.keep, keep_every=checkpoint.keep_every)))


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
    disk: Disk, objects: ObjectStore, *, name: str, job_id: str, manifest_digest: str, slices: Sequence[SliceRef]
) -> Iterator[JobStore]:
    """Open or begin the store of the job called `name`, alone. `job_id` is used when there is none yet.

    Raises StoreError (locked, damaged) or ConfigError (it belongs to a job on another dataset).
    """
    with open_journal(disk, "journal", label=name, record_type=Record) as journal:
        opened = next((record for record in journal.records if isinstance(record, JobOpened)), None)
        if opened is None:
            opened = JobOpened(job_id=job_id, manifest_digest=manifest_digest)
            journal.append(opened)
        elif opened.manifest_digest != manifest_digest:
            raise ConfigError(
                f"scheduler.job.dataset: the job {name!r} in state_dir was begun on manifest "
                f"{opened.manifest_digest[:12]}, not {manifest_digest[:12]}; name the job differently to start another"
            )
        yield JobStore(opened, journal, objects, slices)
