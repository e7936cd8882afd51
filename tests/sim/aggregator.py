"""A parameter server's executor in virtual time: what `hypha.training.aggregate` does, with arithmetic for a model.

StateReady(r) ─▶ ┌─ Screen ─▶ Screened ─────────────────────┐
                 ├─ Merge(r+1, close) ─▶ UpdateMade, MergeDone from the state of round r, every time
                 ├─ RoundCommitted(r+1) ─▶ r+1 is the state ─┤
                 └─ Stop ─▶ exit 0                          ┘
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hypha.protocol.bridge import (
    EvaluationDone,
    Event,
    FetchHeldOut,
    FetchOthers,
    FetchResume,
    FileRef,
    Merge,
    MergeDone,
    MergeFailed,
    OthersFetched,
    ResumeFetched,
    RoundCommitted,
    Screen,
    Screened,
    StateReady,
    Stop,
    UpdateMade,
)
from hypha.protocol.fragments import Fragments
from hypha.protocol.job import JobSpec
from tests.sim import weights
from tests.sim.line import BridgeRefused, Line
from tests.sim.trainer import Body

EVENT_WAIT_S = 60.0
SCREEN_S = 0.02
MERGE_S = 0.1
KEEP_S = 0.1
EVALUATE_S = 0.5


@dataclass(frozen=True)
class State:
    """Model and momentum after `round` outer steps."""

    round: int
    model: FileRef
    momentum: FileRef


class Aggregator:
    """The committed state, the outcome of the round after it, and every file that belongs to a round."""

    def __init__(self, line: Line, job: JobSpec, work_dir: Path, body: Body) -> None:
        self.line, self.job, self.work_dir, self.body = line, job, work_dir, body
        self.fragments = Fragments(weights.SHAPES, job.streaming)
        self.mine = weights.shares(self.fragments, job.shards)[job.shard]
        self.outcome: MergeDone | None = None
        self.files: dict[int, set[str]] = {}
        self.over = False

    async def run(self) -> None:
        """Serve events until Stop."""
        self.state = await self._resumed() if self.job.resume is not None else self._initial()
        self.files[self.state.round] = {self.state.model.path, self.state.momentum.path}
        await self.line.report(StateReady(round=self.state.round, model=self.state.model, momentum=self.state.momentum))
        self._evaluate(self.state.round, self.state.model.digest)
        while not self.over:
            event = await self.line.next_event(EVENT_WAIT_S)
            if event is not None:
                await self.take(event)

    def _initial(self) -> State:
        model = self._write("model-0", weights.initial(self.job.model.seed))
        return State(0, model, self._write("momentum-0", weights.zeros()))

    async def _resumed(self) -> State:
        fetched = await self.line.fetch_patiently(FetchResume())
        assert isinstance(fetched, ResumeFetched)
        round_, theta, velocity = fetched.round, self._read(fetched.model), self._read(fetched.momentum)
        for record in fetched.records:
            round_ += 1
            names = self.fragments.of(round_)
            gradient = self._read(record, names)
            theta, velocity, _ = weights.step(theta, velocity, gradient, self.job.outer, names)
        self.body.note(f"state of round {round_} restored from round {fetched.round}")
        model = self._write(f"model-{round_}-replayed", theta)
        return State(round_, model, self._write(f"momentum-{round_}-replayed", velocity))

    def _read(self, file: FileRef, names: Collection[str] = weights.SHAPES) -> weights.Vector:
        return weights.read(self.work_dir / file.path, self.mine & set(names))

    def _write(self, name: str, vector: weights.Vector, names: Collection[str] = weights.SHAPES) -> FileRef:
        return weights.write(self.work_dir / f"{name}.safetensors", vector, self.work_dir, self.mine & set(names))

    async def take(self, event: Event) -> None:
        """Act on one event."""
        match event:
            case Screen():
                await self.screen(event)
            case Merge():
                await self.merge(event)
            case RoundCommitted():
                self.commit(event)
            case Stop():
                self.over = True

    async def screen(self, event: Screen) -> None:
        """Say whether an update may be merged."""
        self.files.setdefault(event.round, set()).add(event.file.path)
        await self.body.work(SCREEN_S)
        path = self.work_dir / event.file.path
        # Whoever sent it may have been dropped while it waited here.
        sound = path.is_file() and bool(np.isfinite(self._read(event.file, self.fragments.of(event.round))).all())
        await self.line.report(Screened(ticket=event.ticket, refusal=None if sound else "it is not finite"))

    async def merge(self, event: Merge) -> None:
        """Close a round from the state before it; a close that was already answered is answered the same."""
        await self.body.work(MERGE_S)
        done = self.outcome
        if done is not None and (done.round, done.close) == (event.round, event.close):
            await self.line.report(done)
            return
        if done is not None and event.round == done.round + 1 and event.base_digest == done.model.digest:
            self._advance(done)
        if (event.round, event.base_digest) != (self.state.round + 1, self.state.model.digest):
            reason = f"round {event.round} cannot follow the state after round {self.state.round}"
            await self.line.report(MergeFailed(round=event.round, close=event.close, reason=reason))
            return
        self._drop_outcome()
        self.outcome = done = self._merged(event)
        made = UpdateMade(round=event.round, close=event.close, model_digest=done.model.digest, update=done.update)
        await self.line.report(made)
        await self.body.work(KEEP_S)
        await self.line.report(done)
        self._evaluate(done.round, done.model.digest)

    def _merged(self, event: Merge) -> MergeDone:
        inputs = sorted(event.inputs, key=lambda one: (one.peer_id, one.fence))
        names = self.fragments.of(event.round)
        deltas = [(self._read(one.file, names), one.samples) for one in inputs]
        theta, velocity, gradient = self._read(self.state.model), self._read(self.state.momentum), weights.mean(deltas)
        theta, velocity, update = weights.step(theta, velocity, gradient, self.job.outer, names)
        whole, moved = {"model": theta, "momentum": velocity}, {"record": gradient, "update": update}
        refs = {part: self._write(f"{part}-{event.round}-{event.close}", v) for part, v in whole.items()}
        refs |= {part: self._write(f"{part}-{event.round}-{event.close}", v, names) for part, v in moved.items()}
        self.files.setdefault(event.round, set()).update(ref.path for ref in refs.values())
        return MergeDone(round=event.round, close=event.close, update_norm=float(np.linalg.norm(update)), **refs)

    def commit(self, event: RoundCommitted) -> None:
        """Round `event.round` can no longer be lost: what came before it may go."""
        done = self.outcome
        if done is not None and (done.round, done.model.digest) == (event.round, event.digest):
            self._advance(done)

    def _advance(self, done: MergeDone) -> None:
        self.state = State(done.round, done.model, done.momentum)
        self.outcome = None
        for round_ in [one for one in self.files if one < done.round]:
            for path in self.files.pop(round_):
                (self.work_dir / path).unlink(missing_ok=True)

    def _drop_outcome(self) -> None:
        done, self.outcome = self.outcome, None
        if done is not None:
            for ref in (done.model, done.momentum, done.record, done.update):
                (self.work_dir / ref.path).unlink(missing_ok=True)

    # --- evaluation ---

    def _evaluate(self, round_: int, digest: str) -> None:
        every = self.job.rounds.evaluate_every
        if every and self.job.shard == 0 and (round_ % every == 0 or round_ == self.job.rounds.updates):
            self.body.nursery.start_soon(self._evaluation, round_, digest)

    async def _evaluation(self, round_: int, digest: str) -> None:
        try:
            await self.line.fetch_patiently(FetchHeldOut(), leave=lambda: self.over)
            if self.job.shards > 1:
                request = FetchOthers(round=round_, digest=digest)
                others = await self.line.fetch_patiently(request, leave=lambda: self.over)
                assert isinstance(others, OthersFetched)
                for file in others.files:
                    (self.work_dir / file.path).unlink()
        except BridgeRefused as refusal:
            self.body.note(f"no evaluation: {refusal}")
            return
        await self.body.work(EVALUATE_S)
        await self.line.report(EvaluationDone(round=round_, digest=digest, loss=1.0 / (1 + round_), samples=4))
