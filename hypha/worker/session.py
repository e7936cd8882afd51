"""What a job's session has whatever the job is: its lease, its newest view, its events, its patience.

    network ── RoundView, Committed, streams ──▶ Session ── events ──▶ executor
    executor ── fetch, send, report ──▶ Session ── requests, streams ──▶ network

`TrainSession` and `AggregateSession` add the two kinds of work. A session never outlives its lease: whoever runs it
cancels it, and then ends it, which lets everybody go who waits in it on behalf of another peer.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import trio
from msgspec import Struct
from msgspec.structs import replace

from hypha.errors import HyphaError, JobFailed, Refused, RemoteProtocolError
from hypha.network.artifacts import fetch_artifact
from hypha.network.breaker import Breakers
from hypha.network.fetch import Providers, fetch_slice
from hypha.network.outbox import Outbox
from hypha.network.retry import Backoff, insist
from hypha.network.seam import Network
from hypha.protocol.bridge import (
    Event,
    ExecutorFailed,
    FetchHeldOut,
    FetchSource,
    FileRef,
    HeldOutFetched,
    RoundCommitted,
    SourceFetched,
    Stop,
    ViewChanged,
)
from hypha.protocol.job import JobSpec
from hypha.protocol.messages import Committed, FetchModel, Message, Request, RoundView, SliceRef
from hypha.protocol.views import ViewGuard, refusal
from hypha.runtime import Runtime
from hypha.telemetry import Kind, forward, get_logger, metrics
from hypha.worker.cache import SliceCache
from hypha.worker.config import TransferConfig
from hypha.worker.owed import Owed
from hypha.worker.sources import fetch_source

log = get_logger("worker.session")
R = TypeVar("R", bound=Message)
T = TypeVar("T")

# A round makes a handful of events; an executor this far behind does not read at all.
EVENTS_BUFFERED_MAX = 1024


class JobContext(Struct, frozen=True, kw_only=True):
    """What a session works with; (lease_id, fence, job_epoch) go into everything it sends."""

    network: Network
    runtime: Runtime
    job: JobSpec
    scheduler: str
    lease_id: str
    fence: int
    job_epoch: int
    directory: Path
    transfers: TransferConfig
    cache: SliceCache
    stall_s: float

    async def bring(self, peer_id: str, wanted: FetchModel, path: Path) -> FileRef:
        """Bring a file of tensors into the work directory. Raises what `fetch_artifact` does."""
        size = await fetch_artifact(
            self.network, peer_id, wanted, path, runtime=self.runtime, patience_s=self.transfers.stall_s
        )
        return FileRef(path=path.name, bytes=size, digest=wanted.digest)


class Session:
    """One job on this worker. Subclasses answer `fetch`, `send` and `report`."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.guard = ViewGuard(context.job.job_id)
        self.owed = Owed(context.runtime)
        self.failure: str | None = None
        self.stopped = False
        self.leaving = False
        self.ended = False
        self._events_in, self._events_out = trio.open_memory_channel[Event](EVENTS_BUFFERED_MAX)
        self._changed = trio.Event()
        breakers = Breakers(context.runtime, context.transfers.breaker)
        self.outbox = Outbox(
            context.network,
            backoff=self.backoff,
            patience_s=context.transfers.stall_s,
            answered=self.answered,
            breakers=breakers,
        )
        self._providers = Providers(context.network, context.runtime, context.job.dataset.name, breakers)

    # --- from the network -----------------------------------------------------------------------------------------

    @property
    def view(self) -> RoundView | None:
        """The newest view seen."""
        return self.guard.view

    @property
    def job_epoch(self) -> int:
        """The newest job epoch known: the dispatch's, or that of a scheduler that adopted this lease since."""
        return self.context.job_epoch if self.view is None else max(self.context.job_epoch, self.view.job_epoch)

    def round_trace(self) -> str | None:
        """The trace of the open round."""
        return None if self.view is None else self.view.traceparent

    def observe(self, view: RoundView, peer_id: str) -> None:
        """Take in a view that `peer_id` sent. Raises Refused for a stale one; a known one changes nothing."""
        observed = self.guard.observe(view, peer_id)
        if observed.stale is not None:
            raise Refused(observed.stale, "stale")
        if observed.changed:
            self.announce(view)

    def announce(self, view: RoundView) -> None:
        """Tell the executor, and everybody here who waits, of a new view."""
        me = self.context.lease_id
        for server, addresses in zip(view.servers, view.server_addresses, strict=False):
            self._learn(server.peer_id, addresses)
        self.emit(
            ViewChanged(
                view=view.view,
                round=view.round,
                base_digest=view.base_digest,
                member=any(member.lease_id == me for member in view.members),
                committed_round=view.committed_round,
                final=view.final,
                job_epoch=view.job_epoch,
                traceparent=view.traceparent,
            )
        )
        self.wake()

    def _learn(self, peer_id: str, addresses: bytes) -> None:
        try:
            self.context.network.learn(peer_id, addresses)
        except RemoteProtocolError as error:
            # The view stands whatever its addresses are worth; the peer may be found in another way.
            log.warn("Addresses not learned", peer_id=peer_id, reason=str(error))

    def committed(self, message: Committed, peer_id: str) -> None:
        """Pass on that a round is durable. Raises Refused when `peer_id` is not the scheduler of the epoch."""
        verdict = self.guard.check_scheduler(message.job_epoch, peer_id)
        if verdict is not None:
            raise refusal(verdict)
        self.emit(RoundCommitted(round=message.round, digest=message.digest, traceparent=message.traceparent))

    def wake(self) -> None:
        """Let everybody who waits look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Wait for the next change: a view, a file, an answer of the executor's. Raises Refused once all is over."""
        if self.ended:
            raise Refused(f"job {self.context.job.job_id} is over here", "retry")
        await self._changed.wait()

    def end(self) -> None:
        """Nothing runs any more: let go of peers that still wait for something."""
        self.ended = True
        self.wake()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; it is asked again after each change."""
        while not ready():
            await self.changed()

    # --- to the scheduler -----------------------------------------------------------------------------------------

    def tell(self, key: str, message: Request[Any]) -> None:
        """Send the scheduler this, as part of the open round's trace, until it answers or something newer is told."""
        self.outbox.put(self.context.scheduler, key, replace(message, traceparent=self.round_trace()))

    def answered(self, _peer_id: str, _message: Request[Any], _answer: Message) -> None:
        """Take the scheduler's answer to what it was told."""

    # --- to the executor ------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Queue an event; an executor that does not read them has failed."""
        try:
            self._events_in.send_nowait(event)
        except trio.WouldBlock:
            self.fail(f"the executor does not read its events: {EVENTS_BUFFERED_MAX} are waiting")

    def stop(self, reason: str) -> None:
        """Tell the executor that the job is over."""
        if not self.stopped:
            self.stopped = True
            self.emit(Stop(reason=reason))
            self.wake()

    def leave(self) -> None:
        """This worker goes: take on nothing more, and give what there is."""
        self.leaving = True
        self.wake()

    def gave_all(self) -> bool:
        """Whether nothing would be lost that this session could still give."""
        return True

    def fail(self, reason: str) -> None:
        """Note why the job fails; whoever runs the session ends it."""
        if self.failure is None:
            self.failure = reason
            self.wake()

    async def events(self) -> AsyncIterator[Event]:
        """Yield what was queued, and go on until the job ends: a stream that ends tells an executor that we are gone.

        So it does not end with Stop. What the executor finishes after that, and its last telemetry, still gets through.
        """
        async for event in self._events_out:
            yield event

    async def telemetry(self, kind: str, body: bytes) -> None:
        """Export an OTLP batch. Raises RemoteProtocolError for a kind that does not exist."""
        if kind not in get_args(Kind):
            raise RemoteProtocolError(f"telemetry is traces, metrics or logs, not {kind!r}")
        forward(kind, body)  # type: ignore[arg-type]  # checked

    def file(self, relative: str) -> Path:
        """Return the path of a file the executor named. Raises RemoteProtocolError when it lies outside."""
        return confined(self.context.directory, relative)

    # --- what both kinds of work fetch ----------------------------------------------------------------------------

    async def fetch_source(self, request: FetchSource) -> SourceFetched:
        """Bring the model's or the preprocessor's repository to this machine."""
        job = self.context.job
        spec = job.model if request.what == "model" else job.preprocessor
        if spec is None:
            raise RemoteProtocolError("this job has no preprocessor")
        return SourceFetched(directory=await self.context.runtime.run_blocking(fetch_source, spec))

    async def fetch_held_out(self, _request: FetchHeldOut) -> HeldOutFetched:
        """Bring every held-out slice into the work directory."""
        refs = self.context.job.dataset.held_out
        paths = [
            await self.slice_path(
                SliceRef(
                    name=ref.name,
                    samples=ref.samples,
                    bytes=ref.bytes,
                    digest=ref.digest,
                    digest_algorithm=ref.digest_algorithm,
                )
            )
            for ref in refs
        ]
        return HeldOutFetched(paths=tuple(paths))

    async def slice_path(self, ref: SliceRef) -> str:
        """Return a verified slice's path in the work directory, from the cache or from whoever provides it."""
        context = self.context

        async def bring(path: Path) -> None:
            started = context.runtime.now()
            await fetch_slice(
                context.network,
                context.runtime,
                self._providers,
                ref,
                path,
                manifest_digest=context.job.dataset.manifest_digest,
            )
            metrics.DATA_FETCH_DURATION.record(context.runtime.now() - started)

        return await context.cache.link(ref, context.directory, bring)

    # --- patience -------------------------------------------------------------------------------------------------

    def backoff(self) -> Backoff:
        """Return fresh waits as this worker's configuration has them."""
        transfers = self.context.transfers
        return Backoff(self.context.runtime, base_s=transfers.backoff_s, max_s=transfers.backoff_max_s)

    async def pause(self, backoff: Backoff) -> None:
        """Wait before another attempt; a change ends it early, since it may be what the attempt lacked."""
        with trio.move_on_after(backoff.next_s()):
            await self.changed()

    async def insist(self, peer_id: str, message: Request[R], still_wanted: Callable[[], bool]) -> R | None:
        """Repeat a request until answered, or until a change makes it unwanted: then None, at once.

        Raises Refused and RemoteProtocolError like `hypha.network.retry.insist`.
        """

        async def asking() -> R | None:
            return await insist(
                self.context.network,
                peer_id,
                message,
                backoff=self.backoff(),
                patience_s=self.context.transfers.stall_s,
                still_wanted=still_wanted,
            )

        return await self.while_wanted(asking, still_wanted)

    async def while_wanted(
        self, operation: Callable[[], Awaitable[T | None]], still_wanted: Callable[[], bool]
    ) -> T | None:
        """Await `operation()`; None as soon as a change makes it unwanted. A HyphaError of its own passes as it is."""
        result: T | None = None
        failure: HyphaError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_unwanted, still_wanted, nursery.cancel_scope)
            try:
                result = await operation()
            except HyphaError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    async def _cancel_when_unwanted(self, still_wanted: Callable[[], bool], scope: trio.CancelScope) -> None:
        while still_wanted() and not self.ended:
            await self._changed.wait()
        scope.cancel()

    async def waiting(self, answer: Awaitable[T]) -> T:
        """Await something on the executor's behalf: it owes us nothing meanwhile."""
        with self.owed.answering():
            return await answer

    async def watch(self) -> None:
        """Raise JobFailed when the executor gave up or owes us a word for longer than `stall_s`."""
        stall_s = self.context.stall_s
        while True:
            if self.failure is not None:
                raise JobFailed(self.failure)
            silent_s = self.owed.silent_s()
            if silent_s >= stall_s:
                raise JobFailed(f"the executor was silent for {silent_s:.0f} s (stall_s = {stall_s:g})")
            with trio.move_on_after(max(0.05, (stall_s - silent_s) / 4)):
                await self.changed()

    def gave_up(self, report: ExecutorFailed) -> None:
        """Note an executor's own word that it fails."""
        self.fail(report.reason)


def confined(directory: Path, relative: str) -> Path:
    """Return `directory / relative` when that is a regular file inside it, links resolved; otherwise refuse."""
    root = directory.resolve()
    try:
        path = (root / relative).resolve()
        inside = not Path(relative).is_absolute() and path.is_relative_to(root) and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long, links in a circle, a zero byte
        inside = False
    if not inside:
        raise RemoteProtocolError(f"path {relative[:200]!r} is not a file inside the work directory")
    return path
