"""One attempt after another to close a round: a numbered Close, its answers, its outcome (rounds.md).

idle ──begin──▶ Close(n) ──answered by all servers, alike──▶ Outcome
  ▲               └─ refused · a server came or went ─▶ idle, the next Close has a higher number
  └──────────────────────────────────────────────────────┘
"""

from msgspec import Struct

from hypha.protocol.messages import CloseRound, Contribution, Member, Merged, RoundView
from hypha.protocol.tally import Key

# Closes of a later job epoch are higher than any of an earlier one, whatever a crashed scheduler had sent.
CLOSES_PER_EPOCH = 1 << 20


class Close(Struct, frozen=True, kw_only=True):
    """Send each request to its server, again and again until it is answered Merged or refused."""

    round: int
    close: int
    requests: tuple[tuple[Member, CloseRound], ...]


class Outcome(Struct, frozen=True, kw_only=True):
    """An outer step that all servers have made: write its record, then its manifest, then say `committed`."""

    round: int
    close: int
    contributions: tuple[Contribution, ...]
    merged: tuple[Merged, ...]  # one per server, in their order

    @property
    def samples(self) -> int:
        """How many samples it was made from."""
        return sum(contribution.samples for contribution in self.contributions)


class Closing:
    """The Close that is under way, if any, and why the one before was refused."""

    def __init__(self, job_epoch: int) -> None:
        self._number = job_epoch * CLOSES_PER_EPOCH
        self.pending: Close | None = None
        self.named: dict[Key, Contribution] = {}
        self.refusal: str | None = None
        self._answers: dict[Member, Merged] = {}

    def begin(self, view: RoundView, accepted: dict[Key, Contribution]) -> Close:
        """Ask the view's servers to merge exactly these contributions."""
        self._number += 1
        self.named = dict(accepted)
        self._answers = {}
        contributors = tuple((peer, fence, c.digest) for (peer, fence), c in accepted.items())
        requests = tuple(
            (
                server,
                CloseRound(
                    job_id=view.job_id,
                    job_epoch=view.job_epoch,
                    round=view.round,
                    lease_id=server.lease_id,
                    fence=server.fence,
                    view=view.view,
                    close=self._number,
                    base_digest=view.base_digest,
                    contributors=contributors,
                ),
            )
            for server in view.servers
        )
        self.pending = Close(round=view.round, close=self._number, requests=requests)
        return self.pending

    def drop(self) -> None:
        """Nothing is under way any more: the next Close starts from before the round."""
        self.pending, self.named, self._answers = None, {}, {}

    def unanswered(self) -> list[Member]:
        """Servers whose answer is awaited."""
        requests = self.pending.requests if self.pending is not None else ()
        return [server for server, _ in requests if server not in self._answers]

    def refused(self, close: int, reason: str, accepted: dict[Key, Contribution]) -> None:
        """A server will not merge it. Unless something else is accepted by now, the same again would be refused too."""
        if self.pending is None or self.pending.close != close:
            return
        if accepted == self.named:
            self.refusal = f"close {close} was refused: {reason}"
        self.drop()

    def answered(self, server: Member, merged: Merged) -> Outcome | str | None:
        """Take a server's answer. Returns the Outcome once all agree, why it is not taken, or None: others to come."""
        pending = self.pending
        asked = dict(pending.requests).get(server) if pending is not None else None
        if pending is None or asked is None:
            return f"no Close is awaited from {server.peer_id}"
        if (merged.round, merged.close, merged.base_digest) != (asked.round, asked.close, asked.base_digest):
            return f"close {asked.close} of round {asked.round} is awaited, not {merged.close} of {merged.round}"
        self._answers[server] = merged
        if self.unanswered():
            return None
        answers = tuple(self._answers[server] for server, _ in pending.requests)
        if len({answer.model_digest for answer in answers}) > 1:
            return "the servers disagree about the model"
        return Outcome(
            round=pending.round, close=pending.close, contributions=tuple(self.named.values()), merged=answers
        )
