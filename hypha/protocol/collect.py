"""What a parameter server holds of a round, and what it may merge (rounds.md, invariants L2 and L5).

    offer ──Take──▶ arriving ──landed──▶ screening ──screened──▶ held ──close──▶ MergePlan ──merge_done──▶ Merged
      └─ Accepted (held already) · Rebase (another base) · Verdict (refused, or retry)

    model b ◀─ base of ─ generation b+1 ── merged ─▶ model b+1 ◀─ base of ─ generation b+2
       └────── kept until Committed(b+1) ──────┘         so that b+1 may be closed again from before it

At most two generations exist, because round b+2 does not close before b+1 is committed. Going back to b+1 keeps what
b+2 has collected: if b+1 comes out the same, it is still right. What is held outlives its sender's lease.
"""

from math import isfinite

from msgspec import Struct

from hypha.protocol.messages import (
    Accepted,
    CloseRound,
    Collected,
    Committed,
    Contribution,
    Member,
    Merged,
    Merging,
    PushUpdate,
    Rebase,
    RoundView,
)
from hypha.protocol.shards import part_of
from hypha.protocol.views import Part, Verdict, ViewGuard, judge_lease

Key = tuple[str, int]  # (peer id, fence)


class Take(Struct, frozen=True, kw_only=True):
    """Receive the bytes, check their digest, then `landed(ticket)`, or `lost(ticket)`. A later Take supersedes it."""

    ticket: int


class Screening(Struct, frozen=True, kw_only=True):
    """Have the file screened, then `screened(ticket, refusal)`."""

    ticket: int
    contribution: Contribution


class MergePlan(Struct, frozen=True, kw_only=True):
    """Merge these, in this order, from the state before the round. `drop`: spooled files that are of no use now.

    `base_digest` is that of this server's shard.
    """

    round: int
    close: int
    base_digest: str
    inputs: tuple[Contribution, ...]  # in (peer id, fence) order, none of them empty
    drop: tuple[Contribution, ...]


class Foreseen(Struct, frozen=True, kw_only=True):
    """What the open round's Close will name unless something happens; `tickets` are of those that still arrive.

    Both in (peer id, fence) order, empty contributions left out; a ticket is None where the update is held.
    """

    round: int
    base_digest: str
    inputs: tuple[Contribution, ...]
    tickets: tuple[int | None, ...]


class ViewTaken(Struct, frozen=True, kw_only=True):
    """What a view did. Send `collected()` if it changed anything; then delete the spooled files in `drop`.

    unservable: this server does not hold the base that the view names; only a restart from the store helps.
    """

    changed: bool = False
    stale: str | None = None
    unservable: str | None = None
    drop: tuple[Contribution, ...] = ()


class _Generation:
    """One round on one base: what has come, and its newest Close. `part` is this shard's of the base."""

    def __init__(self, round: int, base_digest: str, part: str) -> None:
        self.round = round
        self.base_digest = base_digest
        self.part = part
        self.held: dict[Key, Contribution] = {}
        self.request: CloseRound | None = None
        self.merged: Merged | None = None
        self.failed: str | None = None

    def contributions(self) -> tuple[Contribution, ...]:
        return tuple(self.held[key] for key in sorted(self.held))


class Collector:
    """The rules of one parameter server; `me` is its own lease, `shard` its share of the model."""

    def __init__(
        self,
        job_id: str,
        me: Member,
        *,
        round: int,
        model_digest: str,
        momentum_digest: str | None = None,
        shard: int = 0,
    ) -> None:
        """Begin with model and momentum after `round` outer steps: what a Ready of this server says, now and later."""
        self.me = me
        self.shard = shard
        self.guard = ViewGuard(job_id)
        self.round = round  # the newest committed round, or what the state was restored from
        self.model_digest = model_digest
        self.momentum_digest = momentum_digest
        self._generations: dict[int, _Generation] = {}
        self._open: _Generation | None = None
        self._arriving: dict[Key, tuple[int, PushUpdate]] = {}  # bounded by the view's members: see `offer`
        self._tickets = 0

    # --- views and commits ----------------------------------------------------------------------------------------

    def observe(self, view: RoundView, peer_id: str) -> ViewTaken:
        """Take a view sent by `peer_id`."""
        observed = self.guard.observe(view, peer_id)
        if observed.stale is not None or not observed.changed:
            return ViewTaken(stale=observed.stale)
        generation = self._generations.get(view.round)
        drop: tuple[Contribution, ...] = ()
        if generation is None or generation.base_digest != view.base_digest:
            self._open = None
            part = part_of(view.base_digest, view.parts, self.shard)
            if part is None or self._model(view.round - 1) != part:
                return ViewTaken(changed=True, unservable=self._mismatch(view))
            drop = self._drop_from(view.round)
            generation = self._generations[view.round] = _Generation(view.round, view.base_digest, part)
        self._open = generation
        members = {(member.peer_id, member.fence) for member in view.members}
        self._arriving = {key: push for key, push in self._arriving.items() if key in members}
        return ViewTaken(changed=True, drop=drop)

    def _model(self, round: int) -> str | None:
        if round == self.round:
            return self.model_digest
        made_by = self._generations.get(round)
        return made_by.merged.model_digest if made_by is not None and made_by.merged is not None else None

    def _mismatch(self, view: RoundView) -> str:
        mine = f"model {self.round} ({self.model_digest[:12]})"
        return f"view {view.view} opens round {view.round} on {view.base_digest[:12]}; this server holds {mine}"

    def _drop_from(self, round: int) -> tuple[Contribution, ...]:
        gone = [self._generations.pop(r) for r in sorted(self._generations) if r >= round]
        return tuple(c for generation in gone for c in generation.contributions())

    def committed(self, message: Committed, peer_id: str) -> Verdict | tuple[Contribution, ...]:
        """Forget what was kept to undo that round. Returns the spooled files to delete, or why it cannot be so."""
        verdict = self.guard.check_scheduler(message.job_epoch, peer_id)
        if verdict is not None:
            return verdict
        if message.round < self.round:
            return ()
        digest = part_of(message.digest, message.parts, self.shard)
        if digest is None or self._model(message.round) != digest:
            return Verdict(reason=f"round {message.round} was committed as {message.digest[:12]}, not as merged here")
        if message.round == self.round:
            return ()
        merged = self._generations[message.round].merged
        assert merged is not None, "its model is known"
        self.round, self.model_digest, self.momentum_digest = message.round, digest, merged.momentum_digest
        gone = [self._generations.pop(r) for r in sorted(self._generations) if r <= message.round]
        if self._open in gone:
            self._open = None  # until the view that opens the next round arrives
        return tuple(c for generation in gone for c in generation.contributions())

    # --- contributions --------------------------------------------------------------------------------------------

    def offer(self, push: PushUpdate, peer_id: str) -> Take | Accepted | Rebase | Verdict:
        """Judge the header of a pseudo-gradient, before its bytes."""
        fault = self._fault(push, peer_id) or self._stale(push)
        if fault is not None:
            return fault
        assert self._open is not None, "judged above"
        if push.round != self._open.round or push.contribution.base_digest != self._open.base_digest:
            return Rebase(round=self._open.round, base_digest=self._open.base_digest)
        key = (peer_id, push.fence)
        held = self._open.held.get(key)
        if held is not None and held.digest == push.contribution.digest and held.samples == push.contribution.samples:
            return Accepted(digest=held.digest)
        if held is not None and held.samples:
            return Verdict(reason=f"round {push.round} holds {held.digest[:12]} of this lease already")
        self._tickets += 1
        self._arriving[key] = (self._tickets, push)
        return Take(ticket=self._tickets)

    def _fault(self, push: PushUpdate, peer_id: str) -> Verdict | None:
        c = push.contribution
        if self.guard.view is None:
            return Verdict(reason="no view has come here yet", retry=True)
        if (c.peer_id, c.fence, c.lease_id, c.round) != (peer_id, push.fence, push.lease_id, push.round):
            return Verdict(reason="the contribution is not the sender's, or not of the round it says")
        if c.samples != sum(interval.samples for interval in c.intervals) or not isfinite(c.loss):
            return Verdict(reason=f"{c.samples} samples or a loss of {c.loss} contradict the contribution")
        if c.samples and not c.bytes:
            return Verdict(reason=f"{c.samples} samples without a pseudo-gradient")
        return judge_lease(self.guard.view, push, peer_id, (Part.MEMBER,))

    def _stale(self, push: PushUpdate) -> Verdict | None:
        if self._open is None:
            return Verdict(reason="the open round's base is not here yet", retry=True)
        if push.round < self._open.round:
            return Verdict(reason=f"round {push.round} is over; round {self._open.round} is open")
        return None

    def lost(self, ticket: int) -> None:
        """The transfer broke, or its bytes did not have the digest: the sender may offer again."""
        self._arriving = {key: value for key, value in self._arriving.items() if value[0] != ticket}

    def landed(self, ticket: int) -> Screening | Accepted | Verdict:
        """The bytes are here, whole, and have their digest. An empty contribution needs no screening."""
        push = self._find(ticket)
        if push is None:
            return self._superseded()
        if not push.contribution.samples:
            return self.screened(ticket, None)
        return Screening(ticket=ticket, contribution=push.contribution)

    def screened(self, ticket: int, refusal: str | None) -> Accepted | Verdict:
        """Hold what was screened, unless it was found wrong or the world has moved on. Then send `collected()`."""
        push = self._find(ticket)
        if push is None:
            return self._superseded()
        self.lost(ticket)
        if refusal is not None:
            return Verdict(reason=refusal)
        stale = self._fault(push, push.contribution.peer_id) or self._stale(push)
        if stale is not None:
            return stale
        assert self._open is not None, "judged above"
        if push.round != self._open.round or push.contribution.base_digest != self._open.base_digest:
            return self._superseded()
        self._open.held[push.contribution.peer_id, push.fence] = push.contribution
        return Accepted(digest=push.contribution.digest)

    def _find(self, ticket: int) -> PushUpdate | None:
        return next((push for number, push in self._arriving.values() if number == ticket), None)

    def _superseded(self) -> Verdict:
        return Verdict(reason="superseded by a later transfer, another base, or the end of the lease", retry=True)

    def collected(self) -> Collected | None:
        """Return what to tell the scheduler: everything held of the open round; None while no round is open."""
        view = self.guard.view
        if view is None or self._open is None:
            return None
        return Collected(
            job_id=view.job_id,
            job_epoch=view.job_epoch,
            round=self._open.round,
            lease_id=self.me.lease_id,
            fence=self.me.fence,
            view=view.view,
            contributions=self._open.contributions(),
            merged=self._open.merged,
        )

    def foreseen(self) -> Foreseen | None:
        """Return what will be merged once all that arrives is here; None while a member has not begun to send."""
        view, generation = self.guard.view, self._open
        if view is None or generation is None or generation.request is not None:
            return None
        named: list[tuple[Contribution, int | None]] = []
        for key in sorted((member.peer_id, member.fence) for member in view.members):
            ticket, push = self._arriving.get(key, (None, None))
            contribution = generation.held.get(key) if push is None else push.contribution
            if contribution is None or contribution.base_digest != generation.base_digest:
                return None
            if contribution.samples:
                named.append((contribution, ticket))
        return Foreseen(
            round=generation.round,
            base_digest=generation.part,
            inputs=tuple(contribution for contribution, _ in named),
            tickets=tuple(ticket for _, ticket in named),
        )

    # --- closing --------------------------------------------------------------------------------------------------

    def close(self, request: CloseRound, peer_id: str) -> MergePlan | Merged | Merging | Verdict:
        """Answer a Close. A MergePlan is to be carried out and reported by `merge_done` or `merge_failed`."""
        verdict = self._may_close(request, peer_id)
        if verdict is not None:
            return verdict
        generation = self._generations.get(request.round)
        if generation is None or generation.part != request.base_digest:
            return Verdict(reason=f"round {request.round} on {request.base_digest[:12]} is not open here")
        before = generation.request
        if before is not None and request.close <= before.close:
            return self._again(generation, before, request)
        if generation is not self._open:
            return Verdict(reason=f"round {request.round} is not the open one")
        return self._missing(generation, request) or self._plan(generation, request)

    def _may_close(self, request: CloseRound, peer_id: str) -> Verdict | None:
        verdict = self.guard.check_scheduler(request.job_epoch, peer_id)
        if verdict is not None:
            return verdict
        if (request.lease_id, request.fence) != (self.me.lease_id, self.me.fence):
            return Verdict(reason=f"lease {request.lease_id} (fence {request.fence}) is not this server's")
        view = self.guard.view
        if view is None or request.view > view.view:
            return Verdict(reason=f"view {request.view} has not come here yet", retry=True)
        return None

    def _again(self, generation: _Generation, before: CloseRound, request: CloseRound) -> Merged | Merging | Verdict:
        if request.close < before.close:
            return Verdict(reason=f"close {request.close} is older than {before.close}")
        if request.contributors != before.contributors:
            return Verdict(reason=f"close {request.close} named other contributors before")
        if generation.failed is not None:
            return Verdict(reason=generation.failed)
        return generation.merged or Merging(round=request.round, close=request.close)

    def _missing(self, generation: _Generation, request: CloseRound) -> Verdict | None:
        if len({(peer, fence) for peer, fence, _ in request.contributors}) != len(request.contributors):
            return Verdict(reason="a Close names a lease twice")
        for peer, fence, digest in request.contributors:
            held = generation.held.get((peer, fence))
            if held is None or held.digest != digest:
                return Verdict(reason=f"{digest[:12]} of {peer} (fence {fence}) is not held here")
        if not sum(generation.held[peer, fence].samples for peer, fence, _ in request.contributors):
            return Verdict(reason="contributions without any sample are not a step")
        return None

    def _plan(self, generation: _Generation, request: CloseRound) -> MergePlan:
        drop = self._drop_from(generation.round + 1)  # their base may come out differently
        generation.request, generation.merged, generation.failed = request, None, None
        named = [generation.held[key] for key in sorted((peer, fence) for peer, fence, _ in request.contributors)]
        return MergePlan(
            round=generation.round,
            close=request.close,
            base_digest=generation.part,
            inputs=tuple(contribution for contribution in named if contribution.samples),
            drop=drop,
        )

    def awaits(self, round: int, close: int) -> bool:
        """Whether the outcome of this plan is awaited: no later Close has overtaken it, and it has none yet."""
        return self._planned(round, close) is not None

    def merge_done(self, merged: Merged) -> bool:
        """Take the outcome of a plan; False when a later Close has overtaken it and it means nothing."""
        generation = self._planned(merged.round, merged.close)
        if generation is None or generation.part != merged.base_digest:
            return False
        generation.merged = merged
        return True

    def merge_failed(self, round: int, close: int, reason: str) -> bool:
        """The plan cannot be carried out: its Close is refused with the reason. False when it was overtaken."""
        generation = self._planned(round, close)
        if generation is None:
            return False
        generation.failed = f"close {close} cannot be merged: {reason}"
        return True

    def _planned(self, round: int, close: int) -> _Generation | None:
        generation = self._generations.get(round)
        if generation is None or generation.request is None or generation.request.close != close:
            return None
        return generation if generation.merged is None and generation.failed is None else None
