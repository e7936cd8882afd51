"""A worker: leases, jobs and streams, wired to the network.

                  ┌── Arbiter: advertisements ─▶ offers ──┐
Network ──────────┤                                       ├── Ledger ── sweep: what died is killed
                  ├── RenewLease, ReleaseLease ───────────┤
                  ├── DispatchJob, CancelJob ─────────────┴── Jobs ── sessions ── executors
                  └── RoundView, Committed, CloseRound, PushUpdate, OuterUpdate, FetchModel ──▶ sessions
"""

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

import hypha
from hypha.errors import ConfigError, Refused, StoreError
from hypha.network.host import open_network
from hypha.network.seam import Network, Peer, Stream
from hypha.pki import load_identity
from hypha.protocol.lease import Already, Ended, Gone, Kept, Ledger, Sender, Stale, Start, State
from hypha.protocol.lease import Stop as StopJob
from hypha.protocol.messages import (
    Ack,
    CancelJob,
    CloseRound,
    Committed,
    DispatchJob,
    FetchModel,
    Health,
    HealthReport,
    LeaseGone,
    LeaseMessage,
    Merged,
    Merging,
    OuterUpdate,
    PushUpdate,
    ReleaseLease,
    Renewed,
    RenewLease,
    RoundView,
)
from hypha.runtime import RealRuntime, Runtime
from hypha.store.disk import RealDisk
from hypha.store.fences import FILE_NAME as FENCES_FILE
from hypha.store.fences import FenceFile
from hypha.telemetry import get_logger
from hypha.worker.aggregator import AggregateSession
from hypha.worker.arbiter import Arbiter
from hypha.worker.cache import SliceCache
from hypha.worker.config import Config, executor_named
from hypha.worker.environment import executor_environment
from hypha.worker.fences import FenceKeeper
from hypha.worker.jobs import LEAVING, AnySession, Jobs, job_directories, remove_leftovers
from hypha.worker.process import Launcher, ProcessLauncher
from hypha.worker.trainer import TrainSession
from hypha.worker.warm import Warm

log = get_logger("worker")

SCHEDULERS = frozenset({"scheduler"})
WORKERS = frozenset({"worker"})
# The sweep kills what died no later than this after its deadline, even if a grant came while it slept.
SWEEP_MAX_S = 0.25
# The bound on leaving politely, whatever the network does: whoever sent the signal waits.
LEAVE_S = 6.0
# On leaving, so often it is looked whether every lease was given back.
GIVEN_BACK_TICK_S = 0.05
# Clocks are floats: waking a rounding error before a deadline must cost a moment, not spin.
TICK_S = 0.001


class Worker:
    """One worker on a network that is open already; `run` until cancelled."""

    def __init__(
        self, network: Network, runtime: Runtime, config: Config, launcher: Launcher, fences: FenceKeeper
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._config = config
        self._started = runtime.now()
        self.ledger = Ledger(config.resources.detect(config.work_dir))
        self.cache = SliceCache(config.work_dir / "cache", bytes_max=config.cache_bytes, runtime=runtime)
        self.jobs = Jobs(network, runtime, self.ledger, launcher, config, self.cache)
        self.arbiter = Arbiter(network, runtime, self.ledger, fences, config, rests=self.jobs.rests)
        self._offering = trio.CancelScope()
        self._leaving = False

    async def run(
        self, *, stopping: trio.Event | None = None, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Offer, run jobs and answer until cancelled; then end every job and every lease.

        Once `stopping` is set it offers nothing more, lets its executors contribute what they have, and returns.
        """
        await self.cache.open()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.jobs.run)
                self._register()
                nursery.start_soon(self._sweep)
                await nursery.start(self._offer)
                log.info("Worker ready", capacity=str(self.ledger.capacity))
                task_status.started()
                if stopping is not None:
                    await stopping.wait()
                    await self._leave()
                    nursery.cancel_scope.cancel()
        finally:
            self._revoke()

    async def _offer(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self._offering:
            await self.arbiter.run(task_status=task_status)

    async def _leave(self) -> None:
        self._offering.cancel()
        self._leaving = True
        # What was accepted stays its holder's until that gives it back: the holder always stops first.
        self._revoke(State.TEMPORARY)
        with trio.move_on_after(LEAVE_S):
            await self.jobs.leave()
            while self.ledger.leases(self._runtime.now()):
                await self._runtime.sleep(GIVEN_BACK_TICK_S)

    def _revoke(self, only: State | None = None) -> None:
        now = self._runtime.now()
        for lease in self.ledger.leases(now):
            if only in (None, lease.state):
                self.ledger.revoke(lease.lease_id, reason=LEAVING, now=now)

    def has_room(self) -> bool:
        """Whether a job could still come: not every core is at work for one."""
        leases = self.ledger.leases(self._runtime.now())
        busy = sum(lease.resources.cpu for lease in leases if lease.job_id is not None)
        return not self._leaving and busy < self.ledger.capacity.cpu

    def _register(self) -> None:
        network = self._network
        network.serve(RenewLease, self._renew, roles=SCHEDULERS)
        network.serve(ReleaseLease, self._release, roles=SCHEDULERS)
        network.serve(DispatchJob, self._dispatch, roles=SCHEDULERS)
        network.serve(CancelJob, self._cancel, roles=SCHEDULERS)
        network.serve(RoundView, self._round_view, roles=SCHEDULERS)
        network.serve(Committed, self._committed, roles=SCHEDULERS)
        network.serve(CloseRound, self._close_round, roles=SCHEDULERS)
        network.serve(Health, self._health)
        network.accept_streams(PushUpdate, self._push_update, roles=WORKERS)
        network.accept_streams(OuterUpdate, self._outer_update, roles=WORKERS)
        network.accept_streams(FetchModel, self._fetch_model, roles=WORKERS | SCHEDULERS)

    # --- leases ---------------------------------------------------------------------------------------------------

    async def _renew(self, peer: Peer, message: RenewLease) -> Renewed | LeaseGone:
        now, ttl_s = self._runtime.now(), self._config.lease.ttl_s
        match self.ledger.renew(message.lease_id, _sender(peer, message), ttl_s=ttl_s, now=now):
            case Kept(lease=lease, remaining_s=remaining_s, accepted=accepted):
                if accepted:
                    log.info("Offer accepted", lease_id=lease.lease_id, scheduler=peer.peer_id, ttl_s=ttl_s)
                return Renewed(lease_id=lease.lease_id, remaining_s=remaining_s)
            case Gone(reason=reason):
                return LeaseGone(lease_id=message.lease_id, reason=reason)
            case Stale(reason=reason):
                raise Refused(reason, "stale")

    async def _release(self, peer: Peer, message: ReleaseLease) -> Ack:
        now = self._runtime.now()
        match self.ledger.release(message.lease_id, _sender(peer, message), reason=message.reason, now=now):
            case Ended(lease=lease):
                log.info("Lease released", lease_id=lease.lease_id, scheduler=peer.peer_id, reason=message.reason)
                self.jobs.kill(lease.lease_id, f"lease released: {message.reason}")
            case Stale(reason=reason):
                raise Refused(reason, "stale")
            case Gone():
                pass  # it is over, which is what was asked for
        return Ack()

    async def _sweep(self) -> None:
        while True:
            deadline = self.ledger.next_deadline()
            wait_s = SWEEP_MAX_S if deadline is None else deadline - self._runtime.now()
            await self._runtime.sleep(min(max(wait_s, TICK_S), SWEEP_MAX_S))
            for lease in self.ledger.expire(self._runtime.now()):
                if self.jobs.kill(lease.lease_id, lease.reason) or lease.job_id is not None:
                    log.warn("Lease expired", lease_id=lease.lease_id, scheduler=lease.holder, job_id=lease.job_id)
                else:
                    log.info("Offer lapsed", lease_id=lease.lease_id, scheduler=lease.holder)

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def _dispatch(self, peer: Peer, message: DispatchJob) -> Ack | LeaseGone:
        job = message.job
        if self._leaving:
            raise Refused(LEAVING)
        executor = executor_named(self._config, job.executor, job.work)
        if executor is None:
            raise Refused(f"this worker has no executor {job.executor!r} of class {job.work!r}")
        now = self._runtime.now()
        match self.ledger.dispatch(message.lease_id, _sender(peer, message), job.job_id, now=now):
            case Start(lease=lease):
                self.jobs.start(lease, job, executor)
            case Gone(reason=reason):
                return LeaseGone(lease_id=message.lease_id, reason=reason)
            case Stale(reason=reason):
                raise Refused(reason, "stale")
            case Already():
                pass  # idempotent by lease and job
        return Ack()

    async def _cancel(self, peer: Peer, message: CancelJob) -> Ack:
        now = self._runtime.now()
        match self.ledger.cancel(message.lease_id, _sender(peer, message), message.job_id, now=now):
            case StopJob(lease=lease):
                self.jobs.ask_to_stop(lease.lease_id, f"cancelled: {message.reason}")
            case Stale(reason=reason):
                raise Refused(reason, "stale")
            case Gone() | Already():
                pass  # nothing runs
        return Ack()

    # --- rounds ---------------------------------------------------------------------------------------------------

    async def _round_view(self, peer: Peer, message: RoundView) -> Ack:
        for session in self._sessions(peer, message.job_id):
            session.observe(message, peer.peer_id)
        return Ack()

    async def _committed(self, peer: Peer, message: Committed) -> Ack:
        for session in self._sessions(peer, message.job_id):
            session.committed(message, peer.peer_id)
        return Ack()

    def _sessions(self, peer: Peer, job_id: str) -> list[AnySession]:
        sessions = self.jobs.sessions(job_id, peer.peer_id)
        if not sessions:
            raise Refused(f"job {job_id} does not run here for {peer.peer_id}")
        return sessions

    async def _close_round(self, peer: Peer, message: CloseRound) -> Merged | Merging:
        session = self.jobs.session(message.lease_id, AggregateSession)
        if session.context.scheduler != peer.peer_id:
            raise Refused(f"lease {message.lease_id} is not held by {peer.peer_id}")
        return await session.close_round(message, peer.peer_id)

    # --- streams --------------------------------------------------------------------------------------------------

    async def _push_update(self, stream: Stream, header: PushUpdate) -> None:
        for session in self.jobs.sessions(header.job_id):
            if isinstance(session, AggregateSession) and session.context.job.shard == header.shard:
                await session.receive_push(stream, header)
                return
        raise Refused(f"no parameter server of job {header.job_id} runs here", "retry")

    async def _outer_update(self, stream: Stream, header: OuterUpdate) -> None:
        await self.jobs.session(header.lease_id, TrainSession).receive_update(stream, header)

    async def _fetch_model(self, stream: Stream, header: FetchModel) -> None:
        serving = [each for each in self.jobs.sessions(header.job_id) if isinstance(each, AggregateSession)]
        for session in sorted(serving, key=lambda each: not each.holds(header.digest))[:1]:
            return await session.serve_model(stream, header)
        raise Refused(f"no parameter server of job {header.job_id} runs here", "retry")

    # --- health ---------------------------------------------------------------------------------------------------

    async def _health(self, _peer: Peer, _message: Health) -> HealthReport:
        now = self._runtime.now()
        return HealthReport(
            peer_id=self._network.peer_id,
            role="worker",
            version=hypha.__version__,
            uptime_s=now - self._started,
            detail={"free": str(self.ledger.free(now)), "leases": str(len(self.ledger.leases(now)))},
        )


def _sender(peer: Peer, message: LeaseMessage[Any]) -> Sender:
    return Sender(peer=peer.peer_id, fence=message.fence, job_epoch=message.job_epoch, attempt=message.attempt)


async def run(
    config: Config,
    *,
    stopping: trio.Event | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a worker of this configuration until cancelled, or until `stopping` is set: then it leaves politely.

    Raises ConfigError for an unusable `work_dir`.
    """
    runtime = RealRuntime()
    identity = load_identity(config)
    work_dir = config.work_dir
    if work_dir.exists() and not work_dir.is_dir():
        raise ConfigError(f"`work_dir`: {work_dir} is not a directory")
    with ExitStack() as held:
        try:
            disk = RealDisk(work_dir)
            held.enter_context(disk.lock(f"{FENCES_FILE}.lock"))
            fence_seen = max(job_directories(work_dir).values(), default=-1)
            fences = FenceKeeper(FenceFile(disk, identity.peer_id, fence_seen=fence_seen), runtime)
            records = work_dir / "processes"
            disk.mkdir(records.name)
        except StoreError as error:
            raise ConfigError(f"`work_dir`: {error}") from error
        _warn_if_open_to_others(work_dir)
        environment = executor_environment(os.environ)
        has_gpu = config.resources.detect(work_dir).gpu > 0
        warm = Warm(records, environment, has_gpu=has_gpu) if config.warm_executor else None
        launcher = ProcessLauncher(records, environment, warm)
        await launcher.end_leftovers()
        await runtime.run_blocking(remove_leftovers, work_dir)
        async with open_network(identity, config, role="worker", runtime=runtime) as network:
            worker = Worker(network, runtime, config, launcher, fences)
            async with trio.open_nursery() as nursery:
                if warm is not None:
                    nursery.start_soon(warm.run, worker.has_room)
                await worker.run(stopping=stopping, task_status=task_status)
                nursery.cancel_scope.cancel()


def _warn_if_open_to_others(work_dir: Path) -> None:
    mode = stat.S_IMODE(work_dir.stat().st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warn(
            "work_dir is writable by others, who may replace what jobs work on", path=str(work_dir), mode=f"{mode:o}"
        )
