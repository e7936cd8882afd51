"""The scheduler's answers to workers and parameter servers: each message is judged, noted, answered.

SliceRequest ─▶ grant ─▶ journal ─▶ SliceGrant | NoMore          Progress ─▶ forecast ─▶ Continue | SyncAfter | Done
Ready ─▶ counted from the next view                              Collected ─▶ tally ─▶ decide
Evaluated ─▶ noted                                               JobStatus ─▶ lease released, replaced
"""

from pathlib import Path
from typing import Any

from hypha.errors import Refused, StoreError
from hypha.network.artifacts import serve_artifact
from hypha.network.seam import Network, Peer, Stream
from hypha.protocol.messages import (
    Ack,
    Collected,
    Continue,
    Done,
    Evaluated,
    FetchModel,
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
from hypha.protocol.views import Part, Verdict, refusal
from hypha.scheduler.coordinator import Coordinator
from hypha.scheduler.pool import LeasedWorker
from hypha.scheduler.records import Granted
from hypha.telemetry import get_logger, metrics

log = get_logger("scheduler")

WORKERS = frozenset({"worker"})
TRAINING = (Part.MEMBER, Part.FOLLOWER)


class Answers:
    """Handlers of one job's messages, on the network from the start; before `begin` the answer is "retry".

    A worker that a restarted scheduler has not asked yet must not take "unknown" for an answer. `scratch` is a folder
    for copies of what lies in a remote store.
    """

    def __init__(self, network: Network, scratch: Path) -> None:
        self._coordinator: Coordinator | None = None
        self._scratch = scratch
        network.serve(SliceRequest, self._slice_request, roles=WORKERS)
        network.serve(Progress, self._progress, roles=WORKERS)
        network.serve(Ready, self._ready, roles=WORKERS)
        network.serve(Collected, self._collected, roles=WORKERS)
        network.serve(Evaluated, self._evaluated, roles=WORKERS)
        network.serve(JobStatus, self._job_status, roles=WORKERS)
        network.accept_streams(FetchModel, self._fetch_model, roles=WORKERS)

    def begin(self, coordinator: Coordinator) -> None:
        """From now on answer for this job."""
        self._coordinator = coordinator

    @property
    def _job(self) -> Coordinator:
        if self._coordinator is None:
            raise Refused("the scheduler is starting", "retry")
        return self._coordinator

    def detail(self) -> dict[str, str]:
        """Return what the job is at, for people."""
        job = self._coordinator
        if job is None:
            return {}
        book, live, resources = job.book, job.pool.live(), job.progress
        held_out = resources.held_out
        return {
            "job": book.terms.job_id,
            "job_epoch": str(book.job_epoch),
            "round": f"{book.round} of {book.terms.updates}",
            "committed": str(book.committed_round),
            "samples": str(book.samples),
            "held_out": "" if not held_out else f"{held_out[max(held_out)]:.4f} after round {max(held_out)}",
            "leases": ", ".join(f"{w.work} {w.member.peer_id} fence {w.member.fence}" for w in live),
            "round_waits": job.waiting,
            "last_failure": job.failures[-1] if job.failures else "",
        }

    def _worker(self, peer: Peer, lease_id: str, fence: int) -> LeasedWorker:
        self._job.breakers.worked(peer.peer_id)  # whoever asks can be asked
        worker = self._job.pool.by_lease(lease_id)
        if worker is None and Member(peer_id=peer.peer_id, fence=fence, lease_id=lease_id) in self._job.trying:
            raise Refused(f"lease {lease_id} is being adopted", "retry")
        if worker is None or (worker.member.peer_id, worker.member.fence) != (peer.peer_id, fence):
            raise Refused(f"lease {lease_id} (fence {fence}) of {peer.peer_id} is not held here")
        return worker

    def _counted(
        self, peer: Peer, message: RoundMessage[Any], parts: tuple[Part, ...], *, ahead: bool = False
    ) -> Member:
        """Return the sender's lease, if the newest view lets its message take effect; `ahead`: of the next round."""
        worker = self._worker(peer, message.lease_id, message.fence)
        check = self._job.book.check_lease if ahead else self._job.book.check
        verdict = check(message, peer.peer_id, parts)
        if verdict is not None:
            raise refusal(verdict)
        return worker.member

    # --- samples and progress -------------------------------------------------------------------------------------

    async def _slice_request(self, peer: Peer, message: SliceRequest) -> SliceGrant | NoMore:
        job = self._job
        self._worker(peer, message.lease_id, message.fence)
        if message.job_epoch < job.book.job_epoch:
            raise Refused(f"job epoch {job.book.job_epoch} has begun: its view is on its way", "retry")
        ahead = job.book.is_ahead(message.round)
        member = self._counted(peer, message, TRAINING, ahead=ahead)
        if member not in job.book.members:
            raise Refused("not counted yet: the view that has this worker as a member is on its way", "retry")
        size = job.pace.size_ahead(member) if ahead else job.pace.grant_size(member, message.round, job.runtime.now())
        wanted = min(message.wanted, size)
        interval = job.book.grant(member, request=message.request, wanted=wanted, ahead=ahead)
        if isinstance(interval, Later):
            raise Refused(interval.reason, "retry")
        if interval is None:
            return NoMore(round=message.round)
        grant = Grant(member=member, round=message.round, request=message.request, interval=interval)
        try:
            await job.scribe.note(Granted(grant=grant))
        except StoreError as error:
            # The grant stays with its request: asked again, it is journaled again, and then sent.
            raise Refused(f"the grant cannot be journaled: {error}", "retry") from error
        metrics.SLICES_ALLOCATED.add(1)
        return SliceGrant(round=message.round, interval=interval, slice=job.book.table.slices[interval.slice])

    async def _progress(self, peer: Peer, message: Progress) -> Continue | SyncAfter | Done:
        job = self._job
        if job.book.final:
            return Done()
        member = self._counted(peer, message, TRAINING)
        batches = job.pace.observe(member, message, job.runtime.now())
        if batches is None:
            return Continue()
        return SyncAfter(round=message.round, batches=batches, batch_size=job.pace.batch_size(member))

    async def _ready(self, peer: Peer, message: Ready) -> Ack:
        job = self._job
        worker = self._worker(peer, message.lease_id, message.fence)
        if message.job_epoch != job.book.job_epoch:
            raise Refused(f"job epoch {message.job_epoch} is not {job.book.job_epoch}")
        if worker.work == "aggregate":
            reason = job.book.server_ready(
                worker.member,
                worker.addresses,
                shard=job.shards.get(worker.member, 0),
                round=message.round,
                digest=message.digest,
                momentum_digest=message.momentum_digest,
                now=job.runtime.now(),
            )
            if reason is not None:
                raise self._not_ready(worker, message, reason)
            job.server_ready(worker.member, message)
        else:
            reason = job.book.worker_ready(worker.member, round=message.round, digest=message.digest)
            if reason is not None:
                raise Refused(reason)
        job.wake()
        return Ack()

    def _not_ready(self, server: LeasedWorker, message: Ready, reason: str) -> Refused:
        """A server at another round may come to the committed one; one with another model there never will."""
        book = self._job.book
        if book.uncommitted is not None or message.round != book.committed_round:
            return Refused(reason, "retry")
        self._job.failed(server, reason, ())
        return Refused(reason)

    # --- parameter servers ----------------------------------------------------------------------------------------

    async def _collected(self, peer: Peer, message: Collected) -> Ack:
        job = self._job
        self._worker(peer, message.lease_id, message.fence)
        found = job.book.collected(message, peer.peer_id)
        if isinstance(found, Verdict):
            raise refusal(found)
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
        try:
            path = await job.runtime.run_blocking(
                job.store.find, header.part, header.round, header.digest, self._scratch
            )
        except StoreError as error:
            raise Refused(f"{header.part} of round {header.round} cannot be read: {error}", "retry") from error
        if path is None:
            raise Refused(f"{header.part} {header.digest[:12]} of round {header.round} is not stored here")
        size = (await job.runtime.run_blocking(path.stat)).st_size
        await serve_artifact(stream, header, path, size=size, runtime=job.runtime)

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def _job_status(self, peer: Peer, message: JobStatus) -> Ack:
        job = self._job
        worker = self._worker(peer, message.lease_id, message.fence)
        if job.book.final:
            job.finished(worker, message.reason)
        elif message.leaving:
            await job.left(worker, message.reason)
        else:
            # Finished is no better than failed while there are rounds to come: nobody works under this lease.
            job.failed(worker, message.reason, message.last_lines)
        return Ack()
