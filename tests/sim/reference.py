"""What a job must have come to, computed again from nothing but its chain of commits.

entry r ─▶ contributions: samples named ─▶ their pseudo-gradients on model r-1, byte for byte
        ─▶ merged by weight in (peer id, fence) order ─▶ Nesterov ─▶ model r, momentum r, record r: by digest
of a round's fragment, where the job has fragments
"""

from collections.abc import Collection
from hashlib import sha256

from hypha.protocol.fragments import Fragments, Streaming
from hypha.protocol.job import OuterOptimizer
from hypha.protocol.manifest import RoundCommitted
from hypha.protocol.messages import Contribution, Interval
from hypha.protocol.shards import whole_digest
from tests.sim import dataset, weights


class Reference:
    """Replays committed rounds; `round` is the newest, `samples` counts all that were used."""

    def __init__(
        self,
        *,
        seed: int,
        sizes: tuple[int, ...],
        outer: OuterOptimizer,
        streaming: Streaming = Streaming(),  # noqa: B008 - frozen
        shards: int = 1,
    ) -> None:
        self.round = 0
        self.digests: dict[int, str] = {}  # of the model after each committed round, whole
        self.samples = 0
        self.epochs = 0
        self._sizes = sizes
        self._fragments = Fragments(weights.SHAPES, streaming)
        self._outer = outer
        self._shares = weights.shares(self._fragments, shards)
        self._theta = weights.initial(seed)
        self._velocity = weights.zeros()
        self._used: dict[int, set[int]] = {}

    @property
    def model_digests(self) -> tuple[str, ...]:
        """Of the model after the newest round, by shard."""
        return self._digests(self._theta, weights.SHAPES)

    def _digests(self, vector: weights.Vector, names: Collection[str]) -> tuple[str, ...]:
        return tuple(weights.digest(vector, share & set(names)) for share in self._shares)

    def commit(self, entry: RoundCommitted) -> list[str]:
        """Take the next round; returns every way in which it is not what it must be."""
        merged = entry.merged
        faults = []
        if merged.round != self.round + 1:
            faults.append(f"L5: round {merged.round} committed after round {self.round}")
        if tuple(each.base_digest for each in entry.shards) != self.model_digests:
            faults.append(f"L5: round {merged.round} starts from another model than round {self.round} left")
        faults += [fault for each in entry.contributions for fault in self._use(each)]
        named = [(self._delta(c), c.samples) for c in self._ordered(entry.contributions) if c.samples]
        gradient, moved = weights.mean(named), self._fragments.of(merged.round)
        self._theta, self._velocity, update = weights.step(self._theta, self._velocity, gradient, self._outer, moved)
        self.round = merged.round
        self.digests[merged.round] = whole_digest(self.model_digests, sha256)
        made = {
            "model": (self._theta, weights.SHAPES),
            "momentum": (self._velocity, weights.SHAPES),
            "record": (gradient, moved),
            "update": (update, moved),
        }
        for part, (vector, names) in made.items():
            found = tuple(getattr(each, f"{part}_digest") for each in entry.shards)
            wanted = self._digests(vector, names)
            if (found, getattr(merged, f"{part}_digest")) != (wanted, whole_digest(wanted, sha256)):
                faults.append(f"the {part} of round {merged.round} is not what its contributions make")
        return faults

    def used_of(self, interval: Interval) -> list[int]:
        """The samples of an interval that a committed round has used already in that epoch."""
        return sorted(self._used.get(interval.epoch, set()) & set(dataset.samples_of(self._sizes, interval)))

    def _ordered(self, contributions: tuple[Contribution, ...]) -> list[Contribution]:
        return sorted(contributions, key=lambda c: (c.peer_id, c.fence))

    def _numbers(self, contribution: Contribution) -> list[int]:
        return [n for interval in contribution.intervals for n in dataset.samples_of(self._sizes, interval)]

    def _delta(self, contribution: Contribution) -> weights.Vector:
        return weights.pseudo_gradient(self._numbers(contribution), self._theta)

    def _use(self, contribution: Contribution) -> list[str]:
        who = f"{contribution.peer_id}/{contribution.fence} in round {contribution.round}"
        faults = []
        for interval in contribution.intervals:
            used = self._used.setdefault(interval.epoch, set())
            new = set(dataset.samples_of(self._sizes, interval))
            if used & new:
                faults.append(f"L6: {who} used samples {sorted(used & new)[:4]} of epoch {interval.epoch} again")
            used |= new
            if interval.epoch and len(self._used.get(interval.epoch - 1, ())) != sum(self._sizes):
                faults.append(f"L6: {who} used epoch {interval.epoch} before the one before it was all used")
        self.samples += contribution.samples
        self.epochs = sum(len(used) == sum(self._sizes) for used in self._used.values())
        moved = self._fragments.of(contribution.round)
        if whole_digest(self._digests(self._delta(contribution), moved), sha256) != contribution.digest:
            faults.append(f"the contribution of {who} is not what its samples and base give")
        return faults
