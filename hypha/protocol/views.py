"""The newest view decides what is accepted (leases.md, invariant L2).

    epoch  older: refused       newer: retry (that scheduler's view has not come here yet)
    view   only orders views; a message that names a newer one than ours: retry
    lease  (peer, fence, lease id) must stand in the view, in the part the sender claims
    round  older: refused       newer: retry

A job epoch belongs to the one scheduler that was first heard under it. Base digests are compared by whoever holds the
bytes (see collect.py); everything else that makes a message stale is judged here.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from hypha.errors import Refused
from hypha.protocol.messages import CloseRound, Collected, Member, PushUpdate, RoundMessage, RoundView

NAMES_SHOWN_MAX = 4
Ordered = tuple[int, int]  # (job epoch, view number)


class Part(Enum):
    """What a lease is in a view."""

    MEMBER = "member"
    FOLLOWER = "follower"
    SERVER = "server"


class Verdict(Struct, frozen=True, kw_only=True):
    """The answer no. `retry`: we are behind the sender, the same message may be right in a moment.

    `over`: it was right a moment ago, and nobody has to be told.
    """

    reason: str
    retry: bool = False
    over: bool = False


def refusal(verdict: Verdict) -> Refused:
    """Return a rule's no as what travels back to the sender."""
    return Refused(verdict.reason, "retry" if verdict.retry else "stale" if verdict.over else "refused")


class Observed(Struct, frozen=True, kw_only=True):
    """What a view that arrived was: new to us, known already, or stale with the reason."""

    changed: bool = False
    stale: str | None = None


def leases_of(view: RoundView, part: Part) -> tuple[Member, ...]:
    """Return the leases that are this part of the view."""
    match part:
        case Part.MEMBER:
            return view.members
        case Part.FOLLOWER:
            return view.followers
        case Part.SERVER:
            return view.servers


def server_of(view: RoundView, shard: int) -> Member | None:
    """Return the parameter server that has a shard; None while it has none."""
    return next((server for server, its in zip(view.servers, view.shards or (0,), strict=False) if its == shard), None)


def judge_epoch(view: RoundView, job_id: str, job_epoch: int) -> Verdict | None:
    """Return why a message of that job and epoch is not accepted under `view`, or None."""
    if job_id != view.job_id:
        return Verdict(reason=f"this is job {view.job_id}, not {job_id}")
    if job_epoch > view.job_epoch:
        return Verdict(reason=f"job epoch {job_epoch} is newer than {view.job_epoch} here", retry=True)
    if job_epoch < view.job_epoch:
        return Verdict(reason=f"job epoch {job_epoch} is over; {view.job_epoch} has begun")
    return None


def judge_lease(view: RoundView, message: RoundMessage[Any], peer_id: str, parts: tuple[Part, ...]) -> Verdict | None:
    """Return why `peer_id` may not send this as one of `parts`, or None. The round is not looked at."""
    verdict = judge_epoch(view, message.job_id, message.job_epoch)
    if verdict is not None:
        return verdict
    if isinstance(message, PushUpdate | Collected | CloseRound) and message.view > view.view:
        return Verdict(reason=f"view {message.view} is newer than {view.view} here", retry=True)
    sender = Member(peer_id=peer_id, fence=message.fence, lease_id=message.lease_id)
    if any(sender in leases_of(view, part) for part in parts):
        return None
    claimed = " or ".join(part.value for part in parts)
    lease = f"lease {message.lease_id} (fence {message.fence})"
    return Verdict(reason=f"{lease} of {peer_id} is no {claimed} of view {view.view}")


def judge(view: RoundView, message: RoundMessage[Any], peer_id: str, parts: tuple[Part, ...]) -> Verdict | None:
    """Return why `message`, sent by `peer_id` as one of `parts`, does not match `view`; None when it does."""
    verdict = judge_lease(view, message, peer_id, parts)
    if verdict is not None:
        return verdict
    if message.round < view.round:
        return Verdict(reason=f"round {message.round} is over; view {view.view} has round {view.round} open", over=True)
    if message.round > view.round:
        return Verdict(reason=f"round {message.round} is newer than {view.round} here", retry=True)
    return None


def same_world(left: RoundView, right: RoundView) -> bool:
    """Whether two views say the same: deadlines run and commits happen within one view, all else makes a new one."""
    return _timeless(left) == _timeless(right)


def _timeless(view: RoundView) -> RoundView:
    return replace(view, deadline_s=0.0, committed_round=0, committed_digest="0" * 64, traceparent=None)


class ViewGuard:
    """The newest view that a worker or a parameter server has seen of one job."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.view: RoundView | None = None
        self.scheduler: str | None = None  # whose the newest epoch is

    def observe(self, view: RoundView, peer_id: str) -> Observed:
        """Take a view that `peer_id` sent. A known one is to be acknowledged again; its deadline counts anew."""
        if view.job_id != self.job_id:
            return Observed(stale=f"this is job {self.job_id}, not {view.job_id}")
        newest = self.view
        if newest is None:
            return self._take(view, peer_id)
        if view.job_epoch == newest.job_epoch and peer_id != self.scheduler:
            return Observed(stale=f"job epoch {view.job_epoch} belongs to {self.scheduler}")
        if order_of(view) < order_of(newest):
            return Observed(stale=f"view {_say(view)} is older than {_say(newest)}")
        if order_of(view) > order_of(newest):
            return self._take(view, peer_id)
        if not same_world(view, newest):
            return Observed(stale=f"view {_say(view)} was something else before")
        self.view = view
        return Observed()

    def _take(self, view: RoundView, peer_id: str) -> Observed:
        self.view, self.scheduler = view, peer_id
        return Observed(changed=True)

    def check(self, message: RoundMessage[Any], peer_id: str, part: Part) -> Verdict | None:
        """Return why `message` from `peer_id` does not match the newest view, or None when it may take effect."""
        if self.view is None:
            return Verdict(reason="no view has come here yet", retry=True)
        return judge(self.view, message, peer_id, (part,))

    def check_scheduler(self, job_epoch: int, peer_id: str) -> Verdict | None:
        """Return why `peer_id` may not speak as the scheduler of that epoch, or None."""
        if self.view is None:
            return Verdict(reason="no view has come here yet", retry=True)
        verdict = judge_epoch(self.view, self.job_id, job_epoch)
        if verdict is None and peer_id != self.scheduler:
            verdict = Verdict(reason=f"job epoch {job_epoch} belongs to {self.scheduler}, not to {peer_id}")
        return verdict

    def check_server(self, *, job_epoch: int, view: int, peer_id: str, shard: int = 0) -> Verdict | None:
        """Return why an outer update of a shard, made under that view by `peer_id`, is not accepted, or None."""
        if self.view is None:
            return Verdict(reason="no view has come here yet", retry=True)
        verdict = judge_epoch(self.view, self.job_id, job_epoch)
        if verdict is None and view > self.view.view:
            return Verdict(reason=f"view {view} is newer than {self.view.view} here", retry=True)
        if verdict is None and getattr(server_of(self.view, shard), "peer_id", None) != peer_id:
            verdict = Verdict(reason=f"{peer_id} does not serve shard {shard} in view {self.view.view}")
        return verdict


def order_of(view: RoundView) -> Ordered:
    """Return what orders views of one job: the job epoch first, then the number."""
    return view.job_epoch, view.view


def _say(view: RoundView) -> str:
    return f"{view.job_epoch}.{view.view}"


def say_members(members: Iterable[Member]) -> str:
    """Name some leases for people: the first few, and how many more there are."""
    names = [member.peer_id for member in members]
    more = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
    return ", ".join(names[:NAMES_SHOWN_MAX]) + more
