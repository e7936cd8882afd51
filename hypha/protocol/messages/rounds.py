"""Rounds: views, samples, progress, collecting and closing (rounds.md)."""

from typing import Annotated, Generic

from msgspec import Meta, Struct

from hypha.protocol.messages.base import (
    INTERVALS_PER_CONTRIBUTION_MAX,
    MEMBERS_MAX,
    Ack,
    Count,
    Digest,
    Message,
    Name,
    PeerId,
    R,
    Request,
    Seconds,
    SignedAddresses,
)
from hypha.protocol.shards import SHARDS_MAX


class Member(Struct, frozen=True, order=True, kw_only=True):
    """A lease in a view. Contributions are keyed and merged by (peer_id, fence)."""

    peer_id: PeerId
    fence: Count
    lease_id: Name


class Interval(Struct, frozen=True, order=True, kw_only=True):
    """Samples [start, stop) of slice number `slice` in pass number `epoch` over the dataset."""

    epoch: Count
    slice: Count
    start: Count
    stop: Count

    @property
    def samples(self) -> int:
        """How many samples it spans."""
        return self.stop - self.start


class RoundView(Request[Ack], frozen=True, kw_only=True):
    """Scheduler → everyone leased for the job: the newest state of the world. Sent again until acknowledged.

    Members are those whose contribution the open round waits for; followers are leased too, get every outer update,
    and are counted from a later view once they report Ready; servers are the parameter servers.
    """

    job_id: Name
    job_epoch: Count
    view: Count
    round: Count
    base_digest: Digest
    members: Annotated[tuple[Member, ...], Meta(max_length=MEMBERS_MAX)]
    followers: Annotated[tuple[Member, ...], Meta(max_length=MEMBERS_MAX)] = ()
    servers: Annotated[tuple[Member, ...], Meta(max_length=64)]
    server_addresses: Annotated[tuple[SignedAddresses, ...], Meta(max_length=64)]
    deadline_s: Seconds
    committed_round: Count  # the newest durable round: older state may be forgotten
    committed_digest: Digest
    final: bool = False  # no round follows: finish and exit
    # With several parameter servers: the shard that each of `servers` has, and the base's digests by shard.
    shards: Annotated[tuple[Count, ...], Meta(max_length=SHARDS_MAX)] = ()
    parts: Annotated[tuple[Digest, ...], Meta(max_length=SHARDS_MAX)] = ()


class RoundMessage(Request[R], Generic[R], frozen=True, kw_only=True):
    """What every effect on a round carries; accepted only where it matches the newest view seen."""

    job_id: Name
    job_epoch: Count
    round: Count
    lease_id: Name
    fence: Count


class SliceRef(Struct, frozen=True, kw_only=True):
    """One slice file of a dataset, as its manifest has it."""

    name: Name
    samples: Count
    bytes: Count
    digest: Digest
    digest_algorithm: Name = "sha256"


class SliceGrant(Message, frozen=True, kw_only=True):
    """These samples are yours for this round; journaled before it is sent."""

    round: Count
    interval: Interval
    slice: SliceRef


class NoMore(Message, frozen=True, kw_only=True):
    """No samples are left in this round: contribute what you have."""

    round: Count


class SliceRequest(RoundMessage[SliceGrant | NoMore], frozen=True, kw_only=True):
    """Worker → scheduler: the next samples. `request` makes a retry get the same grant again."""

    request: Count
    wanted: Annotated[int, Meta(ge=1, le=2**31)]


class Continue(Message, frozen=True, kw_only=True):
    """Go on with inner steps."""


class SyncAfter(Message, frozen=True, kw_only=True):
    """Contribute once `batches` batches of `round` are done (counted from its start).

    `batch_size`: samples in each batch from now on; None: as many as before.
    """

    round: Count
    batches: Count
    batch_size: Annotated[int, Meta(ge=1, le=2**31)] | None = None


class Done(Message, frozen=True, kw_only=True):
    """The job is over: exit."""


class Progress(RoundMessage[Continue | SyncAfter | Done], frozen=True, kw_only=True):
    """Worker → scheduler: totals since the start of the round; `batch_s` is the mean time of recent batches."""

    batches: Count
    samples: Count
    batch_size: Count
    batch_s: Seconds
    loss: float


class Ready(RoundMessage[Ack], frozen=True, kw_only=True):
    """The sender holds model `round` with this digest. From a server: and momentum, so rounds may open on it."""

    digest: Digest
    momentum_digest: Digest | None = None  # from parameter servers only


class Contribution(Struct, frozen=True, kw_only=True):
    """An accepted pseudo-gradient, described; its tensors lie at the parameter servers. samples == 0 is allowed.

    `digest` and `bytes` are the whole's, however many servers share it.
    """

    peer_id: PeerId
    fence: Count
    lease_id: Name
    round: Count
    base_digest: Digest
    digest: Digest
    bytes: Count
    samples: Count
    intervals: Annotated[tuple[Interval, ...], Meta(max_length=INTERVALS_PER_CONTRIBUTION_MAX)]
    loss: float = 0.0  # sample-weighted mean training loss over the round


class Merged(Message, frozen=True, kw_only=True):
    """The outcome of one CloseRound: what was applied and what the model became, by digest, with sizes in bytes.

    From a server it is about that server's shard; in the chain, about the whole.
    """

    round: Count
    close: Count
    base_digest: Digest
    model_digest: Digest
    momentum_digest: Digest
    record_digest: Digest  # the merged pseudo-gradient, SafeTensors fp32
    update_digest: Digest  # what is subtracted from the base, as broadcast
    model_bytes: Count
    momentum_bytes: Count
    record_bytes: Count
    update_bytes: Count
    update_norm: float = 0.0


class Merging(Message, frozen=True, kw_only=True):
    """The merge is under way: ask again with the same CloseRound."""

    round: Count
    close: Count


class Collected(RoundMessage[Ack], frozen=True, kw_only=True):
    """Parameter server → scheduler: everything it holds of the open round; sent on every change and new view."""

    view: Count
    contributions: Annotated[tuple[Contribution, ...], Meta(max_length=MEMBERS_MAX)]
    merged: Merged | None = None


class CloseRound(RoundMessage[Merged | Merging], frozen=True, kw_only=True):
    """Scheduler → parameter server: merge exactly these. The same `close`, the same Merged; a higher starts anew."""

    view: Count
    close: Count
    base_digest: Digest  # of the server's shard
    contributors: Annotated[tuple[tuple[PeerId, Count, Digest], ...], Meta(max_length=MEMBERS_MAX)]


class Committed(Request[Ack], frozen=True, kw_only=True):
    """Scheduler → servers and workers: round `round`, giving model `digest`, can no longer be lost."""

    job_id: Name
    job_epoch: Count
    round: Count
    digest: Digest
    parts: Annotated[tuple[Digest, ...], Meta(max_length=SHARDS_MAX)] = ()  # with several shards: the model's


class Evaluated(RoundMessage[Ack], frozen=True, kw_only=True):
    """Parameter server → scheduler: held-out loss (nats per predicted token) of model `round`."""

    digest: Digest
    loss: float
    samples: Count
