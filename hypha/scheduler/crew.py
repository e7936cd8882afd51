"""Keeps the job staffed: asks for whoever is missing, hands out the job, asks again when a lease dies.

missing? ─▶ one auction for trainers and parameter servers together ─▶ journal ─▶ DispatchJob ─▶ hired
   ▲ died, failed                                                         └─ refused, gone ─▶ released
   └── too few: the reason in numbers, backoff, again ── before the start only until `find_s`
"""

from collections.abc import Callable

import trio
from msgspec.structs import replace

from hypha.errors import JobFailed, RemoteProtocolError, StoreError
from hypha.network.retry import Backoff, insist
from hypha.network.seam import Network
from hypha.protocol.job import JobSpec
from hypha.protocol.messages import DispatchJob, LeaseGone
from hypha.runtime import Runtime
from hypha.scheduler.allocator import Allocator, Wanted
from hypha.scheduler.config import JobResources, SchedulerTable
from hypha.scheduler.coordinator import Coordinator
from hypha.scheduler.pool import LeasedWorker, Pool
from hypha.scheduler.records import LeaseHeld
from hypha.telemetry import ChangeLogger, get_logger, span

log = get_logger("scheduler")

PARAMETER_SERVERS = 1
# After the start, workers that are missing are asked for again no more often than this.
RETRY_MAX_S = 30.0


class Crew:
    """Finds and replaces workers for as long as `run` runs."""

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        *,
        allocator: Allocator,
        pool: Pool,
        coordinator: Coordinator,
        table: SchedulerTable,
        spec: Callable[[str], JobSpec],
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._allocator = allocator
        self._pool = pool
        self._job = coordinator
        self._table = table
        self._spec = spec
        self._said = ChangeLogger(log)
        self._staffed_once = False

    @property
    def _resources(self) -> JobResources:
        return self._table.job.resources

    async def run(self) -> None:
        """Staff the job until cancelled. Raises JobFailed when it cannot be started within `find_s`."""
        deadline = self._runtime.now() + self._resources.find_s
        backoff = self._backoff()
        while True:
            asks = self._missing()
            if not asks:
                backoff.reset()
                await self._job.changed()
                continue
            reason = await self._hire(asks)
            if not self._missing():
                self._staffed_once = True
                continue
            if not self._staffed_once and self._runtime.now() >= deadline:
                raise JobFailed(f"the job found too few workers in {self._resources.find_s:g} s: {reason}")
            self._said.log_when_changed("missing", f"Workers are missing: {reason}")
            await backoff.wait()

    def _backoff(self) -> Backoff:
        return Backoff(self._runtime, base_s=self._table.retry_s, max_s=max(self._table.retry_s, RETRY_MAX_S))

    def _missing(self) -> list[Wanted]:
        """Return what to ask for: the difference between who is wanted and who is leased."""
        resources, live = self._resources, self._pool.live()
        servers = PARAMETER_SERVERS - sum(worker.work == "aggregate" for worker in live)
        trainers = resources.workers - sum(worker.work == "train" for worker in live)
        started = self._job.book.committed_round > 0 or self._staffed_once
        asks = []
        if trainers > 0:
            asks.append(
                Wanted(
                    work="train",
                    executor=resources.executor,
                    resources=resources.worker,
                    count=trainers,
                    minimum=0 if started else max(0, resources.fewest - (resources.workers - trainers)),
                    bid=resources.worker_price.bid,
                    limit=resources.worker_price.limit,
                )
            )
        if servers > 0:
            asks.append(
                Wanted(
                    work="aggregate",
                    executor=resources.parameter_server_executor,
                    resources=resources.parameter_server,
                    count=servers,
                    minimum=servers,
                    bid=resources.parameter_server_price.bid,
                    limit=resources.parameter_server_price.limit,
                )
            )
        return asks

    async def _hire(self, asks: list[Wanted]) -> str:
        """Hold one auction and hand out the job; returns why somebody is still missing, "" where nobody is."""
        allocation = await self._allocator.allocate(asks)
        async with trio.open_nursery() as nursery:
            for worker in allocation.workers:
                nursery.start_soon(self._employ, worker)
        return allocation.shortfall or ""

    async def _employ(self, worker: LeasedWorker) -> None:
        member = worker.member
        held = LeaseHeld(member=member, work=worker.work, executor=worker.executor, price=worker.price)
        try:
            await self._runtime.run_blocking(self._job.store.note, held)
        except StoreError as error:
            log.warn("Lease not journaled, given back", lease_id=member.lease_id, reason=str(error))
            await self._pool.release(worker, "it could not be journaled")
            return
        log.info("Worker leased", worker=member.peer_id, work=worker.work, lease_id=member.lease_id, price=worker.price)
        refusal = await self._dispatch(worker)
        if refusal is None:
            self._job.hired(worker)
            return
        log.warn("Job not taken", worker=member.peer_id, work=worker.work, reason=refusal)
        await self._pool.release(worker, "the job was not taken")

    async def _dispatch(self, worker: LeasedWorker) -> str | None:
        """Hand the job over; returns why not, or None."""
        spec = await self._runtime.run_blocking(self._spec, worker.work)
        with span("dispatch", worker=worker.member.peer_id, work=worker.work):
            try:
                answer = await insist(
                    self._network,
                    worker.member.peer_id,
                    DispatchJob(**self._pool.envelope(worker), job=replace(spec, executor=worker.executor)),
                    backoff=self._job.backoff(),
                    patience_s=self._table.patience_s,
                    still_wanted=lambda: self._pool.is_live(worker.member),
                )
            except RemoteProtocolError as refusal:
                return str(refusal)
        if answer is None:
            return "its lease ended before it answered"
        return answer.reason if isinstance(answer, LeaseGone) else None
