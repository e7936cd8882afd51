"""The training executor: `python -m hypha.training.train --socket S --work-dir W --job J`.

    FetchBase ─▶ BaseReady ─▶ ┌─▶ take samples, inner step, TrainProgress ─┐
                              │         until SyncAt, NoSamples or an event │
                              │   SendUpdate(Δ, the intervals used) ◀───────┘
                              └── UpdateArrived: θ ← θ_base − U ◀── wait

What to do next is decided by hypha.training.standing. For every round not yet committed the executor keeps the base (a
file for each shard), its inner state from the round's beginning, and its update: so it can go back and send that again
(hypha.training.kept); and its own parameters, where a round synchronises a fragment only (hypha.training.local).
"""

import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from hypha.errors import JobFailed, RemoteProtocolError
from hypha.protocol.bridge import (
    BaseFetched,
    BaseReady,
    FetchBase,
    FileRef,
    Finish,
    Instruction,
    Report,
    SendAccepted,
    SendRebase,
    SendRefused,
    SendUpdate,
    Sent,
    SyncAt,
    TrainProgress,
    UpdateArrived,
)
from hypha.protocol.fragments import Fragments
from hypha.protocol.job import JobSpec
from hypha.protocol.messages import Interval
from hypha.telemetry import get_logger, inject, span_from
from hypha.training import executor, local, models, shares, standing, tensors
from hypha.training.batches import Feed, rows_of
from hypha.training.calls import Reports
from hypha.training.inner import InnerLoop
from hypha.training.kept import Book, Kept, remove
from hypha.training.session import BridgeRefused, Session
from hypha.training.sources import fetch_preprocessor, fetch_source
from hypha.training.supply import Supply
from hypha.training.timing import timed

log = get_logger("training.train")

# How long to sleep at most when there is nothing to do; rules that depend on time are looked at that often.
IDLE_S = 1.0
# The mean batch time that is reported covers this many: short enough to follow a machine that becomes busy.
RECENT_BATCHES = 8
# A follower, which waits to be made a member, says that often that it is still there.
HEARTBEAT_S = 10.0
# A round in which samples or sending were refused is tried again this often, so that one stale answer costs nothing.
REFUSALS_MAX = 5


class Trainer:
    """One executor's state across rounds; `here` is the round whose base the model stands on."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path) -> None:
        self.session, self.job, self.work_dir = session, job, work_dir
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.inner = InnerLoop(models.build(job.model, source=fetch_source(session, job)), job.inner, device)
        self.preprocess = fetch_preprocessor(session, job)
        self.parameters = models.parameters_of(self.inner.model)
        self.fragments = Fragments(self.parameters, job.streaming)
        self.outlook = standing.Outlook()
        self.kept = Book(work_dir)
        self.supply = Supply(session, job, work_dir)
        self.reports = Reports(session.report)
        self.here = 0
        self.reported_at = 0.0
        self.recent_s: deque[float] = deque(maxlen=RECENT_BATCHES)
        self.batch_size = job.rounds.max_batch_size

    def run(self) -> None:
        """Train until the job is over. Raises JobFailed, BridgeClosed."""
        self.fetch_base()
        log.info("Base fetched", round=self.here)
        while not isinstance(move := self._next(), standing.Finish):
            self.act(move)
            self._listen()
        self.reports.end()
        log.info("Training is over", reason=move.reason, inner_steps=self.inner.steps)

    def act(self, move: standing.Move) -> None:
        """Make a move."""
        match move:
            case standing.Apply(update):
                self.apply(update)
            case standing.Return(round_):
                self.go_back(round_)
            case standing.Fetch():
                self.fetch_base()
            case standing.Train():
                self.contribute()
            case _:
                self._idle()

    # --- standing on a base ---

    def fetch_base(self) -> None:
        """Stand on the newest view's base, fetched."""
        fetched = self.session.fetch_patiently(FetchBase())
        if not isinstance(fetched, BaseFetched):
            raise RemoteProtocolError(f"worker answered FetchBase with {type(fetched).__name__}")
        self._listen()
        self.outlook.forget_updates_from(fetched.round)
        self.supply.forget()
        base = tuple(self.work_dir / file.path for file in fetched.files)
        tensors.load_parts(base, self.parameters)
        self._stand(fetched.round, base, fetched.digest)

    def apply(self, arrived: UpdateArrived) -> None:
        """Stand on θ_base − U, if that is what the parameter servers say it is; else on what they hold."""
        moved = self._moved(arrived)
        if not moved:
            return self.fetch_base()
        kept, after, own = self.kept[arrived.round], self.kept.get(arrived.round + 1), None
        if self.job.streaming.plain:
            # A close of an earlier round is applied to the state that followed that round's inner steps.
            if after is not None:
                self.inner.restore(after.inner)
        else:
            # What was trained and not contributed is void: its samples are others' now.
            if arrived.round != self.here or not kept.contributed:
                self._rewind(arrived.round)
            own = tensors.save(self.work_dir / f"local-{arrived.round + 1}.safetensors", self.parameters).path
            self._mix(moved, arrived.round)
        self.kept.forget(arrived.round - 1, here=self.here)
        return self._stand(arrived.round + 1, moved, arrived.model_digest, own)

    def _moved(self, arrived: UpdateArrived) -> Sequence[Path]:
        """Use up an outer update: return the base it leads to; nothing where that is not the parameter servers'."""
        del self.outlook.updates[arrived.round]
        moved = self._written(arrived)
        remove(self.work_dir / file.path for file in arrived.files)
        return moved

    def _written(self, arrived: UpdateArrived) -> Sequence[Path]:
        """Write the base that an outer update leads to, by shard; nothing where it leads elsewhere."""
        updates, fragment = [self.work_dir / file.path for file in arrived.files], self.fragments.of(arrived.round)
        begins = self.work_dir / f"model-{arrived.round}-{arrived.close}-"
        results = tuple(Path(f"{begins}{part[:8]}.safetensors") for part in arrived.parts)
        with span_from(arrived.traceparent, "outer_update", round=arrived.round, close=arrived.close) as span:
            try:
                bases, coding = self.kept[arrived.round].base, self.job.compression.downward
                into, parts = self.parameters if self.job.streaming.plain else None, arrived.parts
                moved = shares.move(results, bases, updates, parts, coding=coding, fragment=fragment, into=into)
            except RemoteProtocolError as error:
                span.fail(error)
                log.warn("Outer update is unusable, fetching the model", round=arrived.round, reason=str(error))
                return ()
            if not moved:
                log.warn("Outer update leads elsewhere, fetching the model", round=arrived.round)
            return moved

    def go_back(self, round_: int) -> None:
        """Stand on a kept base again: its round is open again, and what came after it is void."""
        kept = self.kept[round_]
        log.info("Round is open again", round=round_, resend=kept.update is not None)
        if kept.update is not None:
            self._rewind(round_)
        else:
            self._restart(round_)
        for later in (one for number, one in self.kept.items() if number > round_):
            later.update, later.contributed = None, False
        kept.contributed = False
        self.supply.forget()
        self.outlook.forget_updates_from(round_)
        self.here = round_
        self._ready()

    def _rewind(self, round_: int) -> None:
        """Be as the round's inner steps left us; where that is not known, as it began."""
        self.supply.forget()
        kept, after = self.kept[round_], self.kept.get(round_ + 1)
        if after is None or (after.local is None and not self.job.streaming.plain):
            return self._restart(round_)
        tensors.load_parts(kept.base if after.local is None else (after.local,), self.parameters)
        return self.inner.restore(after.inner)

    def _restart(self, round_: int) -> None:
        """Be as the round began."""
        kept = self.kept[round_]
        tensors.load_parts(kept.base if kept.local is None else (kept.local,), self.parameters)
        self.inner.restore(kept.inner)
        if kept.local is not None:
            self._mix(kept.base, round_ - 1)

    def _mix(self, base: Sequence[Path], round_: int) -> None:
        """Take over what a round synchronised, as far as the job wants."""
        fragment = self.fragments.of(round_)
        local.mix(self.parameters, base, fragment=fragment, weight=self.job.streaming.mixing)

    def _stand(self, round_: int, base: Sequence[Path], digest: str, own: Path | None = None) -> None:
        """Begin a round with the parameters as they are."""
        inner = self.inner.save(self.work_dir / f"inner-{round_}.safetensors")
        fragment = self.job.streaming.turn(round_)
        self.kept.put(round_, Kept(base, digest, inner, owed=self.kept.owed(round_), local=own, fragment=fragment))
        self.here = round_
        self.outlook.settle()
        self._ready()

    def _ready(self) -> None:
        self._report(BaseReady(round=self.here, digest=self.kept[self.here].digest))

    # --- one round ---

    def contribute(self) -> None:
        """Train the round where we stand and send the result, or send again what it gave; an event may end both."""
        kept = self.kept[self.here]
        try:
            if kept.update is None:
                with timed(self.outlook, "inner_steps", self.here):
                    kept.update = self.train_round(kept, self.here)
            if kept.update is not None:
                with span_from(self.outlook.traceparent, "push", round=self.here, samples=kept.update.samples):
                    self.send(kept, kept.update)
        except BridgeRefused as refusal:
            self._refused(kept, str(refusal), final=not refusal.retry)
            self._idle()

    def train_round(self, kept: Kept, round_: int) -> SendUpdate | None:
        """Take inner steps until told to sync or out of samples; None when an event ends the round first."""
        if kept.begun:
            self._restart(round_)
        kept.begun = True
        samples_max = self.job.rounds.samples_between_updates
        batches, samples, loss_sum, sync_at = 0, 0, 0.0, self._batches_max(round_)
        with self.supply.feed(kept, round_, leave=self._leaves_waiting) as feed:
            while batches < sync_at and samples < samples_max:
                if self._called_away():
                    return None
                size = self.batch_size
                then = min((sync_at - batches - 1) * size, samples_max - samples - size)
                batch = feed.take(size, then=then)
                if batch is None:
                    if feed.exhausted or feed.full:
                        break
                    return None
                self._look_ahead(feed, round_, then)
                count = rows_of(batch)
                loss = self.inner.step(self.preprocess(batch), round_=round_)
                self.recent_s.append(self.inner.step_s)
                batches, samples, loss_sum = batches + 1, samples + count, loss_sum + loss * count
                answer = self._tell(self._progress(round_, batches, samples, size, loss))
                if isinstance(answer, SyncAt) and answer.round == round_:
                    sync_at = answer.batches
                    self._resize(answer.batch_size)
        if not self._has_base(round_):
            return None
        self.inner.finished_round(round_, batches)
        mean_loss = loss_sum / samples if samples else 0.0
        return kept.sent(round_, self._coded(kept, feed.used), feed.used, mean_loss)

    def _batches_max(self, _round: int) -> int:
        """After how many batches to contribute, while nothing is said about it."""
        return self.job.rounds.samples_between_updates

    def _look_ahead(self, _feed: Feed, _round: int, _then: int) -> None:
        """Ask for samples of the next round once the `_then` more that this one may take are here."""

    def _has_base(self, _round: int) -> bool:
        """Whether the base is here of which an update is the difference; False when an event ends the round."""
        return True

    def _resize(self, wanted: int | None) -> None:
        """Take batches of another size from the next one on; the times of the old ones say nothing about those."""
        if wanted is not None and wanted != self.batch_size:
            self.batch_size = min(wanted, self.job.rounds.max_batch_size)
            self.recent_s.clear()

    def _coded(self, kept: Kept, used: Sequence[Interval]) -> tuple[FileRef, ...]:
        """Write what the parameters have become since the base, as the job codes it, shard by shard."""
        coding = self.job.compression.upward
        if coding.feedback:
            kept.lost = tuple(self.work_dir / f"lost-{self.here}-{n}.safetensors" for n in range(len(kept.base)))
            self.kept.debts.update(kept.lost)
        return shares.pseudo_gradients(
            kept.base,
            self.parameters,
            round_=self.here,
            used=used,
            coding=coding,
            owed=kept.owed.get(kept.fragment, ()),
            lost=kept.lost,
            fragment=self.fragments.of(self.here),
            work_dir=self.work_dir,
        )

    def send(self, kept: Kept, update: SendUpdate) -> None:
        """Deliver an update, and take the answer to heart. Raises BridgeRefused."""
        began = time.monotonic()
        answer = self.session.send(msgspec.structs.replace(update, traceparent=inject()))
        self.outlook.push_s = time.monotonic() - began
        self._listen()
        self._answered(kept, answer)

    def _answered(self, kept: Kept, answer: Sent) -> None:
        match answer:
            case SendAccepted():
                kept.contributed = True
            case SendRefused(reason=reason):
                kept.update = None  # sending the same again would not help
                self._refused(kept, reason, final=True)
            case SendRebase(round=round_, base_digest=digest):
                self._rebase(round_, digest)

    def _rebase(self, round_: int, digest: str) -> None:
        """The open round has another base: stand there, by what is kept, by what is on its way, or by fetching."""
        target = self.kept.get(round_)
        if target is not None and target.digest == digest and round_ != self.here:
            self.go_back(round_)
        elif not self._called_away():  # nothing known here leads there
            self.fetch_base()

    def _refused(self, kept: Kept, reason: str, *, final: bool) -> None:
        kept.refusals += final
        log.warn("Refused", round=self.here, reason=reason, times=kept.refusals)
        if kept.refusals >= REFUSALS_MAX:
            raise JobFailed(f"round {self.here}: refused {kept.refusals} times: {reason}")

    def _progress(self, round_: int, batches: int, samples: int, batch_size: int, loss: float) -> TrainProgress:
        return TrainProgress(
            round=round_,
            batches=batches,
            samples=samples,
            batch_size=batch_size,
            batch_s=sum(self.recent_s) / len(self.recent_s),
            loss=loss,
        )

    # --- listening ---

    def _listen(self) -> None:
        for event in self.session.drain():
            self.outlook.take(event)
        # The base of the round after the last committed one is needed as long as that round is open.
        self.kept.forget(self.outlook.committed, here=self.here)

    def _idle(self) -> None:
        event = self.session.next_event(IDLE_S)
        if event is not None:
            self.outlook.take(event)
        if time.monotonic() - self.reported_at > HEARTBEAT_S and not self.kept[self.here].contributed:
            self._ready()

    def _next(self) -> standing.Move:
        return standing.next_move(self.outlook, self.kept, self.here, time.monotonic())

    def _called_away(self) -> bool:
        self._listen()
        return not isinstance(self._next(), standing.Train)

    def _leaves_waiting(self) -> bool:
        """Asked while there is nothing to train on."""
        return self._called_away()

    def _report(self, report: Report) -> None:
        self._tell(report)
        self._heed(self.reports.hear())

    def _tell(self, report: Report) -> Instruction | None:
        """Report without waiting; returns what the last report was answered, if that was not heard yet."""
        self.reported_at = time.monotonic()
        return self._heed(self.reports.tell(report))

    def _heed(self, answer: Instruction | None) -> Instruction | None:
        if isinstance(answer, Finish):
            self.outlook.over = "the scheduler is done"
        return answer


def work(session: Session, job: JobSpec, work_dir: Path) -> None:
    """Train one job to its end."""
    from hypha.training.overlap import Overlapping  # which builds on what stands above

    trainer = (Overlapping if job.streaming.overlap_steps else Trainer)(session, job, work_dir)
    log.info("Model built")
    trainer.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a process; returns its exit code."""
    return executor.run(work, "train", arguments)


if __name__ == "__main__":
    sys.exit(main())
