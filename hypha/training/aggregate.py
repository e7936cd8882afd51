"""The parameter server's executor: `python -m hypha.training.aggregate --socket S --work-dir W --job J`.

    StateReady(r) ─▶ ┌─ Screen(update) ─▶ Screened ──────────────────────┐
                     ├─ Prepare(r+1, inputs): begin with what has come of them, in a thread (`ahead`)
                     ├─ Merge(r+1, close, inputs) ─▶ UpdateMade(U)        │ from the state of round r, every time
                     │                            └─▶ MergeDone(θ, v, Δ̄, U)│
                     ├─ RoundCommitted(r+1) ─▶ r+1 is the state ──────────┤
                     └─ Stop ─▶ exit 0                                    ┘

Two states exist at most: the committed one, and the outcome of the newest close of the round after it. Files of a round
stay until the next one is committed, because late workers may still ask for them. Evaluation has a thread of its own.
Where several servers share the model, each does all this with its own tensors; the first evaluates the whole.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hypha.errors import JobFailed, LocalProtocolError, RemoteProtocolError
from hypha.protocol.bridge import (
    Event,
    FetchResume,
    FileRef,
    Merge,
    MergeDone,
    MergeFailed,
    Prepare,
    Report,
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
from hypha.protocol.shards import split
from hypha.telemetry import get_logger, span_from
from hypha.training import coded, executor, models, outer, tensors
from hypha.training.ahead import Ahead, Begun, in_order, name_of
from hypha.training.evaluate import Evaluator
from hypha.training.session import Session
from hypha.training.shapes import shapes_of
from hypha.training.sources import fetch_source

log = get_logger("training.aggregate")

EVENT_WAIT_S = 60.0
REASON_CHARS_MAX = 8000


@dataclass(frozen=True)
class State:
    """Model and momentum after `round` outer steps."""

    round: int
    model: FileRef
    momentum: FileRef


class Aggregator:
    """The committed state, the outcome of the round after it, and every file that belongs to a round."""

    def __init__(
        self,
        session: Session,
        job: JobSpec,
        work_dir: Path,
        state: State,
        evaluator: Evaluator,
        fragments: Fragments | None = None,
    ) -> None:
        """`fragments` are the whole model's; None: all of it is here."""
        self.session, self.job, self.work_dir = session, job, work_dir
        self.evaluator, self.ahead = evaluator, Ahead(work_dir)
        self.prepared = 0
        self.state = state
        self.outcome: MergeDone | None = None
        self.shapes = tensors.layout_of(work_dir / state.model.path).shapes()
        self.fragments = fragments or Fragments(self.shapes, job.streaming)
        self.files: dict[int, set[str]] = {state.round: {state.model.path, state.momentum.path}}
        self.over = False

    def run(self) -> None:
        """Serve events until Stop. Raises BridgeClosed."""
        self._report(StateReady(round=self.state.round, model=self.state.model, momentum=self.state.momentum))
        self.evaluator.submit(self.state.round, self.state.model)
        with self.ahead:
            while not self.over:
                event = self.session.next_event(EVENT_WAIT_S)
                if event is not None:
                    self.take(event)

    def take(self, event: Event) -> None:
        """Act on one event."""
        match event:
            case Screen():
                self.screen(event)
            case Prepare():
                self.prepare(event)
            case Merge():
                self.merge(event)
            case RoundCommitted():
                self.commit(event)
            case Stop():
                log.info("Aggregation is over", reason=event.reason, round=self.state.round)
                self.over = True

    def screen(self, event: Screen) -> None:
        """Say whether an update may be merged."""
        self.files.setdefault(event.round, set()).add(event.file.path)
        with span_from(event.traceparent, "screen", round=event.round) as span:
            shapes = self.fragments.among(self.shapes, event.round)
            refusal = None
            if not self.ahead.found_sound(event.file):
                refusal = coded.screen(self.work_dir / event.file.path, shapes, self.job.compression.upward)
            if refusal is not None:
                refusal = self.fragments.say(event.round) + refusal
                span.fail(refusal)
            self._report(Screened(ticket=event.ticket, refusal=refusal))

    def prepare(self, event: Prepare) -> None:
        """Begin the step that a Merge will ask for, where the base that it begins with is here."""
        states = [self.state]
        if self.outcome is not None:
            states.append(State(self.outcome.round, self.outcome.model, self.outcome.momentum))
        for state in states:
            if (state.round + 1, state.model.digest) == (event.round, event.base_digest):
                self.prepared += 1
                outs = self._outs(event.round, f"ahead-{self.prepared}")
                return self.ahead.prepare(event, partial(self._step, event.round, state, outs))
        return self.ahead.give_up()

    def merge(self, event: Merge) -> None:
        """Close a round from the state before it; a close that was already answered is answered the same."""
        done = self.outcome
        if done is not None and (done.round, done.close) == (event.round, event.close):
            self._report(done)
            return
        with span_from(event.traceparent, "aggregate", round=event.round, close=event.close) as span:
            try:
                done = self._merged(event)
            except RemoteProtocolError as error:
                span.fail(error)
                log.warn("Merge failed", round=event.round, close=event.close, reason=str(error))
                self._report(MergeFailed(round=event.round, close=event.close, reason=str(error)[:REASON_CHARS_MAX]))
                return
            self.outcome = done
            self._report(done)
            self.evaluator.submit(done.round, done.model, event.traceparent)

    def _merged(self, event: Merge) -> MergeDone:
        # Round r+1 is closed only once round r is committed: a Merge for it says so, too.
        done = self.outcome
        if done is not None and event.round == done.round + 1 and event.base_digest == done.model.digest:
            self._advance(done)
        if event.round != self.state.round + 1:
            raise RemoteProtocolError(f"round {event.round} cannot follow the state after round {self.state.round}")
        if event.base_digest != self.state.model.digest:
            raise RemoteProtocolError(f"base {event.base_digest} is not ours, {self.state.model.digest}")
        begun = self.ahead.take(event)
        self._drop_outcome()
        if begun is None:
            shares = [
                outer.Share(self.work_dir / one.file.path, one.samples, name_of(one)) for one in in_order(event.inputs)
            ]
            step = self._step(event.round, self.state, self._outs(event.round, str(event.close)), shares)
            begun = Begun(step, step.make())
        step, made = begun.step, begun.made
        update = made.update.ref(self.work_dir)
        files = self.files.setdefault(event.round, set())
        files.update(str(path.relative_to(self.work_dir)) for path in step.outs.values())
        self._report(UpdateMade(round=event.round, close=event.close, model_digest=made.model_digest, update=update))
        stepped = tensors.aside(lambda: step.keep(made)).result()
        refs = {part: getattr(stepped, part).ref(self.work_dir) for part in outer.PARTS}
        return MergeDone(round=event.round, close=event.close, update_norm=stepped.update_norm, **refs)

    def _step(self, round_: int, state: State, outs: Mapping[str, Path], shares: Sequence[outer.Share]) -> outer.Step:
        return outer.Step(
            outs,
            model=self.work_dir / state.model.path,
            momentum=self.work_dir / state.momentum.path,
            shares=shares,
            outer=self.job.outer,
            upward=self.job.compression.upward,
            downward=self.job.compression.downward,
            fragment=self.fragments.of(round_),
        )

    def commit(self, event: RoundCommitted) -> None:
        """Round `event.round` can no longer be lost: what came before it may go."""
        done = self.outcome
        if done is None or done.round != event.round:
            return
        if done.model.digest != event.digest:
            log.warn("Another close was committed", round=event.round, committed=event.digest, ours=done.model.digest)
            return
        self._advance(done)

    def _advance(self, done: MergeDone) -> None:
        self.state = State(done.round, done.model, done.momentum)
        self.outcome = None
        for round_ in [one for one in self.files if one < done.round]:
            for path in self.files.pop(round_):
                (self.work_dir / path).unlink(missing_ok=True)

    def _drop_outcome(self) -> None:
        """An earlier close of the open round gives way to a new one."""
        done, self.outcome = self.outcome, None
        if done is not None:
            for ref in (done.model, done.momentum, done.record, done.update):
                (self.work_dir / ref.path).unlink(missing_ok=True)
                self.files.get(done.round, set()).discard(ref.path)

    def _outs(self, round_: int, which: str) -> dict[str, Path]:
        return {part: self.work_dir / f"{part}-{round_}-{which}.safetensors" for part in outer.PARTS}

    def _report(self, report: Report) -> None:
        self.session.report(report)


def initial_state(session: Session, job: JobSpec, work_dir: Path) -> State:
    """Its shard of model and momentum to begin with: initial weights, or committed state with its records replayed."""
    if job.resume is not None:
        return resumed_state(session, job, work_dir)
    model = models.build(job.model, source=fetch_source(session, job))
    parameters = share_of(job, models.parameters_of(model))
    theta = tensors.save(work_dir / "model-0-0.safetensors", parameters)
    momentum = outer.zeros(work_dir / "momentum-0-0.safetensors", tensors.shapes_of(parameters))
    return State(0, theta.ref(work_dir), momentum.ref(work_dir))


def share_of(job: JobSpec, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of this server's shard. Raises JobFailed: there are fewer tensors than servers."""
    sizes = {name: tensor.numel() * torch.float32.itemsize for name, tensor in parameters.items()}
    try:
        names = split(sizes, job.shards, Fragments(sizes, job.streaming).parts)[job.shard]
    except LocalProtocolError as error:
        raise JobFailed(str(error)) from error
    return {name: parameters[name] for name in names}


def fragments_of(session: Session, job: JobSpec, work_dir: Path, state: State) -> Fragments:
    """Return the whole model's fragments, also where one shard of it is here."""
    mine = tensors.layout_of(work_dir / state.model.path).tensors
    if job.shards == 1 or job.streaming.fragments == 1:
        return Fragments(mine, job.streaming)
    return Fragments(shapes_of(job.model, fetch_source(session, job)), job.streaming)


def resumed_state(session: Session, job: JobSpec, work_dir: Path) -> State:
    """Fetch the job's resume point and replay its records. Raises JobFailed when that leads nowhere."""
    fetched = session.fetch_patiently(FetchResume())
    if not isinstance(fetched, ResumeFetched):
        raise RemoteProtocolError(f"worker answered FetchResume with {type(fetched).__name__}")
    state = State(fetched.round, fetched.model, fetched.momentum)
    fragments = fragments_of(session, job, work_dir, state)
    for record in fetched.records:
        number = state.round + 1
        outs = {part: work_dir / f"{part}-{number}-replayed.safetensors" for part in outer.PARTS}
        old = [work_dir / ref.path for ref in (state.model, state.momentum, record)]
        try:
            stepped = outer.replay(
                outs,
                model=old[0],
                momentum=old[1],
                record=old[2],
                outer=job.outer,
                downward=job.compression.downward,
                fragment=fragments.of(number),
            )
        except RemoteProtocolError as error:
            raise JobFailed(f"record of round {number} cannot be replayed: {error}") from error
        state = State(number, stepped.model.ref(work_dir), stepped.momentum.ref(work_dir))
        for path in (*old, outs["record"], outs["update"]):
            path.unlink(missing_ok=True)
    return state


def work(session: Session, job: JobSpec, work_dir: Path) -> None:
    """Serve one job's parameters until it is over."""
    state = initial_state(session, job, work_dir)

    def build() -> torch.nn.Module:
        return models.build(job.model, source=fetch_source(session, job))

    with Evaluator(session, job, work_dir, build) as evaluator:
        fragments = fragments_of(session, job, work_dir, state)
        Aggregator(session, job, work_dir, state, evaluator, fragments).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a process; returns its exit code."""
    return executor.run(work, "aggregate", arguments)


if __name__ == "__main__":
    sys.exit(main())
