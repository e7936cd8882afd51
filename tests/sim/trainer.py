"""A training executor in virtual time: what `hypha.training.train` does, with arithmetic for a model.

    FetchBase ─▶ BaseReady ─▶ batches at this machine's speed ─▶ SendUpdate ─▶ UpdateArrived ─▶ next base

What to do next is decided by the real rules, `hypha.training.standing`; samples are asked for one grant ahead, too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from hypha.errors import JobFailed
from hypha.protocol.bridge import (
    BaseFetched,
    BaseReady,
    FetchBase,
    FetchSamples,
    FileRef,
    Finish,
    Instruction,
    NoSamples,
    Report,
    SamplesFetched,
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
from hypha.training import standing
from tests.sim import weights
from tests.sim.line import BridgeRefused, Line
from tests.sim.supply import Asking, Round

IDLE_S = 1.0
GRANT_BATCHES = 8
POLL_S = 0.2
REFUSALS_MAX = 5


class Body(Protocol):
    """What an executor runs on: time that passes by its machine's speed, and somewhere to say what happened."""

    nursery: trio.Nursery

    def now(self) -> float:
        """Seconds on the machine's clock."""

    async def work(self, seconds: float) -> None:
        """Compute for so long on a machine of speed 1."""

    def note(self, what: str) -> None:
        """Tell the event log."""


@dataclass
class Kept:
    """One uncommitted round as this executor has it."""

    base: weights.Vector
    digest: str
    update: SendUpdate | None = None
    contributed: bool = False
    out: bool = False
    ahead: bool = False
    early: bool = False
    requests: int = 0
    refusals: int = 0


class Trainer:
    """One executor's state across rounds; `here` is the round whose base it stands on."""

    def __init__(self, line: Line, job: JobSpec, work_dir: Path, body: Body, batch_s: float) -> None:
        self.line, self.job, self.work_dir, self.body, self.batch_s = line, job, work_dir, body, batch_s
        self.fragments = Fragments(weights.SHAPES, job.streaming)
        self.shares = weights.shares(self.fragments, job.shards)
        self.outlook = standing.Outlook()
        self.kept: dict[int, Kept] = {}
        self.here = 0
        self.heard: Instruction | None = None
        self.first: tuple[int, Asking] | None = None  # samples of a round not begun

    async def run(self) -> None:
        """Train until the job is over. Raises JobFailed, BridgeRefused."""
        await self.fetch_base()
        while not isinstance(move := self._next(), standing.Finish):
            await self.act(move)
            self._listen()

    async def act(self, move: standing.Move) -> None:
        """Make a move."""
        match move:
            case standing.Apply(update):
                await self.apply(update)
            case standing.Return(round_):
                await self.go_back(round_)
            case standing.Fetch():
                await self.fetch_base()
            case standing.Train():
                await self.contribute()
            case _:
                await self._idle()

    # --- standing on a base ---

    async def fetch_base(self) -> None:
        """Stand on the newest view's base, fetched."""
        fetched = await self.line.fetch_patiently(FetchBase())
        assert isinstance(fetched, BaseFetched)
        self._listen()
        self.outlook.forget_updates_from(fetched.round)
        self._forget_first()
        self.body.note(f"base of round {fetched.round} fetched")
        await self._stand(fetched.round, self._read(fetched.files), fetched.digest)

    async def apply(self, arrived: UpdateArrived) -> None:
        """Stand on θ_base − U, if that is what the parameter server says it is; else on what it holds."""
        result = self._moved(arrived)
        if result is None:
            return await self.fetch_base()
        self._committed(arrived.round - 1)
        return await self._stand(arrived.round + 1, result, arrived.model_digest)

    def _moved(self, arrived: UpdateArrived) -> weights.Vector | None:
        """The base that an outer update leads to; None where it does not lead to the parameter server's."""
        base = self.kept[arrived.round].base
        del self.outlook.updates[arrived.round]
        result = base - self._read(arrived.files, self.fragments.of(arrived.round))
        for file in arrived.files:
            (self.work_dir / file.path).unlink()
        if tuple(weights.digest(result, names) for names in self.shares) != arrived.parts:
            self.body.note(f"update of round {arrived.round} leads elsewhere")
            return None
        return result

    async def go_back(self, round_: int) -> None:
        """Stand on a kept base again: its round is open again, and what came after it is void."""
        self.body.note(f"back to round {round_}")
        for number, later in self.kept.items():
            if number > round_:
                later.update, later.contributed = None, False
        self.kept[round_].contributed = False
        self._forget_first()
        self.outlook.forget_updates_from(round_)
        self.here = round_
        await self._ready()

    async def _stand(self, round_: int, base: weights.Vector, digest: str) -> None:
        self.kept[round_] = Kept(base, digest)
        self.here = round_
        self.outlook.settle()
        await self._ready()

    async def _ready(self) -> None:
        await self._report(BaseReady(round=self.here, digest=self.kept[self.here].digest))

    def _committed(self, round_: int) -> None:
        for number in [one for one in self.kept if one <= round_ and one != self.here]:
            update = self.kept.pop(number).update
            if update is not None:
                for file in update.files:
                    (self.work_dir / file.path).unlink(missing_ok=True)

    # --- one round ---

    async def contribute(self) -> None:
        """Train the round where we stand and send the result, or send again what it gave; an event may end both."""
        kept = self.kept[self.here]
        try:
            if kept.update is None:
                kept.update = await self.train_round(kept, self.here)
            else:
                self.body.note(f"update of round {self.here} sent again")
            if kept.update is not None:
                await self.send(kept, kept.update)
        except BridgeRefused as refusal:
            self._refused(kept, str(refusal), final=not refusal.retry)
            await self._idle()

    async def train_round(self, kept: Kept, round_: int) -> SendUpdate | None:
        """Take inner steps until told to sync or out of samples; None when an event ends the round first."""
        current = Round(round_, asking=self._first_of(round_, kept))
        try:
            samples_max = self.job.rounds.samples_between_updates
            batches, sync_at = 0, self._batches_max(round_)
            while batches < sync_at and len(current.samples) < samples_max:
                if await self._called_away():
                    return None
                taken = await self._take(current, kept, self.job.rounds.max_batch_size)
                if not taken:
                    if current.exhausted:
                        break
                    return None
                left = samples_max - len(current.samples) - len(taken)
                self._look_ahead(current, min((sync_at - batches - 1) * self.job.rounds.max_batch_size, left))
                await self.body.work(self.batch_s)
                current.samples += taken
                batches += 1
                # What a report is answered is heard with the next one.
                answer, self.heard = self.heard, await self._report(self._progress(current, batches, len(taken)))
                if isinstance(answer, SyncAt) and answer.round == current.number:
                    sync_at = answer.batches
            if not await self._has_base(round_):
                return None
        finally:
            if current.asking is not None:
                current.asking.abandoned = True
        return self._update(kept, current.used, current.samples)

    async def _take(self, current: Round, kept: Kept, wanted: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < wanted and await self._has_grant(current, kept, wanted):
            rows = current.take(min(wanted - len(taken), current.left))
            taken += weights.rows(self.work_dir / current.path, rows.start, rows.stop)
            if current.left <= GRANT_BATCHES * wanted // 2:
                self._ask(current, kept, wanted)
        return taken

    def _first_of(self, round_: int, kept: Kept) -> Asking | None:
        """What was asked for ahead, where it is of this round."""
        (number, asking), self.first = self.first or (0, None), None
        if asking is None or number != round_ or kept.requests:
            return None
        kept.requests = 1
        return asking

    def _look_ahead(self, _current: Round, _then: int) -> None:
        """Ask for samples of the next round once the `_then` more that this one may take are here."""

    def _forget_first(self) -> None:
        if self.first is not None:
            self.first[1].abandoned = True
        self.first = None

    def _ask(self, current: Round, kept: Kept, wanted: int) -> None:
        if current.asking is None and not current.exhausted:
            request = FetchSamples(round=current.number, request=kept.requests, wanted=GRANT_BATCHES * wanted)
            kept.requests += 1
            current.asking = Asking()
            self.body.nursery.start_soon(current.asking.run, self.line, request)

    async def _has_grant(self, current: Round, kept: Kept, wanted: int) -> bool:
        """Wait for rows to take; False when there are none, or the wait was ended by an event."""
        while not current.left:
            if current.exhausted or await self._leaves_waiting():
                return False
            self._ask(current, kept, wanted)
            assert current.asking is not None
            with trio.move_on_after(POLL_S):
                await current.asking.done.wait()
            if not current.asking.done.is_set():
                continue
            asked, current.asking = current.asking, None
            if asked.error is not None:
                raise asked.error
            if isinstance(asked.answer, SamplesFetched):
                current.grant, current.path = asked.answer.interval, asked.answer.path
                current.next = current.grant.start
            current.exhausted = isinstance(asked.answer, NoSamples)
        return True

    async def send(self, kept: Kept, update: SendUpdate) -> None:
        """Deliver an update, and take the answer to heart."""
        answer = await self.line.send(update)
        self._listen()
        await self._answered(kept, update, answer)

    async def _answered(self, kept: Kept, update: SendUpdate, answer: Sent) -> None:
        match answer:
            case SendAccepted():
                kept.contributed = True
            case SendRefused(reason=reason):
                kept.update = None
                self._refused(kept, reason, final=True)
            case SendRebase(round=round_, base_digest=digest):
                self.body.note(f"told to rebase from round {update.round} to {round_}")
                target = self.kept.get(round_)
                if target is None or target.digest != digest:
                    await self.fetch_base()
                elif round_ != self.here:
                    await self.go_back(round_)

    def _refused(self, kept: Kept, reason: str, *, final: bool) -> None:
        kept.refusals += final
        self.body.note(f"refused in round {self.here}: {reason}")
        if kept.refusals >= REFUSALS_MAX:
            raise JobFailed(f"round {self.here}: refused {kept.refusals} times: {reason}")

    def _progress(self, current: Round, batches: int, count: int) -> TrainProgress:
        samples = len(current.samples)
        return TrainProgress(
            round=current.number, batches=batches, samples=samples, batch_size=count, batch_s=self.batch_s, loss=1.0
        )

    def _update(self, kept: Kept, used: Sequence[Interval], samples: Sequence[int]) -> SendUpdate:
        delta = weights.pseudo_gradient(samples, kept.base)
        moved = self.fragments.of(self.here)
        files = [
            weights.write(self.work_dir / f"update-{self.here}-{n}.safetensors", delta, self.work_dir, moved & names)
            for n, names in enumerate(self.shares)
        ]
        return SendUpdate(
            round=self.here,
            base_digest=kept.digest,
            files=tuple(files),
            samples=len(samples),
            intervals=tuple(sorted(used)),
            loss=1.0 if samples else 0.0,
        )

    def _read(self, files: Sequence[FileRef], names: Collection[str] = weights.SHAPES) -> weights.Vector:
        whole = weights.zeros()
        for file, share in zip(files, self.shares, strict=True):
            whole += weights.read(self.work_dir / file.path, share & set(names))
        return whole

    # --- listening ---

    def _listen(self) -> None:
        for event in self.line.drain():
            self.outlook.take(event)
        self._committed(self.outlook.committed)

    async def _idle(self) -> None:
        event = await self.line.next_event(IDLE_S)
        if event is not None:
            self.outlook.take(event)

    def _next(self) -> standing.Move:
        return standing.next_move(self.outlook, self.kept, self.here, self.body.now())

    async def _called_away(self) -> bool:
        self._listen()
        return not isinstance(self._next(), standing.Train)

    async def _leaves_waiting(self) -> bool:
        """Asked while there is nothing to train on."""
        return await self._called_away()

    def _batches_max(self, _round: int) -> int:
        """After how many batches to contribute, while nothing is said about it."""
        return self.job.rounds.samples_between_updates

    async def _has_base(self, _round: int) -> bool:
        """Whether the base is here of which an update is the difference; False when an event ends the round."""
        return True

    async def _report(self, report: Report) -> Instruction:
        answer = await self.line.report(report)
        if isinstance(answer, Finish):
            self.outlook.over = "the scheduler is done"
        return answer
