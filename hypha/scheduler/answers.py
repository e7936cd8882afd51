"""The scheduler's answers to workers and parameter servers: each message is judged, noted, answered.

SliceRequest ─▶ grant ─▶ journal ─▶ SliceGrant | NoMore          Progress ─▶ forecast ─▶ Continue | SyncAfter | Done
Ready ─▶ counted from the next view                              Collected ─▶ tally ─▶ decide
Evaluated ─▶ noted                                               JobStatus ─▶ lease released, replaced
"""

from typing import Any

import hypha
from hypha.errors import Refused
from hypha.network.artifacts import serve_artifact
from hypha.network.seam import Peer, Stream
from hypha.protocol.messages import (
    Ack,
    Collected,
    Continue,
    Done,
    Evaluated,
    FetchModel,
    Health,
    HealthReport,
    JobStatus,
    Member,
    NoMore,
    Progress,
    Ready,
    RoundMessage,
    SliceGrant,
    SliceRequest,
    SyncAfter,
)
from hypha.protocol.slices import Grant, Later
from hypha.protocol.views import Part, Verdict
from hypha.scheduler.coordinator import Coordinator
from hypha.scheduler.pool import LeasedWorker
from hypha.scheduler.records import Granted
from hypha.telemetry import get_logger, metrics

log = get_logger("scheduler")

WORKERS = frozenset({"worker"})
TRAINING = (Part.MEMBER, Part.FOLLOWER)


class Answers:
    """Handlers of one job's messages; `register` puts them on the network."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._job = coordinator

    def register(self) -> None:
        """Serve everything that workers ask of a scheduler."""
        network = self._job.network
        network.serve(SliceRequest, self._slice_request, roles=WORKERS)
        network.serve(Progress, self._progress, roles=WORKERS)
        network.serve(Ready, self._ready, roles=WORKERS)
        network.serve(Collected, self._collected, roles=WORKERS)
        network.serve(Evaluated, self._evaluated, roles=WORKERS)
        network.serve(JobStatus, self._job_status, roles=WORKERS)
        network.serve(Health, self._health)
        network.accept_streams(FetchModel, self._fetch_model, roles=WORKERS)

    def _worker(self, peer: Peer, lease_id: str, fence: int) -> LeasedWorker:
        worker = self._job.pool.by_lease(lease_id)
        if worker is None or (worker.member.peer_id, worker.member.fence) != (peer.peer_id, fence):
            raise Refused(f"lease {lease_id} (fence {fence}) of {peer.peer_id} is not held here")
        return worker

    def _counted(self, peer: Peer, message: RoundMessage[Any], parts: tuple[Part, ...]) -> Member:
        """Return the sender's lease, if the newest view lets its message take effect."""
        worker = self._worker(peer, message.lease_id, message.fence)
        verdict = self._job.book.check(message, peer.peer_id, parts)
        if verdict is not None:
            raise _refusal(verdict)
        return worker.member

    # --- samples and progress -------------------------------------------------------------------------------------

    async def _slice_request(self, peer: Peer, message: SliceRequest) -> SliceGrant | NoMore:
        job = self._job
        member = self._counted(peer, message, TRAINING)
        if member not in job.book.members:
            raise Refused("not counted yet: the view that has this worker as a member is on its way", "retry")
        wanted = min(message.wanted, job.pace.grant_size(member, message.round, job.runtime.now()))
        interval = job.book.grant(member, request=message.request, wanted=wanted)
        if isinstance(interval, Later):
            raise Refused(interval.reason, "retry")
        if interval is None:
            return NoMore(round=message.round)
        grant = Grant(member=member, round=message.round, request=message.request, interval=interval)
        await job.runtime.run_blocking(job.store.note, Granted(grant=grant))
        metrics.SLICES_ALLOCATED.add(1)
        return SliceGrant(round=message.round, interval=interval, slice=job.book.table.slices[interval.slice])

    async def _progress(self, peer: Peer, message: Progress) -> Continue | SyncAfter | Done:
        job = self._job
        if job.book.final:
            return Done()
        member = self._counted(peer, message, TRAINING)
        batches = job.pace.observe(member, message, job.runtime.now())
        return Continue() if batches is None else SyncAfter(round=message.round, batches=batches)

    async def _ready(self, peer: Peer, message: Ready) -> Ack:
        job = self._job
        worker = self._worker(peer, message.lease_id, message.fence)
        if message.job_epoch != job.book.job_epoch:
            raise Refused(f"job epoch {message.job_epoch} is not {job.book.job_epoch}")
        if worker.work == "aggregate":
            reason = job.book.server_ready(
                worker.member,
                worker.addresses,
                round=message.round,
                digest=message.digest,
                momentum_digest=message.momentum_digest,
            )
            if reason is not None:
                raise Refused(reason, "retry")
            job.server_ready(worker.member, message)
        else:
            reason = job.book.worker_ready(worker.member, round=message.round, digest=message.digest)
            if reason is not None:
                raise Refused(reason)
        job.wake()
        return Ack()

    # --- parameter servers ----------------------------------------------------------------------------------------

    async def _collected(self, peer: Peer, message: Collected) -> Ack:
        job = self._job
        self._worker(peer, message.lease_id, message.fence)
        found = job.book.collected(message, peer.peer_id)
        if isinstance(found, Verdict):
            raise _refusal(found)
        for exclude in found:
            log.warn("Contribution excluded", worker=exclude.peer_id, round=exclude.round, reason=exclude.reason)
        job.exclude(found)
        for contribution in message.contributions:
            job.pace.contributed(contribution)
        job.wake()
        return Ack()

    async def _evaluated(self, peer: Peer, message: Evaluated) -> Ack:
        job = self._job
        self._worker(peer, message.lease_id, message.fence)
        if message.round not in job.progress.held_out:
            job.progress.held_out[message.round] = message.loss
            log.info("Held-out loss", round=message.round, loss=message.loss, samples=message.samples)
        job.wake()
        return Ack()

    async def _fetch_model(self, stream: Stream, header: FetchModel) -> None:
        job = self._job
        if not any(w.work == "aggregate" and w.member.peer_id == stream.peer.peer_id for w in job.pool.live()):
            raise Refused(f"{stream.peer.peer_id} serves no parameters of this job")
        path = await job.runtime.run_blocking(job.store.find, header.part, header.round, header.digest)
        if path is None:
            raise Refused(f"{header.part} {header.digest[:12]} of round {header.round} is not stored here")
        size = (await job.runtime.run_blocking(path.stat)).st_size
        await serve_artifact(stream, header, path, size=size, runtime=job.runtime)

    # --- jobs and health ------------------------------------------------------------------------------------------

    async def _job_status(self, peer: Peer, message: JobStatus) -> Ack:
        job = self._job
        worker = self._worker(peer, message.lease_id, message.fence)
        if not message.finished and not job.book.final:
            job.failed(worker, message.reason, message.last_lines)
            job.died(worker, f"its executor failed: {message.reason}")
            await job.pool.release(worker, "executor failed")
        return Ack()

    async def _health(self, _peer: Peer, _message: Health) -> HealthReport:
        job = self._job
        book = job.book
        live = job.pool.live()
        return HealthReport(
            peer_id=job.network.peer_id,
            role="scheduler",
            version=hypha.__version__,
            uptime_s=job.runtime.now() - job.progress.started_at,
            detail={
                "job": book.terms.job_id,
                "job_epoch": str(book.job_epoch),
                "round": f"{book.round} of {book.terms.updates}",
                "committed": str(book.committed_round),
                "samples": str(book.samples),
                "leases": ", ".join(f"{w.work} {w.member.peer_id} fence {w.member.fence}" for w in live),
                "waiting": job.waiting,
                "last_failure": job.failures[-1] if job.failures else "",
            },
        )


def _refusal(verdict: Verdict) -> Refused:
    return Refused(verdict.reason, "retry" if verdict.retry else "refused")
