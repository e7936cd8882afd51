"""One attempt after another to close a round: a numbered Close, its answers, its outcome (rounds.md).

idle ──begin──▶ Close(n) ──answered by the servers of all shards──▶ Outcome
  ▲               └─ refused · a server came or went ─▶ idle, the next Close has a higher number
  └──────────────────────────────────────────────────────┘
"""

from collections.abc import Sequence
from math import hypot

from msgspec import Struct

from hypha.protocol.messages import CloseRound, Contribution, Member, Merged, RoundView
from hypha.protocol.shards import Sha256, whole_digest
from hypha.protocol.tally import Key

# Closes of a later job epoch are higher than any of an earlier one, whatever a crashed scheduler had sent.
CLOSES_PER_EPOCH = 1 << 20


class Close(Struct, frozen=True, kw_only=True):
    """Send each request to its server, again and again until it is answered Merged or refused."""

    round: int
    close: int
    requests: tuple[tuple[Member, CloseRound], ...]


class Outcome(Struct, frozen=True, kw_only=True):
    """An outer step that all servers have made: write their records, then its manifest, then say `committed`."""

    round: int
    close: int
    contributions: tuple[Contribution, ...]
    merged: tuple[Merged, ...]  # by shard
    servers: tuple[Member, ...]  # likewise: who made them

    @property
    def samples(self) -> int:
        """How many samples it was made from."""
        return sum(contribution.samples for contribution in self.contributions)


class Waiting(Struct, frozen=True, kw_only=True):
    """No Close now, and why. `replace`: leases that can add nothing to this round although all wait for it."""

    reason: str
    replace: tuple[Member, ...] = ()


class Closing:
    """The Close that is under way, if any, and why the one before was refused."""

    def __init__(self, job_epoch: int) -> None:
        self._number = job_epoch * CLOSES_PER_EPOCH
        self.pending: Close | None = None
        self.named: dict[Key, Contribution] = {}
        self.refusal: str | None = None
        self._answers: dict[Member, Merged] = {}

    def begin(self, view: RoundView, accepted: dict[Key, Contribution]) -> Close:
        """Ask the view's servers, one for each shard, to merge exactly these contributions."""
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
                    base_digest=base,
                    contributors=contributors,
                ),
            )
            for server, base in zip(view.servers, view.parts or (view.base_digest,), strict=True)
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
        """Take a server's answer. Returns the Outcome once all are here, why it is not taken, or None."""
        pending = self.pending
        asked = dict(pending.requests).get(server) if pending is not None else None
        if pending is None or asked is None:
            return f"no Close is awaited from {server.peer_id}"
        if (merged.round, merged.close, merged.base_digest) != (asked.round, asked.close, asked.base_digest):
            return f"close {asked.close} of round {asked.round} is awaited, not {merged.close} of {merged.round}"
        self._answers[server] = merged
        if self.unanswered():
            return None
        servers = tuple(server for server, _ in pending.requests)
        return Outcome(
            round=pending.round,
            close=pending.close,
            contributions=tuple(self.named.values()),
            merged=tuple(self._answers[server] for server in servers),
            servers=servers,
        )


def whole_merged(parts: Sequence[Merged], sha256: Sha256) -> Merged:
    """Return the outcomes of one Close at all shards as one of the whole."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def folded(which: str) -> str:
        return whole_digest([getattr(part, which) for part in parts], sha256)

    return Merged(
        round=first.round,
        close=first.close,
        base_digest=folded("base_digest"),
        model_digest=folded("model_digest"),
        momentum_digest=folded("momentum_digest"),
        record_digest=folded("record_digest"),
        update_digest=folded("update_digest"),
        model_bytes=sum(part.model_bytes for part in parts),
        momentum_bytes=sum(part.momentum_bytes for part in parts),
        record_bytes=sum(part.record_bytes for part in parts),
        update_bytes=sum(part.update_bytes for part in parts),
        update_norm=hypot(*(part.update_norm for part in parts)),
    )
