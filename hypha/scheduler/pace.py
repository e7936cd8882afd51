"""The forecast of the open round, fed by progress reports.

Progress ─▶ Pace of the round ─▶ forecast ─▶ after how many batches to contribute        begins anew with each round
              └ speed, kept ─▶ sizes of all batches, as each round opens                 steady while it is open
"""

from math import ceil

from hypha.protocol.forecast import REQUESTS_PER_SHARE, Forecast, Pace, batch_sizes, grant_size, steadied
from hypha.protocol.messages import Contribution, Member, Progress
from hypha.telemetry import metrics


class Pacing:
    """Tells each member of the open round when to contribute, and how many samples to take and to fetch at a time.

    `batch_size` is the most of a batch; with `proportional` slower members get smaller ones.
    """

    def __init__(self, *, target_samples: int, batch_size: int, proportional: bool) -> None:
        self._target_samples = target_samples
        self._batch_size = batch_size
        self._proportional = proportional
        self._speeds: dict[Member, float] = {}
        self._sizes: dict[Member, int] = {}
        self._round = 0
        self._forecast = Forecast(target_samples)
        self._paces: dict[Member, Pace] = {}
        self._contributed: set[Member] = set()
        self.samples_per_s = 0.0

    def _turn_to(self, round_open: int) -> None:
        if round_open > self._round:
            self._round = round_open
            if self._proportional:
                self._sizes = steadied(batch_sizes(self._speeds, batch_size_max=self._batch_size), self._sizes)
            self._forecast = Forecast(self._target_samples)
            self._paces = {}
            self._contributed = set()

    def observe(self, member: Member, progress: Progress, now: float) -> int | None:
        """Take a report of the open round; returns after how many batches its sender should contribute, if known."""
        self._turn_to(progress.round)
        before = self._paces.get(member)
        done = before.samples if before is not None else 0
        if progress.samples > done:
            metrics.TRAINING_SAMPLES.add(progress.samples - done)
        if before is None or progress.batches >= before.batches:
            pace = Pace(
                batches=progress.batches,
                samples=progress.samples,
                batch_size=progress.batch_size,
                batch_s=progress.batch_s,
                at=now,
            )
            self._paces[member] = pace
            if pace.speed > 0:
                self._speeds[member] = pace.speed
            self._forecast.measure(member, pace)
            self.samples_per_s = sum(each.speed for each in self._paces.values())
        return self._forecast.sync_after(member, now)

    def batch_size(self, member: Member) -> int | None:
        """Return how many samples each batch of the member should have; None: as many as it takes already."""
        return self._sizes.get(member)

    def contributed(self, contribution: Contribution) -> None:
        """A member is done with the open round."""
        self._turn_to(contribution.round)
        member = Member(peer_id=contribution.peer_id, fence=contribution.fence, lease_id=contribution.lease_id)
        if contribution.round == self._round and member not in self._contributed:
            self._contributed.add(member)
            self._forecast.contributed(member, contribution.samples)

    def grant_size(self, member: Member, round_open: int, now: float) -> int:
        """Return how many samples to grant at once."""
        self._turn_to(round_open)
        told = self._forecast.sync_after(member, now)
        size = self._sizes.get(member, self._batch_size)
        return grant_size(told, self._paces.get(member), batch_size=size)

    def size_ahead(self, member: Member) -> int:
        """Return how many samples to grant at once of the round after the open one: a part of what it did in this."""
        size, pace = self._sizes.get(member, self._batch_size), self._paces.get(member)
        return size * max(1, ceil(pace.batches / REQUESTS_PER_SHARE)) if pace is not None else size

    def forget(self, member: Member) -> None:
        """A member's lease is over."""
        for known in (self._paces, self._speeds, self._sizes):
            known.pop(member, None)
        self._forecast.gone(member)
