"""The scheduler's book of rounds: who is counted, when a round closes, what is committed (rounds.md).

    open(r, base r-1) ──decide: Close──▶ merging ──merged by all servers──▶ open(r+1, base r), r uncommitted
        ▲                                   │ server gone, refused                 │ committed(r): samples USED
        └───────────────────────────────────┴──────────── lost(r) ─────────────────┘ only then may r+1 close

Events go in as method calls with `now` in seconds; what the caller must do comes back: journal an Exclude, send a
CloseRound, make an Outcome durable. `view(now)` is what everybody must know; it gets a new number whenever the round,
its base or the membership changes. Every "not yet" has its reason in words (torchft's quorum_compute).
"""

from collections.abc import Iterable
from math import isfinite
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from hypha.errors import LocalProtocolError
from hypha.protocol.closing import Close, Closing, Outcome, Waiting
from hypha.protocol.manifest import ChainState
from hypha.protocol.messages import (
    Collected,
    Contribution,
    Interval,
    Member,
    Merged,
    RoundMessage,
    RoundView,
)
from hypha.protocol.servers import Servers, Serving
from hypha.protocol.shards import Sha256, whole_digest
from hypha.protocol.slices import Later, SliceTable
from hypha.protocol.tally import Exclude, Key, Tally
from hypha.protocol.views import Part, Verdict, judge, judge_lease, say_members


class Terms(Struct, frozen=True, kw_only=True):
    """What the job asks of its rounds (see job.Rounds)."""

    job_id: str
    updates: int
    quorum: int
    deadline_s: float
    fewest: int = 0  # with fewer workers leased no round closes
    ahead: bool = False  # members may train for the round after the open one
    shards: int = 1  # parameter servers that share the model


class RoundBook:
    """One job's rounds under one job epoch."""

    def __init__(
        self,
        terms: Terms,
        *,
        job_epoch: int,
        chain: ChainState,
        table: SliceTable,
        now: float,
        sha256: Sha256,
        excluded: Iterable[Exclude] = (),
        awaited: Iterable[Member] = (),
    ) -> None:
        """Begin where the chain ends. `awaited`: journaled leases still being tried, each to be adopted or to die."""
        self.terms = terms
        self.job_epoch = job_epoch
        self.table = table
        self.round = chain.round + 1
        self.committed_round, self.committed_digest = chain.round, chain.model_digest
        self.samples = chain.samples
        self._sha256 = sha256
        self.members: set[Member] = set()
        self.followers: set[Member] = set()
        self.servers = Servers(terms.shards, chain.models, chain.momenta)
        self.uncommitted: Outcome | None = None
        self.final = chain.round >= terms.updates
        self._awaited = set(awaited)
        self._excluded = {(e.peer_id, e.fence, e.round): e for e in excluded if e.round > chain.round}
        for exclude in self._excluded.values():
            table.return_member(exclude.member, exclude.round)
        self._closing = Closing(job_epoch)
        self._number = 0
        self._view: RoundView | None = None
        self._closed_tally: Tally | None = None
        self._open(self.round, chain.models, now)

    def __repr__(self) -> str:
        crew = f"{len(self.members)} members, {len(self.followers)} followers, {len(self.servers)} servers"
        return f"<RoundBook view {self.job_epoch}.{self._number} round {self.round} [{crew}]>"

    def _open(self, round: int, base: tuple[str, ...], now: float, tally: Tally | None = None) -> None:
        self.round, self._base = round, base  # by shard; empty while it is not known
        self.base_digest = whole_digest(base, self._sha256) if base else None
        self.deadline = now + self.terms.deadline_s
        self._tally = tally or Tally(round, self.base_digest)
        self._closing.drop()
        self._bump()

    # --- views ----------------------------------------------------------------------------------------------------

    def _bump(self) -> None:
        self._closing.refusal = None
        if self.base_digest is None:
            return
        self._number += 1
        self._view = RoundView(
            job_id=self.terms.job_id,
            job_epoch=self.job_epoch,
            view=self._number,
            round=self.round,
            base_digest=self.base_digest,
            members=tuple(sorted(self.members)),
            followers=tuple(sorted(self.followers)),
            servers=tuple(self.servers),
            server_addresses=self.servers.addresses(),
            shards=self.servers.order() if len(self._base) > 1 else (),
            parts=self._base if len(self._base) > 1 else (),
            deadline_s=self.terms.deadline_s,
            committed_round=self.committed_round,
            committed_digest=self.committed_digest or self.base_digest,
            final=self.final,
        )

    def view(self, now: float) -> RoundView | None:
        """Return the newest view as of `now`; None until a parameter server has said what the initial model is."""
        if self._view is None:
            return None
        return replace(
            self._view,
            deadline_s=max(0.0, self.deadline - now),
            committed_round=self.committed_round,
            committed_digest=self.committed_digest or self._view.base_digest,
        )

    def check(self, message: RoundMessage[Any], peer_id: str, parts: tuple[Part, ...]) -> Verdict | None:
        """Return why the message does not match the newest view, or None when it may take effect (L2)."""
        if self._view is None:
            return Verdict(reason="no view has been made yet", retry=True)
        return judge(self._view, message, peer_id, parts)

    def check_lease(self, message: RoundMessage[Any], peer_id: str, parts: tuple[Part, ...]) -> Verdict | None:
        """Like `check`, for messages about any round (Ready, Evaluated)."""
        if self._view is None:
            return Verdict(reason="no view has been made yet", retry=True)
        return judge_lease(self._view, message, peer_id, parts)

    # --- leases ---------------------------------------------------------------------------------------------------

    def lease_added(self, member: Member) -> None:
        """A worker was leased: it follows until it says what it holds."""
        if member not in self.members | self.followers:
            self.followers.add(member)
            self._bump()

    def lease_adopted(self, member: Member) -> None:
        """A worker of the previous incarnation still answers: it is counted at once, and rebases if it must."""
        self._awaited.discard(member)
        if member not in self.members:
            self.followers.discard(member)
            self.members.add(member)
            self._bump()

    def worker_ready(self, member: Member, *, round: int, digest: str) -> str | None:
        """A worker holds model `round`: count it if that is the open round's base. Returns why not, or None."""
        if member in self.members:
            return None
        if member not in self.followers:
            return f"lease {member.lease_id} is not one of this job's"
        if (round, digest) != (self.round - 1, self.base_digest):
            return f"it holds model {round} ({digest[:12]}); round {self.round} needs model {self.round - 1}"
        self.followers.discard(member)
        self.members.add(member)
        self._bump()
        return None

    def server_ready(
        self,
        server: Member,
        address: bytes,
        *,
        round: int,
        digest: str,
        momentum_digest: str | None,
        now: float,
        shard: int = 0,
    ) -> str | None:
        """A parameter server holds a shard of model and momentum `round`. Returns why it may not count, or None.

        Updates are sent to it from the start, whatever its predecessor had: the round gets its whole time again.
        """
        if server in self.servers:
            return None
        if self.uncommitted is not None:
            return f"round {self.uncommitted.round} is neither committed nor lost yet"
        if round != self.committed_round:
            return f"it holds model {round}; {self.committed_round} is committed"
        if reason := self.servers.add(server, Serving(shard, address), digest=digest, momentum_digest=momentum_digest):
            return reason
        self.deadline = now + self.terms.deadline_s
        if (models := self.servers.models()) != self._base:  # before the first commit only
            self._base, self.base_digest = models, whole_digest(models, self._sha256)
            self._tally = Tally(self.round, self.base_digest)
        self._closing.drop()
        self._bump()
        return None

    def lease_died(self, member: Member) -> tuple[Exclude, ...]:
        """A lease is dead. Returns what to journal, and then to tell `excluded`."""
        known = member in self.members | self.followers | self._awaited or member in self.servers
        self.members.discard(member)
        self.followers.discard(member)
        self._awaited.discard(member)
        self.table.forget(member)
        if self.servers.remove(member):
            self._closing.drop()
        if known:
            self._bump()
        return self.orphans()

    def orphans(self) -> tuple[Exclude, ...]:
        """Exclude every dead lease that holds samples of an open or later round without an accepted contribution.

        Where there is one it stays, and what it leaves of its grants is free again.
        """
        live = self.members | self.followers | self._awaited
        counted = self.accepted()
        found = []
        for member, round in self.table.holders():
            if member in live or round < self.round:
                continue
            contribution = counted.get((member.peer_id, member.fence)) if round == self.round else None
            if contribution is not None:
                self.table.settle(contribution)
            else:
                found += self._exclude(member, round, "its lease is gone")
        return tuple(found)

    def _exclude(self, member: Member, round: int, reason: str) -> list[Exclude]:
        key = (member.peer_id, member.fence, round)
        if key in self._excluded:
            return []
        self._excluded[key] = Exclude(
            peer_id=member.peer_id, fence=member.fence, lease_id=member.lease_id, round=round, reason=reason
        )
        return [self._excluded[key]]

    def excluded(self, exclude: Exclude) -> tuple[Interval, ...]:
        """The exclusion is in the journal: its samples are free again. Returns them."""
        return self.table.return_member(exclude.member, exclude.round)

    # --- samples --------------------------------------------------------------------------------------------------

    def is_ahead(self, round: int) -> bool:
        """Whether samples of `round` are granted although the round before it is open."""
        return self.terms.ahead and round == self.round + 1

    def grant(self, member: Member, *, request: int, wanted: int, ahead: bool = False) -> Interval | Later | None:
        """Grant samples of the open round to a member that `check` let pass; journal the grant before it is sent.

        None is NoMore. Later: ask again. `ahead`: of the round after the open one, to whom `check_lease` let pass.
        """
        round = self.round + ahead
        if round > self.terms.updates:
            return Later(reason=f"the last round, {self.terms.updates}, is being committed")
        if (member.peer_id, member.fence, round) in self._excluded:
            return None
        if ahead and not self.table.held(member, self.round):  # the open round must not starve for what comes after
            return Later(reason=f"it holds no samples of round {self.round}, which comes first")
        return self.table.grant(member, round=round, request=request, wanted=wanted)

    # --- contributions --------------------------------------------------------------------------------------------

    def collected(self, message: Collected, peer_id: str) -> Verdict | tuple[Exclude, ...]:
        """Take a server's report. Returns what to journal and tell `excluded`, or why the report is not accepted."""
        verdict = self.check(message, peer_id, (Part.SERVER,))
        if verdict is not None:
            return verdict
        server = Member(peer_id=peer_id, fence=message.fence, lease_id=message.lease_id)
        found = []
        for contribution in self._tally.report(server, message.contributions):
            self._closing.refusal = None
            reason = self.table.check(contribution)
            if reason is None and not isfinite(contribution.loss):
                reason = f"its loss is {contribution.loss}"
            if reason is not None:
                sender = Member(peer_id=contribution.peer_id, fence=contribution.fence, lease_id=contribution.lease_id)
                found += self._exclude(sender, self.round, reason)
        return tuple(found)

    def accepted(self) -> dict[Key, Contribution]:
        """Contributions that count in the open round: held by all servers, not excluded, every sample theirs."""
        out = [(peer, fence) for peer, fence, round in self._excluded if round == self.round]
        held = {} if self.servers.missing else self._tally.accepted(self.servers, out)
        return {key: contribution for key, contribution in held.items() if self.table.check(contribution) is None}

    # --- closing --------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> Close | Waiting:
        """Return the Close to send now, or why there is none. To be asked after every event and at `deadline`."""
        blocked = self._blocked()
        if blocked is not None:
            return Waiting(reason=blocked)
        accepted = self.accepted()
        answered = set(accepted) | {(peer, fence) for peer, fence, round in self._excluded if round == self.round}
        missing = sorted(m for m in self.members if (m.peer_id, m.fence) not in answered)
        short = self._short(accepted)
        if short is None and (not missing or now >= self.deadline):
            assert self._view is not None, "a server is ready, so there is a base"
            return self._closing.begin(self._view, accepted)
        said = [short] if short is not None else [f"{len(accepted)} contributions"]
        if missing:
            said.append(f"waiting for {say_members(missing)}")
        said.append(f"{self.deadline - now:.1f} s to the deadline" if now < self.deadline else "past its deadline")
        spent = () if missing else tuple(m for m in sorted(self.members) if not self._adds(m, accepted))
        return Waiting(reason=f"round {self.round}: " + "; ".join(said), replace=spent if short else ())

    def _blocked(self) -> str | None:
        if self.final:
            return f"all {self.terms.updates} rounds are committed"
        if self._awaited:
            return f"round {self.round}: {len(self._awaited)} leases of the last run are still being tried"
        if self.uncommitted is not None:
            return f"round {self.uncommitted.round} is not committed yet"
        if (leased := len(self.members | self.followers)) < self.terms.fewest:
            return f"round {self.round}: {leased} of {self.terms.fewest} workers without which the job waits"
        if self.servers.missing:
            return f"round {self.round}: no parameter server is ready{self.servers.lacking()}"
        if self.pending is not None:
            merging = say_members(self._closing.unanswered())
            return f"round {self.round}: close {self.pending.close} is being merged by {merging}"
        if self._closing.refusal is not None:
            return f"round {self.round}: {self._closing.refusal}"
        return None

    def _short(self, accepted: dict[Key, Contribution]) -> str | None:
        if len(accepted) < self.terms.quorum:
            return f"{len(accepted)} of {self.terms.quorum} contributions that the quorum asks"
        if not sum(contribution.samples for contribution in accepted.values()):
            return f"{len(accepted)} contributions, all of them empty, are not a step"
        return None

    def _adds(self, member: Member, accepted: dict[Key, Contribution]) -> bool:
        contribution = accepted.get((member.peer_id, member.fence))
        return contribution is not None and contribution.samples > 0

    @property
    def pending(self) -> Close | None:
        """The Close that is not answered by all servers yet: to be sent again."""
        return self._closing.pending

    def close_refused(self, close: int, reason: str) -> None:
        """A server will not merge this Close. The next one waits for a new view or another set of contributions."""
        self._closing.refused(close, reason, self.accepted())

    def merged(self, server: Member, merged: Merged, now: float) -> Outcome | str | None:
        """Take a server's answer. Returns the Outcome once all are here, why it is not taken, or None."""
        outcome = self._closing.answered(server, merged)
        if not isinstance(outcome, Outcome):
            return outcome
        for contribution in outcome.contributions:
            self.table.settle(contribution)
        self.uncommitted, self._closed_tally = outcome, self._tally
        self._open(self.round + 1, tuple(merged.model_digest for merged in outcome.merged), now)
        return outcome

    # --- committing -----------------------------------------------------------------------------------------------

    def committed(self, round: int) -> tuple[Interval, ...]:
        """Its manifest is durable. Returns the samples that nobody used.

        A repetition changes nothing. Raises LocalProtocolError for a round that is not the one to be committed.
        """
        if round <= self.committed_round:
            return ()
        outcome = self._expect(round)
        returned = self.table.commit(round, outcome.contributions)
        models = tuple(merged.model_digest for merged in outcome.merged)
        self.committed_round, self.committed_digest = round, whole_digest(models, self._sha256)
        self.servers.committed(models, [merged.momentum_digest for merged in outcome.merged])
        self.samples += outcome.samples
        self.uncommitted = self._closed_tally = None
        self._excluded = {key: e for key, e in self._excluded.items() if e.round > round}
        if round == self.terms.updates:
            self.final = True
            self._bump()
        return returned

    def lost(self, round: int, now: float) -> tuple[Exclude, ...]:
        """It can no longer become durable, for certain: open it again on its base. Returns what to journal."""
        outcome = self._expect(round)
        self.uncommitted = None
        self._open(round, tuple(merged.base_digest for merged in outcome.merged), now, self._closed_tally)
        self._closed_tally = None
        return self.orphans()

    def _expect(self, round: int) -> Outcome:
        if self.uncommitted is None or self.uncommitted.round != round:
            raise LocalProtocolError(f"round {round} is not the one to be committed")
        return self.uncommitted
