"""Auctions, leases and the jobs under them (leases.md)."""

from typing import Annotated, Generic

from msgspec import Meta, Struct

from hypha.protocol.job import JobSpec
from hypha.protocol.messages.base import (
    ASKS_MAX,
    MEMBERS_MAX,
    PRICE_MAX,
    Ack,
    Count,
    Message,
    Name,
    PeerId,
    R,
    Reason,
    Request,
    Seconds,
    SignedAddresses,
)
from hypha.protocol.resources import Resources


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


class DispatchJob(LeaseMessage[Ack | LeaseGone], frozen=True, kw_only=True):
    """Run this job under the lease. Idempotent by (lease, job): a second one changes nothing."""

    job: JobSpec


class CancelJob(LeaseMessage[Ack], frozen=True, kw_only=True):
    """Stop the job of this lease; the lease itself stays until released."""

    job_id: Name
    reason: Reason


class JobStatus(Request[Ack], frozen=True, kw_only=True):
    """Worker → scheduler: the job's executor ended, or will not start; `leaving`: the worker itself goes."""

    job_id: Name
    job_epoch: Count
    lease_id: Name
    fence: Count
    finished: bool
    reason: Reason
    leaving: bool = False
    last_lines: Annotated[tuple[Annotated[str, Meta(max_length=2048)], ...], Meta(max_length=64)] = ()
