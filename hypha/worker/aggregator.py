"""A parameter server as its worker sees it: `protocol.collect` decides, the executor computes, this moves the bytes.

workers ── PushUpdate ──▶ spool ── Prepare, Screen ──▶ executor ── Screened ──▶ held ── Collected ──▶ scheduler
scheduler ── CloseRound ──▶ Merge ──▶ executor ── MergeDone ──▶ Merged ──▶ scheduler
                            └── UpdateMade ──▶ OuterUpdate ──▶ every member and follower
anyone in the job ── FetchModel ──▶ model, momentum, record, update by digest
"""

from pathlib import Path

import trio
from msgspec.structs import replace

from hypha.errors import Refused, RemoteProtocolError, StoreError
from hypha.network.artifacts import serve_artifact
from hypha.network.seam import Stream
from hypha.network.transfer import receive_file
from hypha.protocol import bridge
from hypha.protocol.collect import Collector, MergePlan, Screening, Take
from hypha.protocol.messages import (
    Accepted,
    CloseRound,
    Committed,
    Evaluated,
    FetchModel,
    Member,
    Merged,
    Merging,
    Message,
    PushUpdate,
    Ready,
    Rebase,
    RoundView,
    UpdateRefused,
)
from hypha.protocol.shards import part_of
from hypha.protocol.tensorfile import DIGEST_ALGORITHM
from hypha.protocol.views import Verdict, refusal
from hypha.telemetry import extracted, get_logger, inject, span
from hypha.worker.broadcast import Broadcast
from hypha.worker.merges import merged_of, outgoing_of
from hypha.worker.resume import fetch_resume
from hypha.worker.session import JobContext, Session
from hypha.worker.shares import fetch_others, misfit
from hypha.worker.spool import Spool

log = get_logger("worker.aggregator")

# A Close is answered Merging after this long, so that no request outlives its sender's patience.
MERGE_ANSWER_S = 5.0
# What follows an update, and makes it durable, waits for the update's delivery: so long, and as long as its bytes take
# on a link of 1 Gbit/s, at most.
KEEP_WAIT_S = 1.0
KEEP_BYTES_PER_S = 125e6


class AggregateSession(Session):
    """The worker's half of one aggregate executor."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self._collector: Collector | None = None
        self._pending_view: tuple[RoundView, str] | None = None
        self._spool = Spool(context.directory)
        self._prepared: bridge.Prepare | None = None  # what the executor was told last
        self._awaited: set[int] = set()  # tickets that the executor has been asked to screen
        self._screenings: dict[int, str | None] = {}  # refusals by ticket, once the executor has judged
        self._plans: dict[tuple[int, int], str] = {}  # base digest by (round, close) of the merges under way
        self._artifacts: dict[str, tuple[int, bridge.FileRef]] = {}  # what can be served: digest → (round, file)
        self._broadcast = Broadcast(self)

    async def run(self) -> None:
        """Keep the scheduler informed and send what is merged, until cancelled or failed."""
        await self.context.runtime.run_blocking(self._spool.make)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch)
            nursery.start_soon(self.outbox.run)
            nursery.start_soon(self._broadcast.run)

    # --- views and commits ----------------------------------------------------------------------------------------

    def observe(self, view: RoundView, peer_id: str) -> None:
        """Take a view in; before the initial state exists it is kept for later."""
        if self._collector is None:
            self._keep_for_later(view, peer_id)
            return
        taken = self._collector.observe(view, peer_id)
        if taken.stale is not None:
            raise Refused(taken.stale, "stale")
        if not taken.changed:
            return
        self._spool.forget(taken.drop)
        if taken.unservable is not None:
            self.fail(taken.unservable)
        self.guard.observe(view, peer_id)
        self.announce(view)
        self._tell_ready()
        self._collected_changed()

    def _keep_for_later(self, view: RoundView, peer_id: str) -> None:
        kept = None if self._pending_view is None else self._pending_view[0]
        if kept is not None and (view.job_epoch, view.view) < (kept.job_epoch, kept.view):
            raise Refused(f"view {view.view} is older than {kept.view}", "stale")
        self._pending_view = (view, peer_id)

    def _collected_changed(self) -> None:
        collected = self._collector.collected() if self._collector is not None else None
        if collected is not None:
            self.tell("collected", collected)

    def committed(self, message: Committed, peer_id: str) -> None:
        """A round is durable: forget what could undo it."""
        if self._collector is None:
            raise Refused("the initial state is not here yet", "retry")
        gone = self._collector.committed(message, peer_id)
        if isinstance(gone, Verdict):
            raise refusal(gone)
        self._spool.forget(gone)
        for digest in [d for d, (held_round, _) in self._artifacts.items() if held_round < message.round]:
            del self._artifacts[digest]
        self._plans = {key: base for key, base in self._plans.items() if key[0] > message.round}
        mine = part_of(message.digest, message.parts, self._collector.shard) or message.digest
        super().committed(replace(message, digest=mine), peer_id)
        self._tell_ready()

    # --- pushes ---------------------------------------------------------------------------------------------------

    async def receive_push(self, stream: Stream, header: PushUpdate) -> None:
        """Judge, spool, screen and answer one update."""
        if self._collector is None:
            raise Refused("the initial state is not here yet", "retry")
        fault = misfit(self.context.job, header)
        offered = self._collector.offer(header, stream.peer.peer_id) if fault is None else Verdict(reason=fault)
        answer: Message | Take | Verdict = offered
        if isinstance(answer, Take):
            answer = await self._take(self._collector, stream, header, answer.ticket)
        if isinstance(answer, Verdict):
            if answer.retry:
                raise refusal(answer)
            self._note_refusal(header, answer.reason)
            answer = UpdateRefused(reason=answer.reason)
        assert isinstance(answer, Accepted | Rebase | UpdateRefused)
        await stream.send_message(answer)

    async def _take(self, collector: Collector, stream: Stream, header: PushUpdate, ticket: int) -> Accepted | Verdict:
        try:
            with self._spool.arriving(ticket, header.part) as (path, file):
                self._prepare(collector)
                judged = await self._judged(collector, stream, header, ticket, path, file)
        except StoreError as error:
            self.fail(str(error))
            raise Refused(f"the update cannot be stored: {error}", "retry") from error
        if isinstance(judged, Accepted):
            self._spool.keep(header.contribution, file)
            self._collected_changed()
        else:
            path.unlink(missing_ok=True)
        return judged

    async def _judged(
        self, collector: Collector, stream: Stream, header: PushUpdate, ticket: int, path: Path, file: bridge.FileRef
    ) -> Accepted | Verdict:
        try:
            await receive_file(
                stream,
                path,
                size=file.bytes,
                digest=file.digest,
                algorithm=DIGEST_ALGORITHM,
                runtime=self.context.runtime,
            )
            judged = collector.landed(ticket)
            if isinstance(judged, Screening):
                judged = collector.screened(ticket, await self._screen(ticket, header.round, file))
        except BaseException:
            collector.lost(ticket)
            raise
        return judged

    def _prepare(self, collector: Collector) -> None:
        """Have the executor begin, once everybody's update is here or on its way."""
        foreseen = collector.foreseen()
        if foreseen is None or not foreseen.inputs:
            return
        prepare = self._spool.prepare(foreseen, self.round_trace())
        if prepare != self._prepared:
            self._prepared = prepare
            self.emit(prepare)

    async def _screen(self, ticket: int, round_pushed: int, file: bridge.FileRef) -> str | None:
        self.owed.owe(("screen", ticket))
        self._awaited.add(ticket)
        try:
            self.emit(bridge.Screen(ticket=ticket, round=round_pushed, file=file, traceparent=inject()))
            await self.until(lambda: ticket in self._screenings)
            return self._screenings[ticket]
        finally:
            self._awaited.discard(ticket)
            self._screenings.pop(ticket, None)

    def _note_refusal(self, header: PushUpdate, reason: str) -> None:
        log.warn("Update refused", worker=header.contribution.peer_id, round=header.round, reason=reason)

    # --- closing --------------------------------------------------------------------------------------------------

    async def close_round(self, request: CloseRound, peer_id: str) -> Merged | Merging:
        """Merge what the scheduler names; answered Merging when it takes longer than MERGE_ANSWER_S."""
        answer = self._close(request, peer_id)
        with trio.move_on_after(MERGE_ANSWER_S):
            while isinstance(answer, Merging):
                await self.changed()
                answer = self._close(request, peer_id)
        return answer

    def _close(self, request: CloseRound, peer_id: str) -> Merged | Merging:
        if self._collector is None:
            raise Refused("the initial state is not here yet", "retry")
        answer = self._collector.close(request, peer_id)
        if isinstance(answer, MergePlan):
            self._merge(answer)
            return Merging(round=request.round, close=request.close)
        if isinstance(answer, Verdict):
            raise refusal(answer)
        return answer

    def _merge(self, plan: MergePlan) -> None:
        self._spool.forget(plan.drop)
        self._plans[plan.round, plan.close] = plan.base_digest
        self.owed.owe(("merge", plan.round, plan.close))
        self.emit(self._spool.merge(plan))

    # --- what is held ---------------------------------------------------------------------------------------------

    def holds(self, digest: str) -> bool:
        """Whether a file of this digest can be fetched here."""
        return digest in self._artifacts

    async def serve_model(self, stream: Stream, header: FetchModel) -> None:
        """Send a file of this job's to whoever works on it."""
        peer_id, view = stream.peer.peer_id, self.view
        working = () if view is None else (*view.members, *view.followers, *view.servers)
        if peer_id != self.context.scheduler and all(peer_id != lease.peer_id for lease in working):
            raise Refused(f"{peer_id} does not work on this job as far as is known here", "retry")
        held = self._artifacts.get(header.digest)
        if held is None:
            raise Refused(f"{header.part} {header.digest[:12]} of round {header.round} is not held here", "retry")
        _, file = held
        if peer_id == self.context.scheduler:  # it stores the step, which the workers must not wait for
            await self._broadcast.delivered()
        try:
            path = self.file(file.path)
        except RemoteProtocolError as error:
            raise Refused(f"{header.part} of round {header.round} is gone", "retry") from error
        await serve_artifact(stream, header, path, size=file.bytes, runtime=self.context.runtime)

    # --- the executor ---------------------------------------------------------------------------------------------

    async def fetch(self, request: bridge.Fetch) -> bridge.Fetched:
        """Answer the executor's wish for a file."""
        with extracted(request.traceparent or self.round_trace()), span(type(request).__name__):
            match request:
                case bridge.FetchSource():
                    return await self.waiting(self.fetch_source(request))
                case bridge.FetchResume():
                    return await self.waiting(fetch_resume(self.context, self.job_epoch, self.backoff()))
                case bridge.FetchHeldOut():
                    # From the evaluating thread: the main one owes what it owes.
                    return await self.fetch_held_out(request)
                case bridge.FetchOthers():
                    return await fetch_others(self, request)
                case _:
                    raise RemoteProtocolError(f"an aggregate executor does not fetch {type(request).__name__}")

    async def send(self, request: bridge.Send) -> bridge.Sent:
        """Refuse: a parameter server pushes nothing."""
        raise RemoteProtocolError(f"an aggregate executor does not send {type(request).__name__}")

    async def report(self, report: bridge.Report) -> bridge.Instruction:
        """Take note of an answer."""
        self.owed.heard()
        match report:
            case bridge.StateReady():
                self._state_ready(report)
            case bridge.Screened():
                self._screened(report)
            case bridge.UpdateMade():
                self._update_made(report)
                self.wake()
                # The executor goes on to what nobody waits for, and would take cores and memory from the sending.
                await self._broadcast.delivered(KEEP_WAIT_S + report.update.bytes / KEEP_BYTES_PER_S)
            case bridge.MergeDone():
                self._merge_done(report)
            case bridge.MergeFailed():
                self._merge_failed(report)
            case bridge.EvaluationDone():
                self._evaluation_done(report)
            case bridge.ExecutorFailed():
                self.gave_up(report)
            case _:
                raise RemoteProtocolError(f"an aggregate executor does not report {type(report).__name__}")
        self.wake()
        return bridge.Finish() if self.stopped else bridge.GoOn()

    def _screened(self, report: bridge.Screened) -> None:
        self.owed.settle(("screen", report.ticket))
        if report.ticket in self._awaited:  # else whoever pushed it has gone
            self._screenings[report.ticket] = report.refusal

    def _state_ready(self, report: bridge.StateReady) -> None:
        if self._collector is not None:
            raise RemoteProtocolError("the initial state was ready before")
        self.owed.settle()
        self._hold(report.round, report.model, report.momentum)
        self._collector = Collector(
            self.context.job.job_id,
            self.me,
            round=report.round,
            model_digest=report.model.digest,
            momentum_digest=report.momentum.digest,
            shard=self.context.job.shard,
        )
        self._tell_ready()
        if self._pending_view is not None:
            self.observe(*self._pending_view)
            self._pending_view = None

    def _tell_ready(self) -> None:
        """Say what is held, unless the newest view counts on it: at first, and to a scheduler that came up again."""
        held = self._collector
        if held is None or (self.view is not None and self.me in self.view.servers):
            return
        ready = Ready(
            job_id=self.context.job.job_id,
            job_epoch=self.job_epoch,
            round=held.round,
            lease_id=self.context.lease_id,
            fence=self.context.fence,
            digest=held.model_digest,
            momentum_digest=held.momentum_digest,
        )
        self.tell("ready", ready)

    @property
    def me(self) -> Member:
        """This server's own lease."""
        context = self.context
        return Member(peer_id=context.network.peer_id, fence=context.fence, lease_id=context.lease_id)

    def _hold(self, made_in: int, *files: bridge.FileRef) -> None:
        for file in files:
            self.file(file.path)
            self._artifacts[file.digest] = (made_in, file)

    def _merge_done(self, report: bridge.MergeDone) -> None:
        self.owed.settle(("merge", report.round, report.close))
        base_digest = self._plans.pop((report.round, report.close), None)
        if base_digest is None or self._collector is None:
            raise RemoteProtocolError(f"close {report.close} of round {report.round} was not asked for")
        merged = merged_of(report, base_digest)
        if self._collector.merge_done(merged):
            self._hold(report.round, report.model, report.momentum, report.record, report.update)
            self._announce(report, base_digest)
            self._collected_changed()

    def _update_made(self, report: bridge.UpdateMade) -> None:
        """Whoever trains need not wait until the rest of the merge, which makes it durable, is there, too."""
        self.owed.heard()
        base_digest = self._plans.get((report.round, report.close))
        if base_digest is None or self._collector is None:
            raise RemoteProtocolError(f"close {report.close} of round {report.round} was not asked for")
        if self._collector.awaits(report.round, report.close):
            self._announce(report, base_digest)

    def _announce(self, made: bridge.UpdateMade | bridge.MergeDone, base_digest: str) -> None:
        path = self.file(made.update.path)
        self._broadcast.announce(outgoing_of(made, base_digest), path, made.traceparent or self.round_trace())

    def _merge_failed(self, report: bridge.MergeFailed) -> None:
        if self._collector is None:
            raise RemoteProtocolError("a merge before the initial state")
        self.owed.settle(("merge", report.round, report.close))
        self._plans.pop((report.round, report.close), None)
        log.warn("Merge failed", round=report.round, close=report.close, reason=report.reason)
        self._collector.merge_failed(report.round, report.close, report.reason)

    def _evaluation_done(self, report: bridge.EvaluationDone) -> None:
        evaluated = Evaluated(
            job_id=self.context.job.job_id,
            job_epoch=self.job_epoch,
            round=report.round,
            lease_id=self.context.lease_id,
            fence=self.context.fence,
            digest=report.digest,
            loss=report.loss,
            samples=report.samples,
        )
        self.tell(f"evaluated {report.round}", evaluated)
