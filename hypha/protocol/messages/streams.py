"""Headers and answers of tensor streams, and health."""

from typing import Annotated

from msgspec import Meta, Struct, field

from hypha.protocol.messages.base import Count, Digest, Message, Name, PeerId, Reason, Request, Seconds
from hypha.protocol.messages.rounds import Contribution, RoundMessage
from hypha.protocol.shards import SHARDS_MAX


class PartRef(Struct, frozen=True, kw_only=True):
    """One shard's part of an update: its size in bytes and its digest."""

    bytes: Count
    digest: Digest


class PushUpdate(RoundMessage[Message], frozen=True, kw_only=True):
    """Worker → parameter server stream: header, then the bytes of its shard; answered by one of the three below.

    `parts` are all shards' parts of the contribution; empty where one server has the whole.
    """

    view: Count
    contribution: Contribution
    shard: Count = 0
    parts: Annotated[tuple[PartRef, ...], Meta(max_length=SHARDS_MAX)] = ()

    @property
    def part(self) -> PartRef:
        """What follows the header. Raises IndexError where there is no such shard."""
        whole = PartRef(bytes=self.contribution.bytes, digest=self.contribution.digest)
        return (self.parts or (whole,))[self.shard]


class Accepted(Message, frozen=True, kw_only=True):
    """Held, verified and screened; also the answer to a repetition of what is already held."""

    digest: Digest


class Rebase(Message, frozen=True, kw_only=True):
    """Your base is not the open round's: go to this one, keep your samples, send your update again."""

    round: Count
    base_digest: Digest


class UpdateRefused(Message, frozen=True, kw_only=True):
    """Not taken, and why (shape, dtype, non-finite, digest, stale round or fence)."""

    reason: Reason


class OuterUpdate(Message, frozen=True, kw_only=True):
    """Parameter server → worker stream: header, then `bytes` bytes; the worker answers Accepted or a Failure.

    All digests are those of the server's shard.
    """

    job_id: Name
    job_epoch: Count
    view: Count
    round: Count
    lease_id: Name  # of the worker it is for
    close: Count
    base_digest: Digest
    model_digest: Digest
    digest: Digest
    bytes: Count
    shard: Count = 0


class FetchModel(Message, frozen=True, kw_only=True):
    """Anyone in the job → whoever holds it: a file by digest. Answered by FileHeader, then its bytes from `offset`."""

    job_id: Name
    job_epoch: Count
    part: Name  # "model", "momentum", "record", "update", of shard 0; "model-1" … of the others
    round: Count
    digest: Digest
    offset: Count = 0


class FetchSlice(Message, frozen=True, kw_only=True):
    """Anyone → data node: one slice (or "dataset.toml", digest optional) of a dataset. Answered like FetchModel."""

    dataset: Name
    manifest_digest: Digest | None
    slice: Name
    offset: Count = 0


class FileHeader(Message, frozen=True, kw_only=True):
    """What follows on the stream: the file's bytes from the offset asked for, `bytes` being the size of the whole."""

    bytes: Count
    digest: Digest
    digest_algorithm: Name = "sha256"


class HealthReport(Message, frozen=True, kw_only=True):
    """Alive, in this role, at this version; `detail` is for people."""

    peer_id: PeerId
    role: Name
    version: Name
    uptime_s: Seconds
    detail: dict[str, str] = field(default_factory=dict)


class Health(Request[HealthReport], frozen=True, kw_only=True):
    """Are you there? Answered to anyone with a valid certificate."""
