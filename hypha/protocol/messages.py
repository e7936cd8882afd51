"""Everything that crosses the network, one frozen Struct per message (design §3).

    gossip      TaskAdvertisement
    leases      WorkerOffer  RenewLease  ReleaseLease                       scheduler ⇄ worker
    jobs        DispatchJob  CancelJob  JobStatus                           scheduler ⇄ worker
    rounds      RoundView  SliceRequest  Progress  Ready                    scheduler ⇄ worker
    closing     Collected  CloseRound  Committed  Evaluated                 scheduler ⇄ parameter server
    streams     PushUpdate  OuterUpdate  FetchModel  FetchSlice             headers of tensor streams
    anyone      Health

Durations are seconds; no absolute time crosses the wire. Digests are lower-case hexadecimal sha256 over the bytes of
the file they name. Rounds count from 1: round r takes model r-1 to model r; model 0 is the initial one. The *base* of
round r is model r-1. (job_epoch, view, round, lease, fence) say which state of the world a message belongs to.
"""

from typing import Annotated, Any, Generic, TypeVar, Union

from msgspec import Meta, Struct

from hypha.protocol.job import JobSpec
from hypha.protocol.resources import Resources

TOPIC_WORKER = "hypha/worker"
PROTOCOL_API = "/hypha/api/1"
PROTOCOL_HEALTH = "/hypha/health/1"
PROTOCOL_PROGRESS = "/hypha/progress/1"
PROTOCOL_STREAM = "/hypha/stream/1"

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Reason = Annotated[str, Meta(max_length=8192)]
PeerId = Annotated[str, Meta(min_length=1, max_length=128)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
SignedAddresses = Annotated[bytes, Meta(max_length=8192)]
# A contribution is a handful of grants; the bound keeps a Collected of many contributions inside one message.
INTERVALS_PER_CONTRIBUTION_MAX = 1024
MEMBERS_MAX = 4096
# Kinds of workers one job asks for: two today, a shard or a machine type each tomorrow.
ASKS_MAX = 16
# Per lease-hour, in whatever the network counts; finite, so that prices compare and add.
PRICE_MAX = 1e12


class Message(Struct, frozen=True, tag=True, kw_only=True):
    """Base of everything on the wire; `traceparent` is the W3C trace context of whoever sent it."""

    traceparent: Annotated[str, Meta(max_length=64)] | None = None


R = TypeVar("R", bound=Message)


class Request(Message, Generic[R], frozen=True, kw_only=True):
    """A message that is answered by exactly one R (or by a Failure)."""


class Failure(Message, frozen=True, kw_only=True):
    """The answer no: `code` is for programs (refused, retry, forbidden, unknown, busy, internal), `reason` for people."""

    code: Name
    reason: Reason


class Ack(Message, frozen=True, kw_only=True):
    """Understood and acted on."""


# --- auction (§5) ----------------------------------------------------------------------------------------------------


class Ask(Struct, frozen=True, kw_only=True):
    """One kind of worker wanted: `count` of them, each able to run `executor`, each paid `bid` per lease-hour."""

    work: Name  # "train" or "aggregate": the executor's class
    executor: Name
    resources: Resources
    count: Annotated[int, Meta(ge=1, le=MEMBERS_MAX)]
    bid: Annotated[float, Meta(gt=0, le=PRICE_MAX)]


class TaskAdvertisement(Message, frozen=True, kw_only=True):
    """Gossip: a scheduler wants workers and welcomes offers for `welcome_s` from hearing this."""

    advertisement_id: Name
    scheduler: PeerId
    addresses: SignedAddresses
    job_id: Name
    job_epoch: Count
    asks: Annotated[tuple[Ask, ...], Meta(min_length=1, max_length=ASKS_MAX)]
    welcome_s: Seconds
    fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0


class Choice(Struct, frozen=True, kw_only=True):
    """One ask of the advertisement, by its place in `asks`, that the offered lease could serve, and at what price."""

    ask: Annotated[int, Meta(ge=0, lt=ASKS_MAX)]
    price: Annotated[float, Meta(ge=0, le=PRICE_MAX)]


class WorkerOffer(Request[Ack], frozen=True, kw_only=True):
    """A temporary lease, already held for the scheduler; unless renewed it lapses after `ttl_s`.

    It names every ask it could serve and holds enough for any one of them; the scheduler picks which by what it
    dispatches. Prices are per lease-hour.
    """

    advertisement_id: Name
    choices: Annotated[tuple[Choice, ...], Meta(min_length=1, max_length=ASKS_MAX)]
    lease_id: Name
    fence: Count
    resources: Resources
    ttl_s: Seconds
    addresses: SignedAddresses


# --- leases (§4) -----------------------------------------------------------------------------------------------------


class LeaseMessage(Request[R], Generic[R], frozen=True, kw_only=True):
    """What every message under a lease carries; (job_epoch, attempt) orders the holder's own messages."""

    lease_id: Name
    fence: Count
    job_epoch: Count
    attempt: Count


class Renewed(Message, frozen=True, kw_only=True):
    """The lease lives `remaining_s` more, counted by the holder from *sending* the attempt answered here."""

    lease_id: Name
    remaining_s: Seconds


class LeaseGone(Message, frozen=True, kw_only=True):
    """No such lease, or no more: it never comes back."""

    lease_id: Name
    reason: Reason


class RenewLease(LeaseMessage[Renewed | LeaseGone], frozen=True, kw_only=True):
    """The first renewal accepts the offer; later ones keep the lease."""


class ReleaseLease(LeaseMessage[Ack], frozen=True, kw_only=True):
    """Give it back now; answered Ack also when it is already gone."""

    reason: Reason


# --- jobs (§6) -------------------------------------------------------------------------------------------------------


class DispatchJob(LeaseMessage[Ack | LeaseGone], frozen=True, kw_only=True):
    """Run this job under the lease. Idempotent by (lease, job): a second one changes nothing."""

    job: JobSpec


class CancelJob(LeaseMessage[Ack], frozen=True, kw_only=True):
    """Stop the job of this lease; the lease itself stays until released."""

    job_id: Name
    reason: Reason


class JobStatus(Request[Ack], frozen=True, kw_only=True):
    """Worker → scheduler: the job's executor ended, or will not start."""

    job_id: Name
    job_epoch: Count
    lease_id: Name
    fence: Count
    finished: bool
    reason: Reason
    last_lines: Annotated[tuple[Annotated[str, Meta(max_length=2048)], ...], Meta(max_length=64)] = ()


# --- rounds (§8) -----------------------------------------------------------------------------------------------------


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
    """Contribute once `batches` batches of `round` are done (counted from its start)."""

    round: Count
    batches: Count


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


# --- closing (§8) ----------------------------------------------------------------------------------------------------


class Contribution(Struct, frozen=True, kw_only=True):
    """An accepted pseudo-gradient, described; its tensors lie at the parameter server. samples == 0 is allowed."""

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
    """The outcome of one CloseRound: what was applied and what the model became, by digest, with sizes in bytes."""

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
    base_digest: Digest
    contributors: Annotated[tuple[tuple[PeerId, Count, Digest], ...], Meta(max_length=MEMBERS_MAX)]


class Committed(Request[Ack], frozen=True, kw_only=True):
    """Scheduler → servers and workers: round `round`, giving model `digest`, can no longer be lost."""

    job_id: Name
    job_epoch: Count
    round: Count
    digest: Digest


class Evaluated(RoundMessage[Ack], frozen=True, kw_only=True):
    """Parameter server → scheduler: held-out loss (nats per predicted token) of model `round`."""

    digest: Digest
    loss: float
    samples: Count


# --- tensor streams --------------------------------------------------------------------------------------------------


class PushUpdate(RoundMessage[Message], frozen=True, kw_only=True):
    """Worker → parameter server stream: header, then `contribution.bytes` bytes; answered by one of the three below."""

    view: Count
    contribution: Contribution


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
    """Parameter server → worker stream: header, then `bytes` bytes; the worker answers Accepted or a Failure."""

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


class FetchModel(Message, frozen=True, kw_only=True):
    """Anyone in the job → whoever holds it: a file by digest. Answered by FileHeader, then its bytes from `offset`."""

    job_id: Name
    job_epoch: Count
    part: Name  # "model", "momentum", "record", "update"
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


# --- health ----------------------------------------------------------------------------------------------------------


class HealthReport(Message, frozen=True, kw_only=True):
    """Alive, in this role, at this version; `detail` is for people."""

    peer_id: PeerId
    role: Name
    version: Name
    uptime_s: Seconds
    detail: dict[str, str] = {}


class Health(Request[HealthReport], frozen=True, kw_only=True):
    """Are you there? Answered to anyone with a valid certificate."""


def _leaves(kind: type[Message]) -> list[type[Message]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


_ABSTRACT = {"Message", "Request", "LeaseMessage", "RoundMessage"}
MESSAGE_TYPES: tuple[type[Message], ...] = tuple(kind for kind in _leaves(Message) if kind.__name__ not in _ABSTRACT)
ANY_MESSAGE: Any = Union[MESSAGE_TYPES]  # noqa: UP007 - built from a tuple

PROTOCOL_OF: dict[type[Message], str] = {Health: PROTOCOL_HEALTH, Progress: PROTOCOL_PROGRESS}


def protocol_of(kind: type[Message]) -> str:
    """Return the libp2p protocol id that requests of this kind travel under."""
    return PROTOCOL_OF.get(kind, PROTOCOL_API)
