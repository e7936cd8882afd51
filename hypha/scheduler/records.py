"""What the scheduler's journal holds between two commits; everything older is in the chain (rounds.md).

JobOpened    whose journal this is, first
Grant        samples assigned, before they are sent            (protocol.slices)
Exclude      a contribution that is never named in a Close     (protocol.tally)
LeaseHeld    a worker under contract, before its job is dispatched
LeaseEnded   no longer
"""

from typing import Literal

from msgspec import Struct

from hypha.protocol.messages import Member
from hypha.protocol.resources import Resources
from hypha.protocol.slices import Grant
from hypha.protocol.tally import Exclude
from hypha.scheduler.settings import Settings


class JobOpened(Struct, frozen=True, kw_only=True, tag=True):
    """The job that this journal and the chain beside it belong to."""

    job_id: str
    settings: Settings


class Granted(Struct, frozen=True, kw_only=True, tag=True):
    """One grant of samples."""

    grant: Grant


class Excluded(Struct, frozen=True, kw_only=True, tag=True):
    """One exclusion."""

    exclude: Exclude


class LeaseHeld(Struct, frozen=True, kw_only=True, tag=True):
    """A lease that was accepted; a restarted scheduler may try it once under its new epoch."""

    member: Member
    work: Literal["train", "aggregate"]
    executor: str
    price: float
    addresses: bytes
    resources: Resources
    ttl_s: float  # as last granted
    shard: int = 0  # of a parameter server


class LeaseEnded(Struct, frozen=True, kw_only=True, tag=True):
    """A lease that is over."""

    member: Member


Record = JobOpened | Granted | Excluded | LeaseHeld | LeaseEnded
