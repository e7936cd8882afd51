"""The pool: the leases a scheduler holds, each kept by a task of its own until it is released or dies (leases.md).

    offer ──accept──▶ first renewal ─┬─ answered ─▶ LeasedWorker ─▶ renewals at 0.6 ttl, retried to the end
    journaled ──adopt──▶ likewise    │                                 │ LeaseGone, deadline ─▶ died(worker, reason)
                                     │                                 └ release ────────────▶ given back
                                     └─ no known outcome, gone ─▶ NotHeld, given back in the background

The rules are `protocol.holder`'s, the attempts `renewals`'.
What is given back is released a few times over; after that it expires by itself.
"""

from collections.abc import Callable
from typing import Literal, TypedDict

import trio
from msgspec import Struct

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.retry import Backoff, attempt
from hypha.network.seam import Network
from hypha.protocol.holder import HeldLease, HolderState
from hypha.protocol.messages import Member, ReleaseLease, WorkerOffer
from hypha.protocol.resources import Resources
from hypha.runtime import Runtime
from hypha.scheduler.renewals import Renewals
from hypha.telemetry import get_logger, metrics, span

Work = Literal["train", "aggregate"]

# A release is a courtesy that frees the worker at once; unheard, the lease still expires.
RELEASE_ATTEMPTS_MAX = 4
RELEASE_PATIENCE_S = 2.0
RELEASE_RETRY_BASE_S = 0.2
RELEASE_RETRY_MAX_S = 2.0

log = get_logger("scheduler.pool")


class Envelope(TypedDict):
    """What every message under a lease carries (`messages.LeaseMessage`)."""

    lease_id: str
    fence: int
    job_epoch: int
    attempt: int


class LeasedWorker(Struct, frozen=True, kw_only=True, eq=False):
    """One worker under one lease, and what it was leased for; `price` per lease-hour."""

    member: Member
    work: Work
    executor: str
    price: float
    addresses: bytes
    held: HeldLease


class NotHeld(Struct, frozen=True):
    """The lease could not be had: never accepted, gone, or no answer."""

    reason: str


class Pool:
    """All leases of one scheduler's incarnation. `died` is told once of each lease that ended without our asking."""

    def __init__(
        self, network: Network, runtime: Runtime, *, job_epoch: int, died: Callable[[LeasedWorker, str], None]
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._job_epoch = job_epoch
        self._died = died
        self._workers: dict[str, LeasedWorker] = {}
        self._nursery: trio.Nursery
        self._is_open = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep leases until cancelled. Cancelling releases nothing: `release_all` first, or leave them to a restart."""
        async with trio.open_nursery() as self._nursery:
            self._is_open = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._is_open = False
                metrics.ACTIVE_WORKERS.add(-len(self._workers))
                self._workers.clear()

    # --- what is held -------------------------------------------------------------------------------------------------

    def live(self) -> list[LeasedWorker]:
        """Return the workers whose leases may be relied on now, in the order they were leased."""
        now = self._runtime.now()
        return [worker for worker in self._workers.values() if worker.held.is_live(now)]

    def by_lease(self, lease_id: str) -> LeasedWorker | None:
        """Return the worker under this lease if it lives."""
        worker = self._workers.get(lease_id)
        return worker if worker is not None and worker.held.is_live(self._runtime.now()) else None

    def is_live(self, member: Member) -> bool:
        """Whether effects of this member may count now."""
        worker = self.by_lease(member.lease_id)
        return worker is not None and worker.member == member

    def envelope(self, worker: LeasedWorker) -> Envelope:
        """Return the fields of the next message under this lease; each call counts one attempt more."""
        return _envelope(worker.held)

    # --- taking -------------------------------------------------------------------------------------------------------

    async def accept(
        self, peer_id: str, offer: WorkerOffer, *, work: Work, executor: str, price: float, received_at: float
    ) -> LeasedWorker | NotHeld:
        """Renew an offered lease for the first time; it is ours once that is answered, else it is given back.

        `received_at` is when the offer came, in seconds of our clock.
        """
        worker = LeasedWorker(
            member=Member(peer_id=peer_id, fence=offer.fence, lease_id=offer.lease_id),
            work=work,
            executor=executor,
            price=price,
            addresses=offer.addresses,
            held=self._offered(peer_id, offer, received_at),
        )
        with span("accept", lease_id=offer.lease_id, worker_peer_id=peer_id):
            return await self._take(worker)

    async def adopt(
        self,
        member: Member,
        *,
        work: Work,
        executor: str,
        price: float,
        addresses: bytes,
        resources: Resources,
        ttl_s: float,
    ) -> LeasedWorker | NotHeld:
        """Try a lease of an earlier incarnation under this job epoch, twice at most, `ttl_s` / 10 each.

        One that does not answer is released. Raises RemoteProtocolError where `addresses` are not the worker's.
        """
        self._network.learn(member.peer_id, addresses)
        held = HeldLease(
            lease_id=member.lease_id,
            worker=member.peer_id,
            fence=member.fence,
            resources=resources,
            job_epoch=self._job_epoch,
            offer_ttl_s=ttl_s,
            received_at=self._runtime.now(),
        )
        with span("adopt", lease_id=member.lease_id, worker_peer_id=member.peer_id):
            return await self._take(
                LeasedWorker(member=member, work=work, executor=executor, price=price, addresses=addresses, held=held)
            )

    async def _take(self, worker: LeasedWorker) -> LeasedWorker | NotHeld:
        held = worker.held
        renewals = Renewals(self._network, self._runtime, held)
        try:
            await renewals.accept()
        finally:
            if held.state is not HolderState.HELD:
                held.release("it was not waited for any more")
                self._return(held)
        if held.state is not HolderState.HELD:
            log.info("Lease not had", lease_id=held.lease_id, worker_peer_id=held.worker, reason=held.reason)
            return NotHeld(held.reason)
        self._workers[held.lease_id] = worker
        metrics.ACTIVE_WORKERS.add(1)
        self._nursery.start_soon(self._keep, worker, renewals)
        log.debug(
            "Lease accepted", lease_id=held.lease_id, worker_peer_id=held.worker, work=worker.work, price=worker.price
        )
        return worker

    # --- giving back --------------------------------------------------------------------------------------------------

    async def release(self, worker: LeasedWorker, reason: str) -> None:
        """Stop relying on the lease and give it back; returns when that is acknowledged or given up. Idempotent."""
        if self._remove(worker):
            worker.held.release(reason)
            log.info("Lease given back", lease_id=worker.member.lease_id, reason=reason)
            await self._give_back(worker.held)

    def drop(self, worker: LeasedWorker, reason: str) -> None:
        """Stop relying on the lease now and give it back in the background. Idempotent."""
        if self._remove(worker):
            worker.held.release(reason)
            self._return(worker.held)

    async def release_all(self, reason: str) -> None:
        """Give back every lease, all at once."""
        async with trio.open_nursery() as nursery:
            for worker in list(self._workers.values()):
                nursery.start_soon(self.release, worker, reason)

    def decline(self, peer_id: str, offer: WorkerOffer, reason: str) -> None:
        """Give back, in the background, an offer that is not accepted."""
        held = self._offered(peer_id, offer, self._runtime.now())
        held.release(reason)
        self._return(held)

    def _offered(self, peer_id: str, offer: WorkerOffer, received_at: float) -> HeldLease:
        return HeldLease(
            lease_id=offer.lease_id,
            worker=peer_id,
            fence=offer.fence,
            resources=offer.resources,
            job_epoch=self._job_epoch,
            offer_ttl_s=offer.ttl_s,
            received_at=received_at,
        )

    def _remove(self, worker: LeasedWorker) -> bool:
        if self._workers.pop(worker.member.lease_id, None) is None:
            return False
        metrics.ACTIVE_WORKERS.add(-1)
        return True

    def _return(self, held: HeldLease) -> None:
        if held.must_release and self._is_open:
            self._nursery.start_soon(self._give_back, held)

    async def _give_back(self, held: HeldLease) -> None:
        backoff = Backoff(self._runtime, base_s=RELEASE_RETRY_BASE_S, max_s=RELEASE_RETRY_MAX_S)
        for _ in range(RELEASE_ATTEMPTS_MAX):
            message = ReleaseLease(**_envelope(held), reason=held.reason)
            try:
                await attempt(self._network, held.worker, message, patience_s=RELEASE_PATIENCE_S)
                break
            except (PeerUnreachable, RemoteProtocolError) as error:
                log.debug("Release not acknowledged", lease_id=held.lease_id, reason=str(error))
                if isinstance(error, Refused) and error.code not in ("busy", "retry"):
                    break
            await backoff.wait()
        held.released()

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def _keep(self, worker: LeasedWorker, renewals: Renewals) -> None:
        held = worker.held
        await renewals.keep()
        if self._remove(worker):
            log.info("Lease lost", lease_id=held.lease_id, worker_peer_id=held.worker, reason=held.reason)
            self._return(held)
            self._died(worker, held.reason)


def _envelope(held: HeldLease) -> Envelope:
    return Envelope(lease_id=held.lease_id, fence=held.fence, job_epoch=held.job_epoch, attempt=held.next_attempt())
