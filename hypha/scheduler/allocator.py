"""The allocator: one advertisement, the offers that answer it, and the workers leased from them (leases.md).

    allocate(asks) ─ publish ─▶ gossip …… workers …… WorkerOffer ─▶ Auction ─ decide ─▶ Closed
                     └ again while too few have answered                        losers: declined at once
                                                                                winners: accepted, all at once
                                                        below a minimum: everything is given back before returning

One call is one auction and one trace, from the advertisement to the first renewals. Whoever calls repeats it with
backoff.
"""

from collections.abc import Callable, Mapping, Sequence

import trio
from msgspec import Struct

from hypha.errors import Refused
from hypha.network.retry import Backoff
from hypha.network.seam import Network, Peer
from hypha.protocol.auction import fraction_for, fraction_of
from hypha.protocol.auction_scheduler import Auction, Closed, Waiting, Want, Winner, below_minimum
from hypha.protocol.messages import TOPIC_WORKER, Ack, Ask, TaskAdvertisement, WorkerOffer
from hypha.protocol.resources import Resources
from hypha.runtime import Runtime
from hypha.scheduler.pool import LeasedWorker, NotHeld, Pool, Work
from hypha.scheduler.renewals import TICK_S
from hypha.telemetry import ChangeLogger, OncePerKey, get_logger, span_from

WORKERS = frozenset({"worker"})
# The first offers cannot come before the workers' windows of 200 ms have closed; who is missing beyond that may not
# have heard: a gossip mesh takes a second to form.
AGAIN_BASE_S = 0.5
# Of so many workers it is remembered what they can do: as many as a job may have.
ABLE_MAX = 4096
log = get_logger("scheduler.allocator")


class Wanted(Struct, frozen=True, kw_only=True):
    """Workers of one kind: `count` of them, no fewer than `minimum`; `bid` is public, `limit` the most that is paid."""

    work: Work
    executor: str
    resources: Resources
    count: int
    minimum: int
    bid: float
    limit: float

    def want(self) -> Want:
        """Return it as the auction's rules have it."""
        ask = Ask(work=self.work, executor=self.executor, resources=self.resources, count=self.count, bid=self.bid)
        return Want(ask=ask, price_max=self.limit, minimum=self.minimum)


class Allocation(Struct, frozen=True, kw_only=True):
    """The workers leased, live when returned; `shortfall` says in numbers what is missing, None where nothing is."""

    workers: tuple[LeasedWorker, ...]
    shortfall: str | None


class _Running:
    """One auction under way: offers not yet accepted or declined with the time each came, and workers leased.

    `offers` counts all that came, late ones and repetitions too: how many answer to the share `fraction`.
    """

    def __init__(self, auction: Auction, asks: Sequence[Wanted], wants: Sequence[Want], fraction: float) -> None:
        self.auction = auction
        self.fraction = fraction
        self.offers = 0
        self.asks = asks
        self.wants = wants
        self.pending: dict[str, tuple[str, WorkerOffer, float]] = {}
        self.outcomes: dict[str, LeasedWorker | NotHeld] = {}
        self.is_closed = False
        self.fences: Mapping[str, int] = {}  # what each worker had granted before this auction began
        self.heard = trio.Event()

    def leased(self) -> list[LeasedWorker]:
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, LeasedWorker)]


class Allocator:
    """Holds auctions for one job. Serves WorkerOffer on its network from the start.

    Offers are welcome for `welcome_s` after an advertisement; until there are enough it is published again, at most
    `retry_s` apart. The first auction asks `first_fraction` of the workers, later ones as many as the offers of the one
    before say are needed; after each that fell short, twice as many at least. `fences` tells the highest fence that
    each worker is known to have granted: an offer that does not exceed it comes from a counter that went back.
    """

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        pool: Pool,
        *,
        job_id: str,
        job_epoch: int,
        welcome_s: float,
        retry_s: float,
        first_fraction: float = 1.0,
        fences: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._pool = pool
        self._job_id = job_id
        self._job_epoch = job_epoch
        self._welcome_s = welcome_s
        self._retry_s = retry_s
        self._first_fraction = first_fraction
        self._fences = fences
        self._retries = 0
        self._running: dict[str, _Running] = {}
        self._last: _Running | None = None
        self._why = ChangeLogger(log)
        self._went_back = OncePerKey(log)
        self._able: dict[str, frozenset[Work]] = {}  # peer id → kinds of work it has offered, the latest last
        network.serve(WorkerOffer, self._receive, roles=WORKERS)

    async def allocate(self, asks: Sequence[Wanted]) -> Allocation:
        """Hold one auction and lease its winners; below a minimum nothing stays leased and the reason is returned."""
        advertisement_id = self._runtime.new_id()
        wants = tuple(wanted.want() for wanted in asks)
        auction = Auction(
            advertisement_id=advertisement_id,
            wants=wants,
            welcome_s=self._welcome_s,
            now=self._runtime.now(),
            holding=frozenset(worker.member.peer_id for worker in self._pool.live()),
        )
        running = _Running(auction, asks, wants, self._fraction(sum(wanted.count for wanted in asks)))
        running.fences = self._fences()
        self._last = self._running[advertisement_id] = running
        with span_from(None, "advertise", job_id=self._job_id, advertisement_id=advertisement_id) as span:
            try:
                closed = await self._close(running)
                allocation = await self._lease(running, closed)
            except BaseException:
                for worker in running.leased():
                    self._pool.drop(worker, "the auction was given up")
                raise
            finally:
                del self._running[advertisement_id]
                for peer_id, offer, _ in running.pending.values():
                    self._pool.decline(peer_id, offer, "the auction is over")
            span.set(workers=len(allocation.workers), shortfall=allocation.shortfall)
        self._note(allocation)
        return allocation

    def able(self, peer_id: str, work: Work) -> bool:
        """Whether a worker has offered this work before, to this incarnation."""
        return work in self._able.get(peer_id, frozenset())

    def knows(self, peer_id: str) -> bool:
        """Whether a worker has offered anything to this incarnation: one that was adopted has had no reason to."""
        return peer_id in self._able

    def _note_able(self, peer_id: str, works: set[Work]) -> None:
        self._able[peer_id] = self._able.pop(peer_id, frozenset()) | works
        while len(self._able) > ABLE_MAX:
            del self._able[next(iter(self._able))]

    def _fraction(self, wanted: int) -> float:
        """Return the share of workers to ask for so many."""
        last, least = self._last, fraction_of(self._retries, self._first_fraction)
        if last is None:
            return least
        needed = fraction_for(wanted, offers=last.offers, fraction=last.fraction)
        return max(needed, min(1.0, 2 * last.fraction)) if self._retries else needed

    # --- the auction --------------------------------------------------------------------------------------------------

    async def _receive(self, peer: Peer, offer: WorkerOffer) -> Ack:
        running = self._running.get(offer.advertisement_id)
        if running is None:
            if self._last is not None and self._last.auction.advertisement_id == offer.advertisement_id:
                self._last.offers += 1
            raise Refused(f"advertisement {offer.advertisement_id} is over")
        running.offers += 1
        self._insist_rising(running, peer, offer)
        self._network.learn(peer.peer_id, offer.addresses)
        now = self._runtime.now()
        refusal = running.auction.offer(offer, peer=peer.peer_id, now=now)
        if refusal is not None:
            log.debug("Offer refused", worker_peer_id=peer.peer_id, lease_id=offer.lease_id, reason=refusal)
            raise Refused(refusal)
        self._note_able(peer.peer_id, {running.asks[choice.ask].work for choice in offer.choices})
        # Once closed, only repetitions of what was kept come here; they may be leased already.
        if not running.is_closed:
            running.pending.setdefault(offer.lease_id, (peer.peer_id, offer, now))
            running.heard.set()
        return Ack()

    def _insist_rising(self, running: _Running, peer: Peer, offer: WorkerOffer) -> None:
        before = running.fences.get(peer.peer_id)
        if before is None or offer.fence > before:
            return
        refusal = (
            f"fence {offer.fence} is not above {before}, which was granted before: the fence counter was restored from "
            "a backup; issue this worker a certificate with a new key and start it with an empty work_dir"
        )
        self._went_back.log(peer.peer_id, "A worker's fences went back", worker=peer.peer_id, reason=refusal)
        raise Refused(refusal)

    async def _close(self, running: _Running) -> Closed:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish, running)
            while isinstance(verdict := running.auction.decide(self._runtime.now()), Waiting):
                running.heard = trio.Event()
                # Waking early, by whichever clock, only means deciding once more.
                with trio.move_on_after(max(verdict.next_at - self._runtime.now(), TICK_S)):
                    await running.heard.wait()
            nursery.cancel_scope.cancel()
        running.is_closed = True
        return verdict

    async def _publish(self, running: _Running) -> None:
        """Publish until the auction closes; who has heard it already passes the repetitions over."""
        backoff = Backoff(self._runtime, base_s=min(AGAIN_BASE_S, self._retry_s), max_s=self._retry_s)
        welcome_until = self._runtime.now() + self._welcome_s
        advertisement_id = running.auction.advertisement_id
        log.info(
            "Advertised",
            advertisement_id=advertisement_id,
            job_id=self._job_id,
            asks=", ".join(f"{want.ask.count} {want.ask.work} at {want.ask.bid:g}" for want in running.wants),
        )
        while (left_s := welcome_until - self._runtime.now()) > 0:
            advertisement = TaskAdvertisement(
                advertisement_id=advertisement_id,
                scheduler=self._network.peer_id,
                addresses=self._network.signed_addresses(),
                job_id=self._job_id,
                job_epoch=self._job_epoch,
                asks=tuple(want.ask for want in running.wants),
                welcome_s=left_s,
                fraction=running.fraction,
            )
            await self._network.publish(TOPIC_WORKER, advertisement)
            await backoff.wait()

    # --- its outcome --------------------------------------------------------------------------------------------------

    async def _lease(self, running: _Running, closed: Closed) -> Allocation:
        for loser in closed.losers:
            if running.pending.pop(loser.offer.lease_id, None) is not None:
                self._pool.decline(loser.peer, loser.offer, loser.reason)
        async with trio.open_nursery() as nursery:
            for winner in closed.winners:
                nursery.start_soon(self._accept, running, winner)
        shortfall = _shortfall(running, closed)
        leased, filled = running.leased(), [0] * len(running.wants)
        for winner in closed.winners:
            filled[winner.ask] += isinstance(running.outcomes[winner.offer.lease_id], LeasedWorker)
        if leased and below_minimum(running.wants, filled):
            async with trio.open_nursery() as nursery:
                for worker in leased:
                    nursery.start_soon(self._pool.release, worker, f"too few to start: {shortfall}")
            leased = []
        return Allocation(workers=tuple(leased), shortfall=shortfall)

    async def _accept(self, running: _Running, winner: Winner) -> None:
        wanted = running.asks[winner.ask]
        _, offer, received_at = running.pending.pop(winner.offer.lease_id)
        running.outcomes[offer.lease_id] = await self._pool.accept(
            winner.peer,
            offer,
            work=wanted.work,
            executor=wanted.executor,
            price=winner.price,
            received_at=received_at,
        )

    def _note(self, allocation: Allocation) -> None:
        if allocation.shortfall is None:
            self._retries = 0
            self._why.forget(self._job_id)
            log.info("All workers leased", job_id=self._job_id, workers=len(allocation.workers))
        else:
            self._retries += 1
            self._why.log_when_changed(self._job_id, f"Too few workers: {allocation.shortfall}")


def _shortfall(running: _Running, closed: Closed) -> str | None:
    reasons = [] if closed.shortfall is None else [closed.shortfall]
    for winner in closed.winners:
        outcome = running.outcomes[winner.offer.lease_id]
        if isinstance(outcome, NotHeld):
            reasons.append(f"{running.asks[winner.ask].work} worker {winner.peer} not leased: {outcome.reason}")
    return "; ".join(reasons) or None
