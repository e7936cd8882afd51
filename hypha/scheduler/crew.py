"""Keeps the job staffed: asks for whoever is missing, hands out the job, asks again when a lease dies.

journaled by the last run ─▶ tried once under this job epoch ─▶ adopted: works on | released
missing? ─▶ one auction for trainers and parameter servers together ─▶ journal ─▶ DispatchJob ─▶ hired
   ▲ died, failed                                                         └─ refused, gone ─▶ released
   └── too few: the reason in numbers, backoff, again ── before the start only until `find_s`
nobody missing, but more are welcome (`max_workers`)? ─▶ asked for now and then; given up when somebody is missing
no server to be had, but a trainer could be it? ─▶ a spare trainer is leased first, then that one is free to offer
"""

from collections.abc import Awaitable, Callable, Sequence

import trio
from msgspec.structs import replace

from hypha.errors import JobFailed, RemoteProtocolError, StoreError
from hypha.network.retry import Backoff, insist
from hypha.network.seam import Network
from hypha.protocol.job import JobSpec
from hypha.protocol.messages import DispatchJob, LeaseGone
from hypha.runtime import Runtime
from hypha.scheduler.allocator import Allocation, Allocator, Wanted
from hypha.scheduler.config import JobResources, SchedulerTable
from hypha.scheduler.coordinator import Coordinator
from hypha.scheduler.pool import LeasedWorker, NotHeld, Pool
from hypha.scheduler.records import LeaseHeld
from hypha.scheduler.standing import Standing
from hypha.telemetry import get_logger, span

log = get_logger("scheduler")

# After the start, workers that are missing are asked for again no more often than this.
RETRY_MAX_S = 30.0
# A parameter server that so many auctions in a row did not find may have been made a trainer.
SERVERLESS_MAX = 3
# A worker that comes meanwhile is asked this soon: who is connected is looked at, nobody announces it.
ARRIVALS_S = 1.0


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
        standing: Standing,
        spec: Callable[[str, int], JobSpec],
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._allocator = allocator
        self._pool = pool
        self._job = coordinator
        self._table = table
        self._spec = spec
        self._standing = standing
        self._started = coordinator.book.committed_round > 0
        self._growing = self._backoff()
        self._serverless = 0

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
                self._started = True
                self._standing.clear("workers")
                backoff.reset()
                await self._grow()
                continue
            known = self._connected()
            reason = await self._hire(asks)
            if await self._free_a_server() or not self._missing():
                continue
            reason = f"{reason or 'one was lost at once'}; workers connected: {len(self._connected())}"
            self._started = self._started or self._can_start()
            if not self._started and self._runtime.now() >= deadline:
                raise JobFailed(f"the job found too few workers in {self._resources.find_s:g} s: {reason}")
            self._standing.note("workers", f"Workers are missing: {reason}")
            await self._rest(backoff, known)

    def _can_start(self) -> bool:
        live = self._pool.live()
        trainers = sum(worker.work == "train" for worker in live)
        return trainers >= self._resources.fewest and len(live) - trainers >= self._resources.parameter_servers

    def _connected(self) -> frozenset[str]:
        return frozenset(peer.peer_id for peer in self._network.connected_peers() if "worker" in peer.roles)

    async def _rest(self, backoff: Backoff, known: frozenset[str]) -> None:
        """Wait before asking again, but not when one more is gone or a worker has come beside those `known`."""
        before = self._missed()
        with trio.move_on_after(backoff.next_s()):
            while self._missed() <= before and self._connected() <= known:
                with trio.move_on_after(ARRIVALS_S):
                    await self._job.changed()
            backoff.reset()

    def _missed(self) -> int:
        return sum(wanted.count for wanted in self._missing())

    def _backoff(self) -> Backoff:
        return Backoff(self._runtime, base_s=self._table.retry_s, max_s=max(self._table.retry_s, RETRY_MAX_S))

    def _missing(self) -> list[Wanted]:
        """Return what to ask for: the difference between who is wanted and who is leased."""
        resources, live = self._resources, self._pool.live()
        servers = resources.parameter_servers - sum(worker.work == "aggregate" for worker in live)
        trainers = resources.workers - sum(worker.work == "train" for worker in live)
        asks = []
        if trainers > 0:
            minimum = 0 if self._started else max(0, resources.fewest - (resources.workers - trainers))
            asks.append(self._trainers(trainers, minimum=minimum))
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

    def _trainers(self, count: int, *, minimum: int) -> Wanted:
        resources = self._resources
        return Wanted(
            work="train",
            executor=resources.executor,
            resources=resources.worker,
            count=count,
            minimum=minimum,
            bid=resources.worker_price.bid,
            limit=resources.worker_price.limit,
        )

    async def _hire(self, asks: list[Wanted]) -> str:
        """Hold one auction and hand out the job; returns why somebody is still missing, "" where nobody is."""
        return await self._employ_all(await self._allocator.allocate(asks))

    async def _employ_all(self, allocation: Allocation) -> str:
        reasons = [allocation.shortfall] if allocation.shortfall is not None else []

        async def employ(worker: LeasedWorker) -> None:
            refusal = await self._employ(worker)
            if refusal is not None:
                reasons.append(f"{worker.work} worker {worker.member.peer_id}: {refusal}")

        async with trio.open_nursery() as nursery:
            for worker in allocation.workers:
                if worker.work == "aggregate":
                    self._job.shards[worker.member] = self._free_shard()
                nursery.start_soon(employ, worker)
        return "; ".join(reasons)

    def _free_shard(self) -> int:
        """Return the first shard that no living lease is for."""
        taken = {self._job.shards.get(worker.member) for worker in self._pool.live()}
        return next((shard for shard in range(self._resources.parameter_servers) if shard not in taken), 0)

    # --- a trainer that could serve -------------------------------------------------------------------------------

    async def _free_a_server(self) -> bool:
        """Let a trainer go that could be the missing server, once a spare one has its place; returns whether one went.

        Who trains and could serve offers nothing; whoever has no executor that serves can only take over the training.
        """
        servers = sum(worker.work == "aggregate" for worker in self._pool.live())
        serves = servers >= self._resources.parameter_servers
        self._serverless = 0 if serves or not self._started else self._serverless + 1
        able = self._could_serve()
        if self._serverless < SERVERLESS_MAX or not able:
            return False
        before = len(self._training())
        await self._employ_all(await self._allocator.allocate([self._trainers(1, minimum=0)]))
        freed = next((worker for worker in able if self._pool.is_live(worker.member)), None)
        if freed is None or len(self._training()) <= before:
            return False
        log.info("A trainer goes, to be the parameter server", worker=freed.member.peer_id)
        self._serverless = 0
        self._job.replace(freed, "no other worker can be the parameter server")
        return True

    def _could_serve(self) -> list[LeasedWorker]:
        """Who trains and has offered to serve; after them those adopted, who would say it once they are free.

        One of these that cannot serve has offered less than that by then, and is not let go a second time.
        """
        peers = [(worker, worker.member.peer_id) for worker in self._training()]
        able = [worker for worker, peer_id in peers if self._allocator.able(peer_id, "aggregate")]
        return able + [worker for worker, peer_id in peers if not self._allocator.knows(peer_id)]

    def _training(self) -> list[LeasedWorker]:
        return [worker for worker in self._pool.live() if worker.work == "train"]

    # --- more than are wanted -------------------------------------------------------------------------------------

    def _welcome(self) -> int:
        return self._resources.most - sum(worker.work == "train" for worker in self._pool.live())

    async def _grow(self) -> None:
        """Wait until something changes; where more workers are welcome, ask for them after a while."""
        if self._welcome() <= 0:
            await self._job.changed()
            return
        with trio.move_on_after(self._growing.next_s()):
            await self._until_missing()
            return
        if (count := self._welcome()) <= 0:
            return
        allocation: Allocation | None = None
        async with trio.open_nursery() as nursery:
            # Whoever is missing is asked for at once, in an auction of its own.
            nursery.start_soon(_cancel_after, self._until_missing, nursery.cancel_scope)
            allocation = await self._allocator.allocate([self._trainers(count, minimum=0)])
            nursery.cancel_scope.cancel()
        if allocation is not None and allocation.workers:
            self._growing.reset()
            await self._employ_all(allocation)

    async def _until_missing(self) -> None:
        while not self._missing():
            await self._job.changed()

    async def _employ(self, worker: LeasedWorker) -> str | None:
        """Journal the lease, then hand out the job; returns why the worker was given back, or None."""
        member = worker.member
        held = LeaseHeld(
            member=member,
            work=worker.work,
            executor=worker.executor,
            price=worker.price,
            addresses=worker.addresses,
            resources=worker.held.resources,
            ttl_s=worker.held.ttl_s,
            shard=self._job.shards.get(member, 0),
        )
        try:
            await self._job.scribe.note(held)
        except StoreError as error:
            await self._pool.release(worker, "it could not be journaled")
            return f"its lease could not be journaled: {error}"
        log.info("Worker leased", worker=member.peer_id, work=worker.work, lease_id=member.lease_id, price=worker.price)
        refusal = await self._dispatch(worker)
        if refusal is None:
            self._job.hired(worker)
            return None
        log.warn("Job not taken", worker=member.peer_id, work=worker.work, reason=refusal)
        await self._pool.release(worker, "the job was not taken")
        self._job.ended(member)
        return refusal

    # --- the last run's workers -----------------------------------------------------------------------------------

    async def adopt(self, leases: Sequence[LeaseHeld]) -> None:
        """Try every lease that the journal has, once and all at once; what answers goes on with the job."""
        self._job.trying.update(held.member for held in leases)
        self._job.shards.update((held.member, held.shard) for held in leases if held.work == "aggregate")
        async with trio.open_nursery() as nursery:
            for held in leases:
                nursery.start_soon(self._adopt, held)

    async def _adopt(self, held: LeaseHeld) -> None:
        member = held.member
        reason = await self._try(held)
        self._job.trying.discard(member)
        if reason is not None:
            log.info("Worker not adopted", worker=member.peer_id, lease_id=member.lease_id, reason=reason)
            self._job.ended(member)

    async def _try(self, held: LeaseHeld) -> str | None:
        try:
            outcome = await self._pool.adopt(
                held.member,
                work=held.work,
                executor=held.executor,
                price=held.price,
                addresses=held.addresses,
                resources=held.resources,
                ttl_s=held.ttl_s,
            )
        except RemoteProtocolError as error:
            return str(error)
        if isinstance(outcome, NotHeld):
            return outcome.reason
        # Nobody can tell what it works on if no model was stored yet: begin again.
        refusal = await self._dispatch(outcome) if self._job.book.base_digest else "no model was stored yet"
        if refusal is not None:
            await self._pool.release(outcome, refusal)
            return refusal
        log.info("Worker adopted", worker=held.member.peer_id, work=held.work, lease_id=held.member.lease_id)
        self._job.adopted(outcome)
        return None

    async def _dispatch(self, worker: LeasedWorker) -> str | None:
        """Hand the job over; returns why not, or None."""
        if worker.work == "aggregate":
            # Its first state is the last commit's, and that must not be overtaken while it restores it.
            while self._job.book.uncommitted is not None:
                await self._job.changed()
        try:
            spec = await self._runtime.run_blocking(self._spec, worker.work, self._job.shards.get(worker.member, 0))
        except StoreError as error:
            return f"nothing to start from: {error}"
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


async def _cancel_after(event: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await event()
    scope.cancel()
