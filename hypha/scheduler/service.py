"""A scheduler: one job from its dataset to its last round, then an orderly end.

dataset found ─▶ store opened, job epoch begun ─▶ workers leased ─▶ rounds ─▶ final model ─▶ leases released
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from hashlib import sha256

import msgspec
import trio
from msgspec import Struct

from hypha.errors import ConfigError, HyphaError, JobFailed, PeerUnreachable, RemoteProtocolError
from hypha.network.fetch import Providers, fetch_manifest
from hypha.network.retry import Backoff
from hypha.network.seam import Network
from hypha.pki import load_identity
from hypha.protocol.job import DatasetRef, JobSpec
from hypha.protocol.messages import CancelJob, SliceRef
from hypha.protocol.rounds import RoundBook, Terms
from hypha.runtime import RealRuntime, Runtime
from hypha.scheduler.allocator import Allocator
from hypha.scheduler.answers import Answers
from hypha.scheduler.committer import Committer
from hypha.scheduler.config import Config, JobConfig
from hypha.scheduler.coordinator import FAILURES_IN_A_ROW_MAX, Coordinator
from hypha.scheduler.crew import Crew
from hypha.scheduler.hold import HeldByAnother, Hold
from hypha.scheduler.pace import Pacing
from hypha.scheduler.place import Place
from hypha.scheduler.pool import LeasedWorker, Pool
from hypha.scheduler.settings import settings_of
from hypha.scheduler.standby import Presence, take_place
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import Deposed, JobStore, Remembered, open_store
from hypha.scheduler.whole import chain_state, whole_model
from hypha.telemetry import get_logger, metrics

log = get_logger("scheduler")

# The last evaluation and the workers' own exits are worth waiting for, but not for ever.
FAREWELL_S = 60.0
# An executor that was told to stop writes its last batch of telemetry and exits; its worker says so.
GOODBYE_S = 10.0
# Leases that cannot be given back within this expire by themselves.
RELEASE_S = 5.0
FIND_BACKOFF_S = 0.5
FIND_BACKOFF_MAX_S = 10.0


class Dataset(Struct, frozen=True, kw_only=True):
    """The dataset as the network provides it."""

    ref: DatasetRef
    slices: tuple[SliceRef, ...]


class Scheduler:
    """One scheduler on a network that is open already."""

    def __init__(
        self, network: Network, runtime: Runtime, config: Config, place: Place, presence: Presence | None = None
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._table = config.scheduler
        self._place = place
        self._started = runtime.now()
        self._standing = Standing()
        self._answers = Answers(network, place.directory)
        self._hold = Hold(place.objects, runtime, scheduler=network.peer_id, hold_s=self._table.hold_s)
        self._leading: tuple[JobStore, int] | None = None
        (presence or Presence(network, runtime, self._detail)).tell = self._detail

    @property
    def _job(self) -> JobConfig:
        return self._table.job

    def _detail(self) -> dict[str, str]:
        return {"job": self._job.name, **self._answers.detail(), "waiting": self._standing.words()}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the job to its end. Raises JobFailed with the reason when there is none, Deposed where another leads.

        HeldByAnother is raised where another holds the job's store before a job epoch is begun here.
        """
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hold.keep, self._deposed, self._standing)
                await self._run()
                nursery.cancel_scope.cancel()
        except* HyphaError as errors:
            raise _first(errors) from errors

    def _deposed(self) -> str | None:
        if self._leading is None:
            return None
        store, epoch = self._leading
        return store.taken_over(epoch)

    async def _run(self) -> None:
        dataset = await self._find_dataset()
        with ExitStack() as held:
            opening = open_store(
                self._place.disk,
                self._place.objects,
                job_id=f"{self._job.name}-{self._runtime.new_id()[:8]}",
                settings=settings_of(self._job, manifest_digest=dataset.ref.manifest_digest),
                slices=dataset.slices,
            )
            store = await self._runtime.run_blocking(held.enter_context, opening)
            await self._run_job(store, dataset)

    async def _find_dataset(self) -> Dataset:
        """Ask the network for the manifest until somebody provides it. Raises JobFailed after `find_s`."""
        wanted = self._job.dataset_config
        providers = Providers(self._network, self._runtime, wanted.name)
        backoff = Backoff(self._runtime, base_s=FIND_BACKOFF_S, max_s=FIND_BACKOFF_MAX_S)
        while True:
            try:
                manifest, digest = await fetch_manifest(
                    self._network, self._runtime, providers, manifest_digest=wanted.digest
                )
            except (PeerUnreachable, RemoteProtocolError) as error:
                self._standing.note("dataset", f"Dataset {wanted.name!r} not found yet", str(error))
                if self._runtime.now() - self._started > self._job.resources.find_s:
                    raise JobFailed(f"nobody provides dataset {wanted.name!r}: {error}") from error
                await backoff.wait()
                continue
            self._standing.clear("dataset")
            slices = manifest.train
            samples = sum(ref.samples for ref in slices)
            log.info("Dataset found", dataset=wanted.name, digest=digest, slices=len(slices), samples=samples)
            return Dataset(ref=manifest.reference(digest), slices=slices)

    # --- the job --------------------------------------------------------------------------------------------------

    async def _run_job(self, store: JobStore, dataset: Dataset) -> None:
        runtime, network = self._runtime, self._network
        remembered = await runtime.run_blocking(store.load)
        chain = await runtime.run_blocking(chain_state, store)
        epoch = await runtime.run_blocking(self._begin_epoch, store)
        self._leading = (store, epoch)
        job_id = store.opened.job_id
        log.info(
            "Job started",
            job_id=job_id,
            job_epoch=epoch,
            rounds=self._job.rounds.updates,
            round=chain.round + 1,
            samples_total=chain.samples,
            model_digest=chain.model_digest,
            leases_to_try=len(remembered.leases),
            workers=self._job.resources.workers,
            min_workers=self._job.resources.fewest,
        )
        coordinator: Coordinator | None = None

        def died(worker: LeasedWorker, reason: str) -> None:
            assert coordinator is not None, "no lease before there is a coordinator"
            coordinator.died(worker, reason)

        pool = Pool(network, runtime, job_epoch=epoch, died=died)
        book = RoundBook(
            self._terms(job_id),
            job_epoch=epoch,
            chain=chain,
            table=await runtime.run_blocking(store.table, remembered),
            now=runtime.now(),
            sha256=sha256,
            excluded=remembered.excluded,
            awaited=(held.member for held in remembered.leases if held.work == "train"),
        )
        coordinator = self._coordinator(book, store, pool, epoch)
        coordinator.exclude(book.orphans())
        crew = self._crew(coordinator, store, pool, dataset, epoch)
        try:
            await self._lead(coordinator, crew, pool, remembered)
        except BaseException:
            metrics.JOB_COMPLETION_TIME.record(runtime.now() - self._started, status="failure")
            raise
        metrics.JOB_COMPLETION_TIME.record(runtime.now() - self._started, status="success")
        await self._report_end(coordinator, store, dataset)

    def _begin_epoch(self, store: JobStore) -> int:
        # Finding the dataset may have taken long, and meanwhile the hold may have gone to another.
        self._hold.take()
        return store.begin_epoch(scheduler=self._network.peer_id, nonce=self._runtime.new_id())

    def _terms(self, job_id: str) -> Terms:
        rounds = self._job.rounds
        return Terms(
            job_id=job_id,
            updates=rounds.updates,
            quorum=rounds.quorum,
            deadline_s=rounds.deadline_s,
            fewest=self._job.resources.min_workers or 0,
            shards=self._job.resources.parameter_servers,
            ahead=self._job.streaming.overlap_steps > 0,
        )

    def _coordinator(self, book: RoundBook, store: JobStore, pool: Pool, epoch: int) -> Coordinator:
        rounds = self._job.rounds
        committer = Committer(
            self._network,
            self._runtime,
            store,
            job_epoch=epoch,
            checkpoint=self._job.checkpoint,
            updates=rounds.updates,
            downloads=self._place.directory,
            patience_s=self._table.patience_s,
            alive=pool.is_live,
            standing=self._standing,
        )
        pace = Pacing(
            target_samples=rounds.samples_between_updates,
            batch_size=rounds.max_batch_size,
            proportional=rounds.batch_sizes == "proportional",
        )
        return Coordinator(
            self._network,
            self._runtime,
            book=book,
            store=store,
            pool=pool,
            committer=committer,
            pace=pace,
            standing=self._standing,
            breaker=self._table.breaker,
            failures_max=max(FAILURES_IN_A_ROW_MAX, 2 * self._job.resources.workers),
            patience_s=self._table.patience_s,
        )

    def _crew(self, coordinator: Coordinator, store: JobStore, pool: Pool, dataset: Dataset, epoch: int) -> Crew:
        job_id = store.opened.job_id
        allocator = Allocator(
            self._network,
            self._runtime,
            pool,
            job_id=job_id,
            job_epoch=epoch,
            welcome_s=self._table.welcome_s,
            retry_s=self._table.retry_s,
            first_fraction=self._table.first_fraction,
            fences=store.fences,
        )

        def spec(work: str, shard: int) -> JobSpec:
            return self._spec(job_id, work, dataset.ref, store, shard)

        return Crew(
            self._network,
            self._runtime,
            allocator=allocator,
            pool=pool,
            coordinator=coordinator,
            table=self._table,
            standing=self._standing,
            spec=spec,
        )

    def _spec(self, job_id: str, work: str, dataset: DatasetRef, store: JobStore, shard: int = 0) -> JobSpec:
        job = self._job
        return JobSpec(
            job_id=job_id,
            work="train" if work == "train" else "aggregate",
            executor=job.resources.executor,
            model=job.model,
            preprocessor=job.preprocessor,
            dataset=dataset,
            inner=job.inner_optimizer,
            outer=job.outer_optimizer,
            compression=job.compression,
            streaming=job.streaming,
            rounds=job.rounds,
            resume=store.resume_point(shard) if work == "aggregate" else None,
            shards=job.resources.parameter_servers,
            shard=shard,
        )

    async def _lead(self, coordinator: Coordinator, crew: Crew, pool: Pool, remembered: Remembered) -> None:
        """Run everything side by side until the last round is committed, then say goodbye."""
        try:
            async with trio.open_nursery() as keeping:
                await keeping.start(pool.run)
                self._answers.begin(coordinator)
                try:
                    async with trio.open_nursery() as working:
                        await working.start(coordinator.run)
                        await crew.adopt(remembered.leases)
                        recruiting = await working.start(_cancellable, crew.run)
                        await coordinator.over.wait()
                        recruiting.cancel()
                        await self._farewell(coordinator, pool)
                        working.cancel_scope.cancel()
                finally:
                    with trio.CancelScope(deadline=trio.current_time() + RELEASE_S, shield=True):
                        await pool.release_all("the job is over")
                keeping.cancel_scope.cancel()
        except* HyphaError as errors:
            raise _first(errors) from errors

    async def _farewell(self, coordinator: Coordinator, pool: Pool) -> None:
        """Wait for the last evaluation, then let every executor exit by itself and its worker report that."""
        rounds = self._job.rounds
        if rounds.evaluate_every:
            with trio.move_on_after(FAREWELL_S):
                while rounds.updates not in coordinator.progress.held_out and any(
                    worker.work == "aggregate" for worker in pool.live()
                ):
                    await coordinator.changed()
        with trio.move_on_after(GOODBYE_S):
            async with trio.open_nursery() as nursery:
                for worker in pool.live():
                    nursery.start_soon(self._cancel, worker, pool, coordinator)
            while pool.live():
                await coordinator.changed()

    async def _cancel(self, worker: LeasedWorker, pool: Pool, coordinator: Coordinator) -> None:
        message = CancelJob(**pool.envelope(worker), job_id=coordinator.book.terms.job_id, reason="the job is over")
        with trio.move_on_after(self._table.patience_s):
            try:
                await self._network.request(worker.member.peer_id, message)
            except (PeerUnreachable, RemoteProtocolError) as error:
                log.debug("Farewell not heard", worker=worker.member.peer_id, reason=str(error))

    async def _report_end(self, coordinator: Coordinator, store: JobStore, dataset: Dataset) -> None:
        state = store.state
        assert state.model_digest is not None, "a job has at least one round"
        scratch = self._place.directory
        model = await self._runtime.run_blocking(whole_model, store, scratch)
        spec = self._spec(store.opened.job_id, "train", dataset.ref, store)
        job_file = scratch / "job.json"
        await self._runtime.run_blocking(job_file.write_bytes, msgspec.json.encode(spec))
        log.info(
            "Job finished",
            job_id=store.opened.job_id,
            rounds=state.round,
            samples=state.samples,
            wall_s=round(self._runtime.now() - self._started, 2),
            model_file=str(model.path or ""),
            model_digest=model.digest,
            job_file=str(job_file),
            held_out=coordinator.progress.held_out.get(state.round),
        )


async def _cancellable(work: Callable[[], Awaitable[None]], *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await work()


def _first(errors: BaseExceptionGroup[HyphaError]) -> HyphaError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def run(
    config: Config,
    *,
    fresh: bool = False,
    standby: bool = False,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run this configuration's job to its end; `fresh` sets aside what an earlier run left.

    With `standby` it waits until nobody leads the job any more, and again where it is deposed; without, it waits only
    where another holds the job's store when it starts. Raises ConfigError (unusable store, in use, another job's),
    StoreError (damaged; Deposed: another leads) or JobFailed.
    """
    runtime = RealRuntime()
    identity = load_identity(config)
    if standby and fresh:
        raise ConfigError("--standby goes on with a job, --fresh starts it over: not both")
    ended, wait, deposed = False, standby, False
    while not ended:
        ended = True
        try:
            async with AsyncExitStack() as held:
                place, network, presence = await take_place(
                    config, runtime, identity, held, fresh=fresh, wait=wait, deposed=deposed
                )
                await Scheduler(network, runtime, config, place, presence).run(task_status=task_status)
        except* Deposed as errors:
            reason = _first(errors)
            if isinstance(reason, HeldByAnother):
                log.warn("Another scheduler leads the job: standing by", reason=str(reason))
            elif standby:
                log.warn("Deposed: standing by again", reason=str(reason))
            else:
                raise
            # What was to be set aside is, and the job is the other's now.
            ended, fresh, wait, deposed = False, False, True, True
