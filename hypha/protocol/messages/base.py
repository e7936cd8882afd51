"""What every message is built from: bounded field types, requests and their answers, the answer no."""

from typing import Annotated, Generic, TypeVar

from msgspec import Meta, Struct

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
    """The answer no: `code` for programs (refused, retry, forbidden, unknown, busy, internal), `reason` for people."""

    code: Name
    reason: Reason


class Ack(Message, frozen=True, kw_only=True):
    """Understood and acted on."""
