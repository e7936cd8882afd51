"""Everything that crosses the network, one frozen Struct per message (protocol.md).

    gossip      TaskAdvertisement
    leases      WorkerOffer  RenewLease  ReleaseLease                       scheduler ⇄ worker
    jobs        DispatchJob  CancelJob  JobStatus                           scheduler ⇄ worker
    rounds      RoundView  SliceRequest  Progress  Ready                    scheduler ⇄ worker
    closing     Collected  CloseRound  Committed  Evaluated                 scheduler ⇄ parameter server
    streams     PushUpdate  OuterUpdate  FetchModel  FetchSlice             headers of tensor streams
    anyone      Health

Durations are seconds; no absolute time crosses the wire. Digests are lower-case hexadecimal over the bytes of the file
they name: blake3 where it holds tensors, sha256 of a dataset's manifest, of slices what that manifest says. Rounds
count from 1: round r takes model r-1 to model r; model 0 is the initial one. The *base* of round r is model r-1.
(job_epoch, view, round, lease, fence) say which state of the world a message belongs to.
"""

from typing import Any, Union

from hypha.protocol.messages.base import (
    ASKS_MAX,
    INTERVALS_PER_CONTRIBUTION_MAX,
    MEMBERS_MAX,
    PRICE_MAX,
    PROTOCOL_API,
    PROTOCOL_HEALTH,
    PROTOCOL_PROGRESS,
    PROTOCOL_STREAM,
    TOPIC_WORKER,
    Ack,
    Count,
    Digest,
    Failure,
    Message,
    Name,
    PeerId,
    R,
    Reason,
    Request,
    Seconds,
    SignedAddresses,
)
from hypha.protocol.messages.leases import (
    Ask,
    CancelJob,
    Choice,
    DispatchJob,
    JobStatus,
    LeaseGone,
    LeaseMessage,
    ReleaseLease,
    Renewed,
    RenewLease,
    TaskAdvertisement,
    WorkerOffer,
)
from hypha.protocol.messages.rounds import (
    CloseRound,
    Collected,
    Committed,
    Continue,
    Contribution,
    Done,
    Evaluated,
    Interval,
    Member,
    Merged,
    Merging,
    NoMore,
    Progress,
    Ready,
    RoundMessage,
    RoundView,
    SliceGrant,
    SliceRef,
    SliceRequest,
    SyncAfter,
)
from hypha.protocol.messages.streams import (
    Accepted,
    FetchModel,
    FetchSlice,
    FileHeader,
    Health,
    HealthReport,
    OuterUpdate,
    PartRef,
    PushUpdate,
    Rebase,
    UpdateRefused,
)


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


__all__ = [
    "ANY_MESSAGE",
    "ASKS_MAX",
    "INTERVALS_PER_CONTRIBUTION_MAX",
    "MEMBERS_MAX",
    "MESSAGE_TYPES",
    "PRICE_MAX",
    "PROTOCOL_API",
    "PROTOCOL_HEALTH",
    "PROTOCOL_OF",
    "PROTOCOL_PROGRESS",
    "PROTOCOL_STREAM",
    "TOPIC_WORKER",
    "Accepted",
    "Ack",
    "Ask",
    "CancelJob",
    "Choice",
    "CloseRound",
    "Collected",
    "Committed",
    "Continue",
    "Contribution",
    "Count",
    "Digest",
    "DispatchJob",
    "Done",
    "Evaluated",
    "Failure",
    "FetchModel",
    "FetchSlice",
    "FileHeader",
    "Health",
    "HealthReport",
    "Interval",
    "JobStatus",
    "LeaseGone",
    "LeaseMessage",
    "Member",
    "Merged",
    "Merging",
    "Message",
    "Name",
    "NoMore",
    "OuterUpdate",
    "PartRef",
    "PeerId",
    "Progress",
    "PushUpdate",
    "R",
    "Ready",
    "Reason",
    "Rebase",
    "ReleaseLease",
    "RenewLease",
    "Renewed",
    "Request",
    "RoundMessage",
    "RoundView",
    "Seconds",
    "SignedAddresses",
    "SliceGrant",
    "SliceRef",
    "SliceRequest",
    "SyncAfter",
    "TaskAdvertisement",
    "UpdateRefused",
    "WorkerOffer",
    "protocol_of",
]
