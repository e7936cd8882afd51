"""Leads one job through its rounds: `protocol.rounds` decides, this asks, answers, journals and sends.

    workers ── SliceRequest, Progress, Ready, JobStatus ──▶ ┌─────────────┐ ──▶ RoundView, Committed to everyone leased
    servers ── Ready, Collected, Evaluated ───────────────▶ │ Coordinator │ ──▶ CloseRound to the servers
    pool ───── a lease died ──────────────────────────────▶ └─────────────┘ ──▶ Committer: record, chain entry

Nothing that a message does takes effect before the book let it pass (L2), and no grant leaves, nor is what an exclusion
frees granted again, before it is in the journal (L6).
"""

from collections import deque

import trio
from msgspec.structs import replace

from hypha.errors import JobFailed, PeerUnreachable, Refused
from hypha.network.breaker import BreakerLimits, Breakers
from hypha.network.outbox import Outbox
from hypha.network.retry import Backoff, attempt
from hypha.network.seam import Network
from hypha.protocol.closing import Close, Outcome, Waiting
from hypha.protocol.messages import CloseRound, Committed, Member, Merging, Ready, RoundView
from hypha.protocol.rounds import RoundBook
from hypha.protocol.shards import kind_of
from hypha.protocol.tally import Exclude
from hypha.runtime import Runtime
from hypha.scheduler.committer import Committer, Wanted
from hypha.scheduler.pace import Pacing
from hypha.scheduler.pool import LeasedWorker, Pool
from hypha.scheduler.progress import JobProgress
from hypha.scheduler.renewals import TICK_S
from hypha.scheduler.scribe import Scribe
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import JobStore
from hypha.telemetry import Span, get_logger, metrics, start_span

log = get_logger("scheduler")

BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
# So many failures with no round committed between them are not bad luck.
FAILURES_IN_A_ROW_MAX = 6
FAILURES_KEPT = 32
# A worker that leaves says so as soon as its update is delivered; the server's word of that may be a little behind.
LAST_WORD_S = 1.0
# A parameter server that refused to merge, and of which nothing new was heard for so long, is replaced.
REFUSAL_STANDS_S = 5.0


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
        standing: Standing,
        failures_max: int = FAILURES_IN_A_ROW_MAX,
        patience_s: float,
        breaker: BreakerLimits = BreakerLimits(),  # noqa: B008 - frozen
    ) -> None:
        self.network = network
        self.runtime = runtime
        self.book = book
        self.store = store
        self.pool = pool
        self.pace = pace
        self.progress = JobProgress(runtime.now())
        self.failures: deque[str] = deque(maxlen=FAILURES_KEPT)
        self.standing = standing
        self.waiting = ""
        self.scribe = Scribe(runtime, store, standing, noted=self._noted)
        self.breakers = Breakers(runtime, breaker)
        self.outbox = Outbox(network, backoff=self.backoff, patience_s=patience_s, breakers=self.breakers)
        self._committer = committer
        self._patience_s = patience_s
        self._failures_max = failures_max
        self._employed: set[Member] = set()
        self._unstored: set[Member] = set()  # servers whose initial state is not in the store yet
        self.trying: set[Member] = set()  # leases of the last run that may still be adopted
        self.shards: dict[Member, int] = {}  # what each parameter server's lease is for
        self._failed_in_a_row = 0
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
            nursery.start_soon(self.scribe.run)
            task_status.started()
            await self._drive()
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
        self._wake = trio.Event()

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._wake.wait()

    def hired(self, worker: LeasedWorker) -> None:
        """A worker has its job. Trainers follow at once; servers count when they say what they hold."""
        self._employed.add(worker.member)
        if worker.work == "train":
            self.book.lease_added(worker.member)
        # Its job may have run for a while before we heard that it does: views were sent without it.
        self._show(worker.member)
        self.wake()

    def adopted(self, worker: LeasedWorker) -> None:
        """A worker of the incarnation before still holds its lease and its job, and hears of the new job epoch."""
        self._employed.add(worker.member)
        if worker.work == "train":
            self.book.lease_adopted(worker.member)
        self._show(worker.member)
        self.announce_committed()
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
        self.ended(worker.member)

    def ended(self, member: Member) -> None:
        """A lease counts no more, however it ended: what it held returns, and it is not tried after a restart."""
        self.scribe.exclude(self.book.lease_died(member))
        self.scribe.ended(member)
        self._employed.discard(member)
        self.shards.pop(member, None)
        self.pace.forget(member)
        if not any(other.member.peer_id == member.peer_id for other in self.pool.live()):
            self.outbox.drop(member.peer_id)
        self.wake()

    def replace(self, worker: LeasedWorker, reason: str) -> None:
        """Give a living lease back and go on without it; whoever staffs the job finds another."""
        self.pool.drop(worker, reason)
        self.died(worker, reason)

    def failed(self, worker: LeasedWorker, reason: str, last_lines: tuple[str, ...]) -> None:
        """A worker's executor failed while its lease lives: it is replaced, and many in a row fail the job."""
        self.failures.append(
            f"{worker.work} at {worker.member.peer_id}: {reason}" + "".join(f"\n    {line}" for line in last_lines)
        )
        log.error(
            "Executor failed",
            worker=worker.member.peer_id,
            work=worker.work,
            reason=reason,
            last_lines="\n".join(last_lines),
        )
        self._failed_in_a_row += 1
        self.replace(worker, f"its executor failed: {reason}")

    def finished(self, worker: LeasedWorker, reason: str) -> None:
        """A worker's executor exited after the last round: nothing is left to do under its lease."""
        log.info("Worker done", worker=worker.member.peer_id, work=worker.work, reason=reason)
        self.pool.drop(worker, "the job is over")
        self.ended(worker.member)

    async def left(self, worker: LeasedWorker, reason: str) -> None:
        """A worker goes of its own will: nothing failed, and what it contributed counts."""
        key = (worker.member.peer_id, worker.member.fence)
        with trio.move_on_after(LAST_WORD_S if worker.member in self.book.members else 0):
            while key not in self.book.accepted():
                await self.changed()
        if not self.pool.is_live(worker.member):
            return
        log.info("Worker left", worker=worker.member.peer_id, work=worker.work, reason=reason)
        self.pool.drop(worker, reason)
        self.ended(worker.member)

    def exclude(self, found: tuple[Exclude, ...]) -> None:
        """Take exclusions that a rule found: they are journaled, then their samples return."""
        self.scribe.exclude(found)

    def _noted(self, exclude: Exclude) -> None:
        returned = self.book.excluded(exclude)
        metrics.SLICES_RETURNED.add(len(returned))
        self.wake()

    def server_ready(self, server: Member, message: Ready) -> None:
        """A parameter server holds state: what has no stored copy yet is stored, so that a resume can start there."""
        assert self._nursery is not None
        if message.momentum_digest is not None and self.store.state.round == message.round == 0:
            self._unstored.add(server)
            self._nursery.start_soon(self._keep_initial, server, message.digest, message.momentum_digest)

    async def _keep_initial(self, server: Member, model_digest: str, momentum_digest: str) -> None:
        # The model last: it is what a resume looks for, and must not lie there alone.
        for part, digest in (("momentum", momentum_digest), ("model", model_digest)):
            wanted = Wanted(part=kind_of(part, self.shards.get(server, 0)), round=0, digest=digest)
            if not await self._committer.keep(wanted, server):
                return
        self._unstored.discard(server)
        self.wake()

    async def _has_beginning(self, outcome: Outcome) -> bool:
        """Wait until what the first round began with is stored: a record alone leads nowhere. False: it cannot be."""
        while waiting := [server for server in outcome.servers if server in self._unstored]:
            if not all(self.pool.is_live(server) for server in waiting):
                return False
            await self.changed()
        return True

    # --- driving --------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        while not self.book.final:
            if self._failed_in_a_row >= self._failures_max:
                raise JobFailed(f"{self._failed_in_a_row} executors failed in a row; the last: {self.failures[-1]}")
            changed = self._wake
            decision = self.book.decide(self.runtime.now())
            if isinstance(decision, Close):
                self.waiting = f"round {decision.round}: close {decision.close} is being merged"
                self._begin_close(decision)
            else:
                self._wait(decision)
            overdue_in_s = self.book.deadline - self.runtime.now()
            # By whichever clock: waking early only means deciding once more. Past the deadline only events count.
            with trio.move_on_after(max(TICK_S, overdue_in_s) if overdue_in_s > 0 else float("inf")):
                await changed.wait()

    def _wait(self, waiting: Waiting) -> None:
        self.waiting = waiting.reason
        if self.runtime.now() >= self.book.deadline:
            self.standing.note("round", waiting.reason)
        for member in waiting.replace:
            worker = self.pool.by_lease(member.lease_id)
            if worker is not None:
                self.replace(worker, "it can add nothing to the open round, which waits for more")

    def _publish(self) -> None:
        """Send the newest view to everybody leased, if it is newer than what was sent."""
        view = self.view()
        if view is None or self._sent == (view.view, view.final):
            return
        if self._sent is None or view.round != self.progress.round_open:
            self.progress.opened(view.round, self.runtime.now())
            self.standing.clear("round")
            if view.round <= self.book.terms.updates:
                log.info("Round opened", round=view.round, view=view.view, members=len(view.members))
        self._sent = (view.view, view.final)
        # Also to a server that is no part of it yet: under a new job epoch it says what it holds when it hears of it.
        for peer_id in self._peers():
            self.outbox.put(peer_id, "view", view)

    def _show(self, member: Member) -> None:
        view = self.view()
        if view is not None:
            self.outbox.put(member.peer_id, "view", view)

    def _peers(self) -> list[str]:
        return sorted({member.peer_id for member in self._employed})

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
                await self._close_refused(server, request, str(refusal))
                return
            if isinstance(answer, Merging):
                await backoff.wait()
                continue
            outcome = self.book.merged(server, answer, self.runtime.now())
            if isinstance(outcome, Outcome):
                self._closed(outcome)
            elif outcome is not None:
                log.warn("Merge not taken", round=request.round, reason=outcome)
            self.wake()
            return

    async def _close_refused(self, server: Member, request: CloseRound, reason: str) -> None:
        """Another set of contributions or another view may be merged; a server that stays with its no is replaced."""
        if self.book.pending is None or self.book.pending.close != request.close:
            return
        log.warn("Close refused", round=request.round, close=request.close, reason=reason)
        self.book.close_refused(request.close, reason)
        self.wake()
        await self.runtime.sleep(REFUSAL_STANDS_S)
        view, worker = self.view(), self.pool.by_lease(server.lease_id)
        if self.book.pending is None and view is not None and view.view == request.view and worker is not None:
            self.failed(worker, f"close {request.close} of round {request.round} was refused: {reason}", ())

    def _closed(self, outcome: Outcome) -> None:
        assert self._nursery is not None
        self.progress.merged(self.runtime.now())
        closing, self._span = self._span, start_span("outer_round", root=True, round=self.book.round)
        self._nursery.start_soon(self._commit, outcome, closing)

    async def _commit(self, outcome: Outcome, traced: Span) -> None:
        with traced.current():
            durable = await self._has_beginning(outcome) and await self._committer.commit(outcome)
        if durable:
            self._committed(outcome)
            traced.set(samples=outcome.samples, contributors=len(outcome.contributions))
        else:
            traced.fail("lost before it was durable")
            log.warn("Outer step lost", round=outcome.round)
            self.scribe.exclude(self.book.lost(outcome.round, self.runtime.now()))
        traced.end()
        self.wake()

    def _committed(self, outcome: Outcome) -> None:
        self.book.committed(outcome.round)
        self._failed_in_a_row = 0
        self.progress.committed(outcome, self.runtime.now())
        metrics.SYNC_EVENTS.add(1)
        log.info("Round committed", **self.progress.last(), samples_total=self.book.samples)
        self.scribe.committed()
        self.announce_committed()

    def announce_committed(self) -> None:
        """Tell everybody leased what can no longer be lost."""
        digest = self.book.committed_digest
        if not self.book.committed_round or digest is None:
            return
        message = Committed(
            job_id=self.book.terms.job_id,
            job_epoch=self.book.job_epoch,
            round=self.book.committed_round,
            digest=digest,
            parts=parts if len(parts := self.book.servers.models()) > 1 else (),
            traceparent=self._span.traceparent,
        )
        for peer_id in self._peers():
            self.outbox.put(peer_id, "committed", message)
