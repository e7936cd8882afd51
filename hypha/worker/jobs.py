"""The jobs of this worker: one per lease, each in its own directory, ended with its lease and leaving nothing behind.

dispatch ─▶ directory ─▶ launch ─▶ session and executor run side by side
                                      │ exit 0 after Stop        ─▶ finished
                                      │ other exit, stall, error ─▶ failed, with its last lines
                                      │ lease died, cancelled    ─▶ killed
         process group confirmed gone ◀─┘ ─▶ directory removed ─▶ resources return to the ledger ─▶ JobStatus

In `_supervise` stands a blind `except* Exception` (exempt in the tidy test): a bug in one job's session must
end that job, with its traceback logged at error level, and not the worker with everybody else's. Cancellation passes.
"""

import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import trio
from msgspec import Struct

from hypha.errors import HyphaError, JobFailed, PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.retry import Backoff, attempt, insist
from hypha.network.seam import Network
from hypha.protocol.job import JobSpec
from hypha.protocol.lease import Lease as HeldByUs
from hypha.protocol.lease import Ledger
from hypha.protocol.messages import JobStatus
from hypha.runtime import Runtime
from hypha.telemetry import get_logger, metrics
from hypha.worker.aggregator import AggregateSession
from hypha.worker.cache import SliceCache
from hypha.worker.config import Config, ExecutorConfig
from hypha.worker.process import Executor, Launch, Launcher
from hypha.worker.session import JobContext
from hypha.worker.trainer import TrainSession

log = get_logger("worker.jobs")
AnySession = TrainSession | AggregateSession
S = TypeVar("S", TrainSession, AggregateSession)

# A job that was told to stop gets so long to finish its batch and exit before its process group is killed.
STOP_GRACE_S = 10.0
# On leaving, a batch is finished and what was trained is delivered, but whoever stops us does not wait for ever.
CONTRIBUTE_S = 4.0
LEAVING = "the worker is shutting down"
# On shutdown the schedulers are told at once, so that they need not wait for the leases to run out.
FAREWELL_S = 1.0
# A worker on which a job failed rests before it offers again, twice as long after each failure: one with a full disk or
# a broken executor must not use up all the failures that a job bears.
REST_S = 1.0
REST_MAX_S = 60.0
JOB_DIRECTORY_PREFIX = "hypha-"
JOB_DIRECTORY = re.compile(rf"{JOB_DIRECTORY_PREFIX}.+-(?P<fence>[0-9]+)")


class Outcome(Struct, frozen=True):
    """How a job ended: `reason` in words, and the end of what its executor wrote."""

    finished: bool
    reason: str
    last_lines: tuple[str, ...] = ()


class RunningJob:
    """One lease's job: its session, and the scope that ends it."""

    def __init__(self, lease: HeldByUs, job: JobSpec, session: AnySession) -> None:
        self.lease = lease
        self.job = job
        self.session = session
        self.scope = trio.CancelScope()
        self.killed: str | None = None
        self.leaving = False
        self.over = trio.Event()

    def kill(self, reason: str) -> None:
        """End it now."""
        self.killed = self.killed or reason
        self.scope.cancel()

    def ask_to_stop(self, reason: str) -> None:
        """Let it exit by itself, and kill it if it does not within STOP_GRACE_S."""
        self.session.stop(reason)
        self.killed = self.killed or reason
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + STOP_GRACE_S)


class Jobs:
    """Starts, finds and ends jobs. `run` must be running while jobs are started."""

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        ledger: Ledger,
        launcher: Launcher,
        config: Config,
        cache: SliceCache,
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._ledger = ledger
        self._launcher = launcher
        self._config = config
        self._cache = cache
        self._running: dict[str, RunningJob] = {}
        self._nursery: trio.Nursery | None = None
        self._rest_s = 0.0
        self._rests_until = runtime.now()

    def rests(self) -> bool:
        """Whether a job failed here lately, so that no offer should be made yet."""
        return self._runtime.now() < self._rests_until

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of all jobs until cancelled; then every job is ended first."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def start(self, lease: HeldByUs, job: JobSpec, executor: ExecutorConfig) -> None:
        """Run a job under a lease that the ledger has just bound to it."""
        assert self._nursery is not None, "run() comes first"
        directory = self._config.work_dir / f"{JOB_DIRECTORY_PREFIX}{job.job_id}-{lease.fence}"
        context = JobContext(
            network=self._network,
            runtime=self._runtime,
            job=job,
            scheduler=lease.holder,
            lease_id=lease.lease_id,
            fence=lease.fence,
            job_epoch=lease.job_epoch,
            directory=directory,
            transfers=self._config.transfers,
            cache=self._cache,
            stall_s=executor.stall_s,
        )
        session: AnySession = TrainSession(context) if job.work == "train" else AggregateSession(context)
        running = RunningJob(lease, job, session)
        self._running[lease.lease_id] = running
        self._nursery.start_soon(self._run, running, executor, directory)

    def kill(self, lease_id: str, reason: str) -> bool:
        """End a lease's job now; False when there is none."""
        running = self._running.get(lease_id)
        if running is not None:
            running.kill(reason)
        return running is not None

    def ask_to_stop(self, lease_id: str, reason: str) -> None:
        """End a lease's job politely."""
        if (running := self._running.get(lease_id)) is not None:
            running.ask_to_stop(reason)

    def session(self, lease_id: str, kind: type[S]) -> S:
        """Return the session of a lease's job. Raises Refused when this worker runs no such job."""
        running = self._running.get(lease_id)
        if running is None or not isinstance(running.session, kind) or not self._lives(running):
            raise Refused(f"no {kind.__name__} runs here under lease {lease_id}")
        return running.session

    def sessions(self, job_id: str, scheduler: str | None = None) -> list[AnySession]:
        """Return the sessions of one job, those of one scheduler where it is given; in the order of their leases."""
        return [
            running.session
            for running in self._running.values()
            if running.job.job_id == job_id and scheduler in (None, running.lease.holder) and self._lives(running)
        ]

    def _lives(self, running: RunningJob) -> bool:
        """Whether it may still have effects: a lease is dead at its deadline, whether or not a sweep has run."""
        lease, now = running.lease, self._runtime.now()
        return (
            not running.scope.cancel_called
            and self._ledger.live(lease.lease_id, fence=lease.fence, now=now) is not None
        )

    async def leave(self) -> None:
        """Let every executor give what it has, then end all jobs; returns once the schedulers know."""
        async with trio.open_nursery() as nursery:
            for running in list(self._running.values()):
                nursery.start_soon(self._leave, running)

    async def _leave(self, running: RunningJob) -> None:
        session, running.leaving = running.session, True
        session.leave()
        with trio.move_on_after(CONTRIBUTE_S):
            while not session.gave_all() and not session.ended:
                await session.changed()
        if not _is_over(session):  # an executor that is ending anyway still has telemetry to deliver
            running.kill(LEAVING)
        await running.over.wait()

    # --- one job --------------------------------------------------------------------------------------------------

    async def _run(self, running: RunningJob, executor: ExecutorConfig, directory: Path) -> None:
        lease, job = running.lease, running.job
        log.info("Job started", job_id=job.job_id, lease_id=lease.lease_id, work=job.work, executor=executor.name)
        metrics.ACTIVE_JOBS.add(1, work=job.work)
        started = self._runtime.now()
        outcome: Outcome | None = None
        try:
            with running.scope:
                outcome = await self._supervise(running, executor, directory)
            if running.scope.cancelled_caught:
                outcome = Outcome(finished=False, reason=running.killed or "cancelled")
        finally:
            if outcome is None:  # cancelled from outside, with everything that runs here
                await self._take_leave(running)
            with trio.CancelScope(shield=True):
                await self._runtime.run_blocking(remove_tree, directory)
            running.session.end()
            self._running.pop(lease.lease_id, None)
            self._ledger.confirm_gone(lease.lease_id, now=self._runtime.now())
            metrics.ACTIVE_JOBS.add(-1, work=job.work)
        assert outcome is not None, "a cancellation from outside does not come here"
        status = "success" if outcome.finished else "failure"
        ran_s = self._runtime.now() - started
        metrics.JOB_DURATION.record(ran_s, work=job.work, status=status)
        if running.killed is None:
            self._rest(ran_s, failed=not outcome.finished)
        await self._tell(running, outcome)
        running.over.set()

    def _rest(self, ran_s: float, *, failed: bool) -> None:
        before = self._rest_s if ran_s < REST_MAX_S else 0.0
        self._rest_s = min(REST_MAX_S, max(REST_S, 2 * before)) if failed else 0.0
        self._rests_until = self._runtime.now() + self._rest_s

    async def _supervise(self, running: RunningJob, executor: ExecutorConfig, directory: Path) -> Outcome:
        session = running.session
        threads = executor.threads or max(1, int(running.lease.resources.cpu))
        what = Launch(
            job=running.job,
            lease_id=running.lease.lease_id,
            executor=executor,
            session=session,
            directory=directory,
            threads=threads,
            has_gpu=running.lease.resources.gpu > 0,
            # As long as a silent worker is put up with.
            stopped_max_s=self._config.lease.ttl_s,
        )
        process: Executor | None = None
        code: int | None = None
        problem: str | None = None
        try:
            await self._runtime.run_blocking(_make_directory, directory)
            async with self._launcher.launch(what) as process, trio.open_nursery() as nursery:
                nursery.start_soon(session.run)
                code = await process.wait()
                nursery.cancel_scope.cancel()
        except* HyphaError as errors:
            problem = "; ".join(_words(errors))
        except* Exception as bugs:  # the bulkhead; see the module's docstring
            log.exception("Job hit a bug", job_id=running.job.job_id, lease_id=running.lease.lease_id)
            problem = "internal error: " + "; ".join(_words(bugs))
        lines = process.last_lines() if process is not None else ()
        if problem is None and code == 0 and _is_over(session):
            return Outcome(finished=True, reason="finished")
        return Outcome(finished=False, reason=problem or session.failure or _exit_words(code), last_lines=lines)

    async def _tell(self, running: RunningJob, outcome: Outcome) -> None:
        """Report to the scheduler for as long as the lease lives: a dead lease needs no report."""
        lease = running.lease
        fields = {"job_id": running.job.job_id, "lease_id": lease.lease_id, "reason": outcome.reason}
        if outcome.finished or running.killed is not None:
            log.info("Job ended", **fields)
        else:
            log.error("Job failed", **fields, last_lines="\n".join(outcome.last_lines))

        def lives() -> bool:
            return self._ledger.live(lease.lease_id, fence=lease.fence, now=self._runtime.now()) is not None

        transfers = self._config.transfers
        backoff = Backoff(self._runtime, base_s=transfers.backoff_s, max_s=transfers.backoff_max_s)
        status = _status(running, outcome)
        try:
            await insist(
                self._network, lease.holder, status, backoff=backoff, patience_s=transfers.stall_s, still_wanted=lives
            )
        except RemoteProtocolError as error:
            log.debug("Job status refused", lease_id=lease.lease_id, reason=str(error))

    async def _take_leave(self, running: RunningJob) -> None:
        """Tell the scheduler once that this worker goes; whether it hears that changes nothing here."""
        outcome, running.leaving = Outcome(finished=False, reason=LEAVING), True
        log.info("Job ended", job_id=running.job.job_id, lease_id=running.lease.lease_id, reason=outcome.reason)
        with trio.CancelScope(shield=True):
            try:
                holder = running.lease.holder
                await attempt(self._network, holder, _status(running, outcome), patience_s=FAREWELL_S)
            except (PeerUnreachable, RemoteProtocolError) as error:
                log.debug("Job status not taken", lease_id=running.lease.lease_id, reason=str(error))


def _is_over(session: AnySession) -> bool:
    return session.stopped or (session.view is not None and session.view.final)


def _status(running: RunningJob, outcome: Outcome) -> JobStatus:
    lease = running.lease
    return JobStatus(
        job_id=running.job.job_id,
        job_epoch=running.session.job_epoch,
        lease_id=lease.lease_id,
        fence=lease.fence,
        finished=outcome.finished,
        reason=outcome.reason[:8000],
        leaving=running.leaving and not outcome.finished,
        last_lines=tuple(line[:2048] for line in outcome.last_lines),
    )


def _words(errors: BaseExceptionGroup[Exception]) -> list[str]:
    words = []
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            words += _words(error)
        else:
            words.append(str(error) if isinstance(error, HyphaError) else f"{type(error).__name__}: {error}")
    return words


def _exit_words(code: int | None) -> str:
    if code is None:
        return "the executor did not start"
    return f"the executor was ended by signal {-code}" if code < 0 else f"the executor exited with code {code}"


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise JobFailed(f"{directory}: {error.strerror}") from error


def remove_tree(directory: Path) -> None:
    """Remove a job's directory whatever its executor made of it; if that cannot be done it is logged."""
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        return
    with suppress(OSError):  # what cannot be opened up cannot be removed, which is logged below
        directory.chmod(stat.S_IRWXU)
        for parent, children, _ in os.walk(directory):
            for child in children:
                Path(parent, child).chmod(stat.S_IRWXU, follow_symlinks=False)
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        log.warn("Job directory not removed", path=str(directory))


def job_directories(work_dir: Path) -> dict[Path, int]:
    """Return the directories of jobs that an earlier run of this worker left, each with its lease's fence."""
    found = ((path, JOB_DIRECTORY.fullmatch(path.name)) for path in sorted(work_dir.iterdir()))
    return {path: int(match["fence"]) for path, match in found if match and path.is_dir() and not path.is_symlink()}


def remove_leftovers(work_dir: Path) -> int:
    """Remove the job directories of an earlier run of this worker; returns how many."""
    left = job_directories(work_dir)
    for directory in left:
        remove_tree(directory)
    return len(left)
