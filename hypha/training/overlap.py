"""Inner steps that go on while an update travels (Streaming DiLoCo, arXiv 2501.18512, §2.3).

    inner steps of r ─▶ push r ─▶ inner steps of r+1 ───────────┬──────────────────────▶ push r+1 ─▶ …
              │           └ sent by a thread of its own          └ outer update r mixed in: after overlap_steps,
              └ first samples of r+1 asked for                     and at push r+1 at the latest, which waits for it

The round after the open one begins with the push, so what must be kept to go back to it, the own parameters and the
inner state, is kept then. Its base comes later, written by a thread; only then it is kept as a round like any other.
Whatever else happens before that (another view, a refusal, an update that was not taken) ends the run ahead: the
executor is again where the push left it, and goes on as one that waits.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from hypha.protocol.bridge import SendAccepted, SendUpdate, Sent, TrainProgress, UpdateArrived
from hypha.protocol.job import JobSpec
from hypha.telemetry import get_logger, inject
from hypha.training import standing, tensors
from hypha.training.batches import Feed
from hypha.training.calls import Call
from hypha.training.kept import Kept
from hypha.training.session import BridgeRefused, Session
from hypha.training.timing import timed
from hypha.training.train import Trainer

log = get_logger("training.overlap")

# An outer update is here, and whether our own update was in time for it is not known yet: the answer is on its way.
ANSWER_WAIT_S = 5.0


class Overlapping(Trainer):
    """A trainer that does not wait; `following` is the round after the open one, as long as it has no base."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path) -> None:
        super().__init__(session, job, work_dir)
        self.following: Kept | None = None
        self.sending: Call[Sent] | None = None
        self.pushed_at = 0  # in inner steps
        self.batches = job.rounds.samples_between_updates
        self._starving = False
        self._asked_at = -1  # in inner steps
        self._unusable = False
        self._moving: tuple[UpdateArrived, Call[Sequence[Path]]] | None = None  # the next base is being written

    def act(self, move: standing.Move) -> None:
        """Make a move, unless the answer to an update asks for another."""
        taken = self._delivered()
        if self.following is not None and not (taken and isinstance(move, standing.Ahead | standing.Wait)):
            self._abandon()
        if not taken:
            self._take_to_heart()
        elif isinstance(move, standing.Ahead):
            self.run_ahead()
        else:
            super().act(move)

    # --- sending ---

    def send(self, kept: Kept, update: SendUpdate) -> None:
        """Begin to deliver an update, and the next round's inner steps."""
        # An earlier one that is still under way is superseded: the worker gives it up.
        traced = msgspec.structs.replace(update, traceparent=inject())
        self.sending = Call("send-update", lambda: self.session.send(traced))
        kept.out = True
        self._listen()
        if self.here < self.job.rounds.updates:
            kept.ahead = kept.early = True
            round_, self.pushed_at = self.here + 1, self.inner.steps
            own = tensors.save(self.work_dir / f"local-{round_}.safetensors", self.parameters).path
            inner = self.inner.save(self.work_dir / f"inner-{round_}.safetensors")
            self.following = Kept(kept.base, "", inner, local=own, fragment=self.job.streaming.turn(round_))

    def _delivered(self) -> bool:
        """Take note when an update was accepted; False: it was not, and something has to be done about that."""
        sending, kept = self.sending, self.kept[self.here]
        if sending is None or not sending.over.is_set():
            return True
        if isinstance(sending.answer, SendAccepted):
            self.sending, kept.out, kept.contributed = None, False, kept.out
            return True
        return False

    def _take_to_heart(self) -> None:
        """An update was not taken."""
        assert self.sending is not None
        sending, self.sending, kept = self.sending, None, self.kept[self.here]
        kept.out = False
        try:
            self._answered(kept, sending.result())
        except BridgeRefused as refusal:
            self._refused(kept, str(refusal), final=not refusal.retry)
            self._idle()

    def _forget_sending(self) -> None:
        """Whatever becomes of what is under way, it is not for the round where we go now."""
        self.sending = None
        for kept in self.kept.values():
            kept.out = kept.ahead = kept.early = False

    def apply(self, arrived: UpdateArrived) -> None:
        """See Trainer."""
        self._forget_sending()
        super().apply(arrived)

    def go_back(self, round_: int) -> None:
        """See Trainer."""
        self._forget_sending()
        super().go_back(round_)

    def fetch_base(self) -> None:
        """See Trainer."""
        self._forget_sending()
        super().fetch_base()

    # --- running ahead ---

    def run_ahead(self) -> None:
        """Train the next round; its update is sent as any other's once it has a base."""
        following, round_ = self.following, self.here + 1
        assert following is not None, "an update was pushed"
        try:
            with timed(self.outlook, "inner_steps", round_):
                following.update = self.train_round(following, round_)
        except BridgeRefused as refusal:
            self._refused(following, str(refusal), final=not refusal.retry)
        if self.following is not None:
            self._abandon()

    def _abandon(self) -> None:
        """Be again where the push has left us, as one that waits."""
        following, self.following, kept = self.following, None, self.kept[self.here]
        assert following is not None, "a round was begun"
        self.supply.forget()
        assert following.local is not None, "from own parameters"
        tensors.load_parts((following.local,), self.parameters)
        self.inner.restore(following.inner)
        kept.ahead = kept.early = False
        if self._unusable:
            self._unusable = False
            self.fetch_base()

    def _called_away(self) -> bool:
        if self.following is None:
            return super()._called_away()
        self._listen()
        if not self._delivered():
            return True
        kept = self.kept[self.here]
        kept.early = self.inner.steps - self.pushed_at < self.job.streaming.overlap_steps and not self._starving
        move = self._next()
        if isinstance(move, standing.Apply) and move.update.round == self.here:
            return not self._in_time(kept) or self._leads_nowhere(move.update)
        return not isinstance(move, standing.Ahead | standing.Wait)

    def _in_time(self, kept: Kept) -> bool:
        """Whether our update was accepted before the round closed: if not, what was trained since is void, too."""
        if self.sending is not None:
            self.sending.over.wait(ANSWER_WAIT_S)
            self._delivered()
        return kept.contributed

    def _leaves_waiting(self) -> bool:
        # Asked a second time since the last step, there has been nothing to train on for a while.
        starving, self._asked_at = self._asked_at == self.inner.steps, self.inner.steps
        return self._called_away_from(starving=starving)

    def _called_away_from(self, *, starving: bool) -> bool:
        self._starving = starving
        try:
            return self._called_away()
        finally:
            self._starving = False

    def _leads_nowhere(self, arrived: UpdateArrived) -> bool:
        """Have the next base written beside the inner steps, and join it once it is; True: it cannot be joined."""
        if self._moving is None or self._moving[0] != arrived:
            self._moving = arrived, Call("outer-update", lambda: Trainer._written(self, arrived))
        if not self._starving and not self._moving[1].over.is_set():
            return False
        return not self._join(arrived)

    def _written(self, arrived: UpdateArrived) -> Sequence[Path]:
        moving, self._moving = self._moving, None
        if moving is not None and moving[0] == arrived:
            return moving[1].result()
        return super()._written(arrived)

    def _join(self, arrived: UpdateArrived) -> bool:
        """Stand on the base that the outer update leads to, in the middle of the round; False: it leads nowhere."""
        base, following = self._moved(arrived), self.following
        if not base or following is None:
            self._unusable = True
            return False
        self.following, round_ = None, arrived.round + 1
        kept = self.kept[self.here]
        kept.ahead = kept.early = False
        following.base, following.digest, following.owed = base, arrived.model_digest, self.kept.owed(round_)
        self.kept.put(round_, following)
        self.kept.forget(arrived.round - 1, here=self.here)
        self._mix(base, arrived.round)
        self.here = round_
        self.outlook.settle()
        self._ready()
        return True

    def _has_base(self, round_: int) -> bool:
        """Wait for the outer update, which is all that the round still lacks."""
        self.kept[self.here].ahead = False
        while self.following is not None:
            if self._called_away_from(starving=True):
                return False
            if self.following is not None:
                self._idle()
        return self.here == round_

    def _look_ahead(self, feed: Feed, round_: int, then: int) -> None:
        if feed.holds(then):
            self.supply.ahead(round_ + 1)

    def _batches_max(self, round_: int) -> int:
        """Ahead nobody says when to contribute: as many batches as in the round before."""
        return super()._batches_max(round_) if round_ == self.here else self.batches

    def _progress(self, round_: int, batches: int, samples: int, batch_size: int, loss: float) -> TrainProgress:
        self.batches = batches
        return super()._progress(round_, batches, samples, batch_size, loss)
