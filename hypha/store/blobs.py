"""Large artifacts of a job under their own digest: records, models, momentum.

    <kind>/<round>-<blake3>      made whole, never overwritten, verified when read
    <kind>-1/… <kind>-2/…        the other shards', where several parameter servers share the model

Retention keeps what a resume can need: every M-th and the last K checkpoints, and each record after the oldest of the
last K (replaying records forward from a model gives the newer ones, rounds.md).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from blake3 import blake3
from msgspec import Meta, Struct

from hypha.errors import StoreError
from hypha.protocol.shards import kind_of
from hypha.store.disk import AlreadyExists
from hypha.store.objects import CHUNK_BYTES, ObjectStore, digest_of

CHECKPOINT_KINDS = ("model", "momentum")
RECORD_KIND = "record"
_PARTIAL_SUFFIX = ".part"


class Artifact(Struct, frozen=True, order=True, kw_only=True):
    """One stored artifact; `digest` is the hexadecimal blake3 of its bytes."""

    kind: str
    round: Annotated[int, Meta(ge=0)]
    digest: str

    @property
    def name(self) -> str:
        """The object's name."""
        return f"{self.kind}/{self.round:08d}-{self.digest}"


class Retention(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keep the newest `keep_last` checkpoints and those of every `keep_every`-th round (0: only the newest)."""

    keep_last: Annotated[int, Meta(ge=1)] = 3
    keep_every: Annotated[int, Meta(ge=0)] = 0

    def kept(self, rounds: Iterable[int]) -> frozenset[int]:
        """Return which of these checkpointed rounds stay."""
        ordered = sorted(set(rounds))
        every = [r for r in ordered if self.keep_every and r % self.keep_every == 0]
        return frozenset(ordered[-self.keep_last :] + every)


class Blobs:
    """Artifacts in an object store."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def put(self, artifact: Artifact, chunks: Iterable[bytes]) -> None:
        """Store durably under its digest; storing it again is fine.

        Raises StoreError when the bytes do not have the digest, or when what is there already has decayed.
        """
        try:
            self._objects.create(artifact.name, _checked(artifact, chunks))
        except AlreadyExists:
            self.verify(artifact)

    def put_file(self, artifact: Artifact, source: Path) -> None:
        """Store a copy of a local file; see `put`."""
        self.put(artifact, _file_chunks(source))

    def chunks(self, artifact: Artifact) -> Iterator[bytes]:
        """Yield its bytes; raises StoreError after the last piece if they do not match the digest."""
        return _checked(artifact, self._objects.chunks(artifact.name))

    def copy_to(self, artifact: Artifact, target: Path) -> None:
        """Write a verified copy to a local file; it appears under its name only when it is whole."""
        partial = target.with_name(target.name + _PARTIAL_SUFFIX)
        try:
            with partial.open("wb") as file:
                for chunk in self.chunks(artifact):
                    file.write(chunk)
            partial.replace(target)
        except OSError as error:
            raise StoreError(f"{target}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def verify(self, artifact: Artifact) -> None:
        """Read it whole. Raises StoreError when it is missing or does not match its digest."""
        found = digest_of(self._objects.chunks(artifact.name))
        if found != artifact.digest:
            raise StoreError(f"{artifact.name}: damaged: its bytes have blake3 {found}")

    def local_path(self, artifact: Artifact) -> Path | None:
        """Return the file to serve it from, where the store is a directory here; not verified."""
        return self._objects.local_path(artifact.name)

    def artifacts(self, kind: str) -> list[Artifact]:
        """Return all of one kind, by round. Raises StoreError on a name that is none."""
        return [_parse(kind, name) for name in self._objects.names(kind)]

    def prune(self, retention: Retention, shard: int = 0) -> list[Artifact]:
        """Remove what no resume of this shard needs any more, and return that."""
        needed = {kind_of(kind, shard) for kind in CHECKPOINT_KINDS}
        checkpoints = [artifact for kind in sorted(needed) for artifact in self.artifacts(kind)]
        kinds_of: dict[int, set[str]] = {}
        for artifact in checkpoints:
            kinds_of.setdefault(artifact.round, set()).add(artifact.kind)
        # A crash may have left a model without its momentum: nothing can start from that alone.
        whole = sorted(round_ for round_, kinds in kinds_of.items() if kinds.issuperset(needed))
        if not whole:
            return []
        kept = retention.kept(whole)
        oldest = whole[-retention.keep_last :][0]
        doomed = [a for a in checkpoints if a.round not in kept and a.round < whole[-1]]
        doomed += [a for a in self.artifacts(kind_of(RECORD_KIND, shard)) if a.round <= oldest]
        for artifact in doomed:
            self._objects.remove(artifact.name)
        return doomed


def _parse(kind: str, name: str) -> Artifact:
    number, dash, digest = name.rpartition("/")[2].partition("-")
    if not (number.isascii() and number.isdigit() and dash):
        raise StoreError(f"{name}: does not belong among artifacts")
    return Artifact(kind=kind, round=int(number), digest=digest)


def _checked(artifact: Artifact, chunks: Iterable[bytes]) -> Iterator[bytes]:
    hasher = blake3()
    for chunk in chunks:
        hasher.update(chunk)
        yield chunk
    if hasher.hexdigest() != artifact.digest:
        raise StoreError(f"{artifact.name}: its bytes have blake3 {hasher.hexdigest()}")


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
