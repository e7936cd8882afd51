"""A training job as its worker sees it: bases and slices come in, updates and progress go out.

    scheduler ◀─ SliceRequest, Progress, Ready ─┐                      ┌─ FetchBase, FetchSamples ─ executor
                                                TrainSession ◀─────────┤
    parameter servers ◀─ PushUpdate, FetchModel ┘      ▲               └─ SendUpdate, TrainProgress
                              └── OuterUpdate ─────────┘ ── UpdateArrived ──▶ executor

The executor's reports are answered from what is known here; they travel to the scheduler in the background.
"""

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.network.seam import Stream
from hypha.network.transfer import send_file
from hypha.protocol import bridge
from hypha.protocol.messages import (
    Accepted,
    Contribution,
    Done,
    Member,
    Message,
    OuterUpdate,
    PartRef,
    Progress,
    PushUpdate,
    Ready,
    Rebase,
    Request,
    RoundView,
    SyncAfter,
    UpdateRefused,
)
from hypha.protocol.shards import whole_digest
from hypha.protocol.views import Ordered, order_of, server_of
from hypha.telemetry import extracted, get_logger, inject, metrics, span
from hypha.worker.arrivals import Arrivals, discard
from hypha.worker.redelivery import Redelivery
from hypha.worker.samples import Samples
from hypha.worker.session import JobContext, Session
from hypha.worker.shares import base_of
from hypha.worker.together import together

log = get_logger("worker.trainer")


class TrainSession(Session):
    """The worker's half of one training executor."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self._instruction: bridge.Instruction = bridge.GoOn()
        self._arrivals = Arrivals(self)
        self._pushed_to: tuple[Member, ...] = ()
        self._redelivery = Redelivery(self, self._push, lambda: self._pushed_to)
        self._samples = Samples(self)
        self._newest: bridge.SendUpdate | None = None
        self._promised: tuple[int, str, Ordered] | None = None  # round and base an outer update leads to; the view then

    async def run(self) -> None:
        """Send what the executor reports, until cancelled. Raises JobFailed when the executor has failed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch)
            nursery.start_soon(self.outbox.run)
            nursery.start_soon(self._redelivery.run)

    # --- fetch ----------------------------------------------------------------------------------------------------

    async def fetch(self, request: bridge.Fetch) -> bridge.Fetched:
        """Answer the executor's wish for a file; it owes us nothing while it waits."""
        with extracted(request.traceparent or self.round_trace()), span(type(request).__name__):
            return await self.waiting(self._fetch(request))

    async def _fetch(self, request: bridge.Fetch) -> bridge.Fetched:
        match request:
            case bridge.FetchBase():
                return await self._fetch_base()
            case bridge.FetchSamples():
                return await self._samples.fetch(request)
            case bridge.FetchSource():
                return await self.fetch_source(request)
            case bridge.FetchHeldOut():
                return await self.fetch_held_out(request)
            case bridge.FetchResume() | bridge.FetchOthers():
                raise RemoteProtocolError("a training executor fetches the base, nothing else of a model")

    async def _fetch_base(self) -> bridge.BaseFetched:
        """Fetch the newest view's base, each shard from its server, starting over as soon as the view moves on."""
        backoff = self.backoff()
        while True:
            await self.until(lambda: self.view is not None)
            view = self.view
            assert view is not None
            parts = view.parts or (view.base_digest,)
            name = self.context.directory / f"model-{view.round - 1}"
            paths = [Path(f"{name}-{shard}-{part[:16]}.safetensors") for shard, part in enumerate(parts)]
            files = await self.while_wanted(partial(self._try_fetch, view, paths), partial(self._stands, view))
            if not self._stands(view):
                for path in paths:
                    await self.context.runtime.run_blocking(discard, path)
            elif files is not None:
                return bridge.BaseFetched(
                    round=view.round, digest=view.base_digest, files=files, traceparent=view.traceparent
                )
            else:
                await self.pause(backoff)

    def _stands(self, view: RoundView) -> bool:
        """Whether what was begun under `view` is still to the point: the same base, held by the same servers."""
        newest = self.view
        return newest is not None and _aim(newest) == _aim(view)

    async def _try_fetch(self, view: RoundView, paths: list[Path]) -> tuple[bridge.FileRef, ...] | None:
        """Return every shard's file; None where one is not to be had now."""
        files = await together([partial(self._try_fetch_part, view, shard, path) for shard, path in enumerate(paths)])
        found = tuple(file for file in files if file is not None)
        return found if len(found) == len(files) else None

    async def _try_fetch_part(self, view: RoundView, shard: int, path: Path) -> bridge.FileRef | None:
        server, wanted = server_of(view, shard), base_of(view, shard)
        if server is None or wanted is None:
            return None
        try:
            return await self.context.bring(server.peer_id, wanted, path)
        except (PeerUnreachable, RemoteProtocolError) as error:
            log.info("Base not fetched yet", server=server.peer_id, round=view.round, reason=str(error))
            return None

    def _goes_on_with(self, view: RoundView, wanted: Callable[[], bool]) -> bool:
        return self._stands(view) and wanted() and not self.stopped

    # --- send -----------------------------------------------------------------------------------------------------

    async def send(self, request: bridge.Send) -> bridge.Sent:
        """Push an update to every parameter server; retried until they answer or the round has moved on."""
        started, self._newest = self.context.runtime.now(), request
        self.wake()  # one that is still under way is given up for it
        with extracted(request.traceparent or self.round_trace()), span("push_update", round=request.round) as pushing:
            answer = await self.waiting(self._push(request, wanted=lambda: self._newest is request))
            pushing.set(answer=type(answer).__name__)
        metrics.GRADIENT_TRANSMISSION_TIME.record(self.context.runtime.now() - started)
        if isinstance(answer, bridge.SendAccepted):
            self.owed.settle()  # it waits for the round to close, however long that takes
            self._redelivery.delivered(request)
        return answer

    async def _push(
        self,
        request: bridge.SendUpdate,
        held: tuple[Member, ...] = (),
        *,
        wanted: Callable[[], bool] = lambda: True,
    ) -> bridge.Sent:
        """Deliver an update to every shard's server but those that hold it already."""
        paths = [self.file(file.path) for file in request.files]
        if len(paths) != self.context.job.shards:
            raise RemoteProtocolError(f"an update in {len(paths)} files for {self.context.job.shards} shards")
        backoff, holders = self.backoff(), set(held)
        while not self.stopped:
            view = self.view
            if view is None:
                raise RemoteProtocolError("an update before there was a view")
            if wanted() and self._promised == (request.round, request.base_digest, order_of(view)):
                await self.changed()  # the view that opens this round is on its way
                continue
            if (view.round, view.base_digest) != (request.round, request.base_digest) or not wanted():
                return bridge.SendRebase(round=view.round, base_digest=view.base_digest)
            pushing = partial(self._push_to_all, view, request, paths, holders)
            stands = partial(self._goes_on_with, view, wanted)
            answer: bridge.Sent | None = await self.while_wanted(pushing, stands)
            if answer is not None:
                self._pushed_to = view.servers
                return answer
            if stands():
                await self.pause(backoff)
        return bridge.SendRefused(reason="the job is over")

    async def _push_to_all(
        self, view: RoundView, request: bridge.SendUpdate, paths: list[Path], holders: set[Member]
    ) -> bridge.Sent | None:
        """Return an answer that is not Accepted, else Accepted; None when it is worth another attempt."""
        lacking = [
            (server, shard)
            for server, shard in zip(view.servers, view.shards or (0,), strict=False)
            if server not in holders
        ]
        answers = await together(
            [partial(self._push_to, view, request, server, shard, paths[shard]) for server, shard in lacking]
        )
        holders.update(
            server
            for (server, _), answer in zip(lacking, answers, strict=True)
            if isinstance(answer, bridge.SendAccepted)
        )
        final = next((answer for answer in answers if isinstance(answer, bridge.SendRebase | bridge.SendRefused)), None)
        if final is not None:
            return final
        return bridge.SendAccepted() if len(holders.intersection(view.servers)) == len(paths) else None

    async def _push_to(
        self, view: RoundView, request: bridge.SendUpdate, server: Member, shard: int, path: Path
    ) -> bridge.Sent | None:
        try:
            answer = await self._push_part(view, server, request, shard, path)
        except (PeerUnreachable, RemoteProtocolError) as error:
            log.info("Update not delivered yet", round=request.round, server=server.peer_id, reason=str(error))
            return None
        match answer:
            case Accepted():
                return bridge.SendAccepted()
            case Rebase() as rebase:
                return bridge.SendRebase(round=rebase.round, base_digest=rebase.base_digest)
            case UpdateRefused() as refused:
                log.warn("Update refused", round=request.round, server=server.peer_id, reason=refused.reason)
                return bridge.SendRefused(reason=refused.reason)
            case other:
                log.warn("Update answered badly", server=server.peer_id, answer=type(other).__name__)
                return None

    async def _push_part(
        self, view: RoundView, server: Member, request: bridge.SendUpdate, shard: int, path: Path
    ) -> Message:
        context, files = self.context, request.files
        header = PushUpdate(
            job_id=view.job_id,
            job_epoch=view.job_epoch,
            view=view.view,
            round=request.round,
            lease_id=context.lease_id,
            fence=context.fence,
            contribution=self._describe(request),
            shard=shard,
            parts=tuple(PartRef(bytes=f.bytes, digest=f.digest) for f in files) if len(files) > 1 else (),
            traceparent=inject(),
        )
        with trio.move_on_after(context.transfers.stall_s) as patience:
            stream = await context.network.open_stream(server.peer_id, header)
            try:
                patience.deadline = float("inf")  # the transport finds a transfer that stands still
                await send_file(stream, path, offset=0, length=files[shard].bytes, runtime=context.runtime)
                await stream.send_eof()
                return await stream.receive_message(Message)
            finally:
                await stream.aclose()
        raise PeerUnreachable(f"{server.peer_id} did not take an update within {context.transfers.stall_s:g} s")

    def _describe(self, request: bridge.SendUpdate) -> Contribution:
        return Contribution(
            peer_id=self.context.network.peer_id,
            fence=self.context.fence,
            lease_id=self.context.lease_id,
            round=request.round,
            base_digest=request.base_digest,
            digest=whole_digest([file.digest for file in request.files], sha256),
            bytes=sum(file.bytes for file in request.files),
            samples=request.samples,
            intervals=request.intervals,
            loss=request.loss,
        )

    # --- reports --------------------------------------------------------------------------------------------------

    async def report(self, report: bridge.Report) -> bridge.Instruction:
        """Take note and answer with the newest instruction."""
        self.owed.heard()
        match report:
            case bridge.TrainProgress():
                self._note_progress(report)
            case bridge.BaseReady():
                self.owed.owe()
                self._note_ready(report)
            case bridge.ExecutorFailed():
                self.gave_up(report)
            case _:
                raise RemoteProtocolError(f"a training executor does not report {type(report).__name__}")
        if self.leaving and isinstance(report, bridge.TrainProgress):
            return bridge.SyncAt(round=report.round, batches=report.batches)
        return bridge.Finish() if self.stopped else self._instruction

    def _note_progress(self, report: bridge.TrainProgress) -> None:
        view = self.view
        if view is None:
            raise RemoteProtocolError("progress before there was a view")
        progress = Progress(
            job_id=view.job_id,
            job_epoch=view.job_epoch,
            round=report.round,
            lease_id=self.context.lease_id,
            fence=self.context.fence,
            batches=report.batches,
            samples=report.samples,
            batch_size=report.batch_size,
            batch_s=report.batch_s,
            loss=report.loss,
        )
        self.tell("progress", progress)

    def _note_ready(self, report: bridge.BaseReady) -> None:
        view = self.view
        if view is None or not report.round:
            raise RemoteProtocolError(f"ready for round {report.round} before there was a view of it")
        ready = Ready(
            job_id=view.job_id,
            job_epoch=view.job_epoch,
            round=report.round - 1,
            lease_id=self.context.lease_id,
            fence=self.context.fence,
            digest=report.digest,
        )
        self.tell("ready", ready)

    def answered(self, _peer_id: str, _message: Request[Any], answer: Message) -> None:
        """Keep the newest instruction for the executor."""
        if isinstance(answer, SyncAfter):
            self._instruction = bridge.SyncAt(round=answer.round, batches=answer.batches, batch_size=answer.batch_size)
        elif isinstance(answer, Done):
            self.stop("the scheduler says that the job is done")

    def gave_all(self) -> bool:
        """Whether the open round has this executor's contribution, or expects none."""
        view, me = self.view, self.context.lease_id
        return view is None or self._redelivery.covers(view) or me not in {m.lease_id for m in view.members}

    # --- outer updates --------------------------------------------------------------------------------------------

    async def receive_update(self, stream: Stream, header: OuterUpdate) -> None:
        """Take an outer update from a parameter server and hand it to the executor, once all shards' are here."""
        await self._arrivals.receive(stream, header)

    def emit(self, event: bridge.Event) -> None:
        """Queue an event for the executor. An outer update says which round will open, maybe before its view does."""
        view = self.view
        if isinstance(event, bridge.UpdateArrived) and view is not None and view.round == event.round:
            self._promised = (event.round + 1, event.model_digest, order_of(view))
        super().emit(event)


def _aim(view: RoundView) -> tuple[int, str, tuple[Member, ...]]:
    return view.round, view.base_digest, view.servers
