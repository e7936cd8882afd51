"""Leads one job through its rounds: `protocol.rounds` decides, this asks, answers, journals and sends.

    workers ── SliceRequest, Progress, Ready, JobStatus ──▶ ┌─────────────┐ ──▶ RoundView, Committed to everyone leased
    servers ── Ready, Collected, Evaluated ───────────────▶ │ Coordinator │ ──▶ CloseRound to the servers
    pool ───── a lease died ──────────────────────────────▶ └─────────────┘ ──▶ Committer: record, chain entry

Nothing that a message does takes effect before the book let it pass (L2), and no grant or exclusion leaves before it is
in the journal (L6).
"""

from collections import deque

import trio
from msgspec.structs import replace

from hypha.errors import JobFailed, PeerUnreachable, Refused
from hypha.network.outbox import Outbox
from hypha.network.retry import Backoff, attempt
from hypha.network.seam import Network
from hypha.protocol.closing import Close, Outcome
from hypha.protocol.messages import CloseRound, Committed, Member, Merging, Ready, RoundView
from hypha.protocol.rounds import RoundBook
from hypha.protocol.tally import Exclude
from hypha.runtime import Runtime
from hypha.scheduler.committer import Committer, Wanted
from hypha.scheduler.pace import Pacing
from hypha.scheduler.pool import LeasedWorker, Pool
from hypha.scheduler.progress import JobProgress
from hypha.scheduler.records import Excluded, LeaseEnded
from hypha.scheduler.store import JobStore
from hypha.telemetry import Span, get_logger, metrics, start_span

log = get_logger("scheduler")

BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
# So many executors failing with no round committed between them is not bad luck.
FAILURES_IN_A_ROW_MAX = 6
FAILURES_KEPT = 32


class Coordinator:
    """One job under one job epoch. `run` until the last round is committed."""

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        *,
        book: RoundBook,
        store: JobStore,
        pool: Pool,
        committer: Committer,
        pace: Pacing,
        patience_s: float,
    ) -> None:
        self.network = network
        self.runtime = runtime
        self.book = book
        self.store = store
        self.pool = pool
        self.pace = pace
        self.progress = JobProgress(runtime.now())
        self.failures: deque[str] = deque(maxlen=FAILURES_KEPT)
        self.waiting = ""
        self.outbox = Outbox(network, backoff=self.backoff, patience_s=patience_s)
        self._committer = committer
        self._patience_s = patience_s
        self._failed_in_a_row = 0
        self._to_journal: list[Exclude] = []
        self._ended: list[Member] = []
        self._sent: tuple[int, bool] | None = None
        self._span: Span = start_span("outer_round", root=True, round=book.round)
        self._wake = trio.Event()
        self.over = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Lead the job to its last round, say so by `over`, and go on answering until cancelled.

        Raises JobFailed when it cannot get there.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.outbox.run)
            task_status.started()
            await self._drive()
            await self._journal()
            self._span.end()
            self._publish()
            self.over.set()
            await trio.sleep_forever()

    def backoff(self) -> Backoff:
        """Return fresh waits."""
        return Backoff(self.runtime, base_s=BACKOFF_S, max_s=BACKOFF_MAX_S)

    # --- changes --------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something happened: send what follows from it, and decide again."""
        self._publish()
        self._wake.set()

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._wake.wait()

    def hired(self, worker: LeasedWorker) -> None:
        """A worker has its job. Trainers follow at once; servers count when they say what they hold."""
        if worker.work == "train":
            self.book.lease_added(worker.member)
        self.wake()

    def died(self, worker: LeasedWorker, reason: str) -> None:
        """A lease is over: go on without it."""
        log.warn(
            "Worker lost",
            worker=worker.member.peer_id,
            lease_id=worker.member.lease_id,
            work=worker.work,
            reason=reason,
        )
        self._to_journal += self.book.lease_died(worker.member)
        self._ended.append(worker.member)
        self.pace.forget(worker.member)
        if not any(other.member.peer_id == worker.member.peer_id for other in self.pool.live()):
            self.outbox.drop(worker.member.peer_id)
        self.wake()

    def failed(self, worker: LeasedWorker, reason: str, last_lines: tuple[str, ...]) -> None:
        """A worker's executor failed while its lease lives."""
        self.failures.append(f"{worker.work} at {worker.member.peer_id}: {reason}")
        log.error(
            "Executor failed",
            worker=worker.member.peer_id,
            work=worker.work,
            reason=reason,
            last_lines="\n".join(last_lines),
        )
        self._failed_in_a_row += 1
        self.wake()

    def exclude(self, found: tuple[Exclude, ...]) -> None:
        """Take exclusions that a rule found: they are journaled, then their samples return."""
        self._to_journal += found

    def server_ready(self, server: Member, message: Ready) -> None:
        """A parameter server holds state: what has no stored copy yet is stored, so that a resume can start there."""
        assert self._nursery is not None
        if message.momentum_digest is not None and self.store.state.round == message.round == 0:
            self._nursery.start_soon(self._keep_initial, server, message.digest, message.momentum_digest)

    async def _keep_initial(self, server: Member, model_digest: str, momentum_digest: str) -> None:
        for part, digest in (("model", model_digest), ("momentum", momentum_digest)):
            await self._committer.keep(Wanted(part=part, round=0, digest=digest), (server,))

    # --- driving --------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        while not self.book.final:
            if self._failed_in_a_row >= FAILURES_IN_A_ROW_MAX:
                raise JobFailed(f"{self._failed_in_a_row} executors failed in a row; the last: {self.failures[-1]}")
            self._wake = trio.Event()
            await self._journal()
            decision = self.book.decide(self.runtime.now())
            if isinstance(decision, Close):
                self._begin_close(decision)
            else:
                self.waiting = decision.reason
                for member in decision.replace:
                    log.debug("Nothing more to come in this round", lease_id=member.lease_id)
            with trio.move_on_after(max(0.01, self.book.deadline - self.runtime.now())):
                await self._wake.wait()
            if self.runtime.now() >= self.book.deadline:
                log.debug("Round past its deadline", round=self.book.round, waiting=self.waiting)

    async def _journal(self) -> None:
        """Write what has to be durable before it takes effect. A store that fails is tried again at the next event."""
        found, self._to_journal = self._to_journal, []
        ended, self._ended = self._ended, []
        if not found and not ended:
            return
        records = [*(LeaseEnded(member=member) for member in ended), *(Excluded(exclude=e) for e in found)]
        await self.runtime.run_blocking(self.store.note, *records)
        for exclude in found:
            returned = self.book.excluded(exclude)
            metrics.SLICES_RETURNED.add(len(returned))

    def _publish(self) -> None:
        """Send the newest view to everybody leased, if it is newer than what was sent."""
        view = self.view()
        if view is None or self._sent == (view.view, view.final):
            return
        if self._sent is None or view.round != self.progress.round_open:
            self.progress.opened(view.round, self.runtime.now())
            if view.round <= self.book.terms.updates:
                log.info("Round opened", round=view.round, view=view.view, members=len(view.members))
        self._sent = (view.view, view.final)
        for peer_id in sorted({lease.peer_id for lease in (*view.members, *view.followers, *view.servers)}):
            self.outbox.put(peer_id, "view", view)

    def view(self) -> RoundView | None:
        """Return the newest view, carrying the trace of its round."""
        view = self.book.view(self.runtime.now())
        return None if view is None else replace(view, traceparent=self._span.traceparent)

    # --- closing --------------------------------------------------------------------------------------------------

    def _begin_close(self, close: Close) -> None:
        assert self._nursery is not None
        self.progress.closing(self.runtime.now())
        for server, request in close.requests:
            traced = replace(request, traceparent=self._span.traceparent)
            self._nursery.start_soon(self._close_at, server, traced)

    async def _close_at(self, server: Member, request: CloseRound) -> None:
        backoff = self.backoff()
        while self.book.pending is not None and self.book.pending.close == request.close:
            try:
                answer = await attempt(self.network, server.peer_id, request, patience_s=self._patience_s)
            except PeerUnreachable:
                await backoff.wait()
                continue
            except Refused as refusal:
                if refusal.code in ("retry", "busy"):
                    await backoff.wait()
                    continue
                log.warn("Close refused", round=request.round, close=request.close, reason=str(refusal))
                self.book.close_refused(request.close, str(refusal))
                self.wake()
                return
            if isinstance(answer, Merging):
                continue
            outcome = self.book.merged(server, answer, self.runtime.now())
            if isinstance(outcome, Outcome):
                self._closed(outcome)
            elif outcome is not None:
                log.warn("Merge not taken", round=request.round, reason=outcome)
            self.wake()
            return

    def _closed(self, outcome: Outcome) -> None:
        assert self._nursery is not None
        self.progress.merged(self.runtime.now())
        closing, self._span = self._span, start_span("outer_round", root=True, round=self.book.round)
        self._nursery.start_soon(self._commit, outcome, tuple(sorted(self.book.servers)), closing)

    async def _commit(self, outcome: Outcome, servers: tuple[Member, ...], traced: Span) -> None:
        with traced.current():
            durable = await self._committer.commit(outcome, servers)
        if durable:
            self._committed(outcome)
            traced.set(samples=outcome.samples, contributors=len(outcome.contributions))
        else:
            traced.fail("lost before it was durable")
            log.warn("Outer step lost", round=outcome.round)
            self._to_journal += self.book.lost(outcome.round, self.runtime.now())
        traced.end()
        self.wake()

    def _committed(self, outcome: Outcome) -> None:
        merged = outcome.merged[0]
        self.book.committed(outcome.round)
        self._failed_in_a_row = 0
        self.progress.committed(outcome, self.runtime.now())
        metrics.SYNC_EVENTS.add(1)
        log.info("Round committed", **self.progress.last(), samples_total=self.book.samples)
        message = Committed(
            job_id=self.book.terms.job_id,
            job_epoch=self.book.job_epoch,
            round=outcome.round,
            digest=merged.model_digest,
            traceparent=self._span.traceparent,
        )
        for peer_id in sorted({worker.member.peer_id for worker in self.pool.live()}):
            self.outbox.put(peer_id, "committed", message)
