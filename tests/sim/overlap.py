"""A training executor that does not wait, in virtual time: what `hypha.training.overlap` does.

inner steps of r ─▶ push r, beside it: inner steps of r+1 ─▶ outer update r joined ─▶ push r+1
"""

from pathlib import Path

import trio

from hypha.protocol.bridge import FetchSamples, SendAccepted, SendUpdate, Sent, TrainProgress, UpdateArrived
from hypha.protocol.job import JobSpec
from hypha.training import standing
from tests.sim.line import BridgeRefused, Line
from tests.sim.supply import Asking, Round
from tests.sim.trainer import GRANT_BATCHES, Body, Kept, Trainer

ANSWER_WAIT_S = 5.0


class Sending:
    """One update under way."""

    def __init__(self) -> None:
        self.answer: Sent | None = None
        self.error: BridgeRefused | None = None
        self.over = trio.Event()

    async def run(self, line: Line, update: SendUpdate) -> None:
        """Send it, and note the answer."""
        try:
            self.answer = await line.send(update)
        except BridgeRefused as refusal:
            self.error = refusal
        self.over.set()


class Overlapping(Trainer):
    """A trainer that does not wait; `following` is the round after the open one, as long as it has no base."""

    def __init__(self, line: Line, job: JobSpec, work_dir: Path, body: Body, batch_s: float) -> None:
        super().__init__(line, job, work_dir, body, batch_s)
        self.following: Kept | None = None
        self.sending: Sending | None = None
        self.batches = job.rounds.samples_between_updates
        self.ahead = 0  # batches since the push
        self._starving = False
        self._asked_at = (0, 0)
        self._unusable = False

    async def act(self, move: standing.Move) -> None:
        """Make a move, unless the answer to an update asks for another."""
        taken = self._delivered()
        if self.following is not None and not (taken and isinstance(move, standing.Ahead | standing.Wait)):
            await self._abandon()
        if not taken:
            await self._take_to_heart()
        elif isinstance(move, standing.Ahead):
            await self.run_ahead()
        else:
            await super().act(move)

    # --- sending ---

    async def send(self, kept: Kept, update: SendUpdate) -> None:
        """Begin to deliver an update, and the next round's inner steps."""
        self.sending = Sending()
        self.body.nursery.start_soon(self.sending.run, self.line, update)
        kept.out = True
        self._listen()
        if self.here < self.job.rounds.updates:
            kept.ahead = kept.early = True
            self.ahead = 0
            self.following = Kept(kept.base, "")

    def _delivered(self) -> bool:
        sending, kept = self.sending, self.kept[self.here]
        if sending is None or not sending.over.is_set():
            return True
        if isinstance(sending.answer, SendAccepted):
            self.sending, kept.out, kept.contributed = None, False, kept.out
            return True
        return False

    async def _take_to_heart(self) -> None:
        assert self.sending is not None
        sending, self.sending, kept = self.sending, None, self.kept[self.here]
        kept.out = False
        if sending.error is not None:
            self._refused(kept, str(sending.error), final=not sending.error.retry)
            await self._idle()
        elif kept.update is not None:
            assert sending.answer is not None
            await self._answered(kept, kept.update, sending.answer)

    def _forget_sending(self) -> None:
        self.sending = None
        for kept in self.kept.values():
            kept.out = kept.ahead = kept.early = False

    async def apply(self, arrived: UpdateArrived) -> None:
        """See Trainer."""
        self._forget_sending()
        await super().apply(arrived)

    async def go_back(self, round_: int) -> None:
        """See Trainer."""
        self._forget_sending()
        await super().go_back(round_)

    async def fetch_base(self) -> None:
        """See Trainer."""
        self._forget_sending()
        await super().fetch_base()

    # --- running ahead ---

    async def run_ahead(self) -> None:
        """Train the next round; its update is sent as any other's once it has a base."""
        following, round_ = self.following, self.here + 1
        assert following is not None
        self.body.note(f"runs ahead to round {round_}")
        try:
            following.update = await self.train_round(following, round_)
        except BridgeRefused as refusal:
            self._refused(following, str(refusal), final=not refusal.retry)
        if self.following is not None:
            await self._abandon()

    async def _abandon(self) -> None:
        self.body.note(f"ends its run ahead of round {self.here}")
        self.following = None
        self._forget_first()
        self.kept[self.here].ahead = self.kept[self.here].early = False
        if self._unusable:
            self._unusable = False
            await self.fetch_base()

    async def _called_away(self) -> bool:
        if self.following is None:
            return await super()._called_away()
        self._listen()
        if not self._delivered():
            return True
        kept = self.kept[self.here]
        kept.early = self.ahead < self.job.streaming.overlap_steps and not self._starving
        move = self._next()
        if isinstance(move, standing.Apply) and move.update.round == self.here:
            return not (await self._in_time(kept) and await self._join(move.update))
        return not isinstance(move, standing.Ahead | standing.Wait)

    async def _in_time(self, kept: Kept) -> bool:
        if self.sending is not None:
            with trio.move_on_after(ANSWER_WAIT_S):
                await self.sending.over.wait()
            self._delivered()
        return kept.contributed

    async def _leaves_waiting(self) -> bool:
        starving, self._asked_at = self._asked_at == (self.here, self.ahead), (self.here, self.ahead)
        return await self._called_away_from(starving=starving)

    async def _called_away_from(self, *, starving: bool) -> bool:
        self._starving = starving
        try:
            return await self._called_away()
        finally:
            self._starving = False

    async def _join(self, arrived: UpdateArrived) -> bool:
        base, following = self._moved(arrived), self.following
        if base is None or following is None:
            self._unusable = True
            return False
        self.following, round_ = None, arrived.round + 1
        kept = self.kept[self.here]
        kept.ahead = kept.early = False
        following.base, following.digest = base, arrived.model_digest
        self.kept[round_] = following
        self._committed(arrived.round - 1)
        self.here = round_
        self.outlook.settle()
        self.body.note(f"joins round {round_} after {self.ahead} batches")
        await self._ready()
        return True

    async def _has_base(self, round_: int) -> bool:
        self.kept[self.here].ahead = False
        while self.following is not None:
            if await self._called_away_from(starving=True):
                return False
            if self.following is not None:
                await self._idle()
        return self.here == round_

    def _look_ahead(self, current: Round, then: int) -> None:
        round_ = current.number + 1
        if current.left < then or round_ > self.job.rounds.updates or (self.first and self.first[0] == round_):
            return
        self._forget_first()
        wanted = GRANT_BATCHES * self.job.rounds.max_batch_size
        self.first = round_, Asking()
        request = FetchSamples(round=round_, request=0, wanted=wanted)
        self.body.nursery.start_soon(self.first[1].run, self.line, request)

    def _batches_max(self, round_: int) -> int:
        return super()._batches_max(round_) if round_ == self.here else self.batches

    def _progress(self, current: Round, batches: int, count: int) -> TrainProgress:
        self.batches = self.ahead = batches
        return super()._progress(current, batches, count)
