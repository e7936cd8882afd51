"""The worker's arbiter: from advertisements heard to temporary leases offered (leases.md).

    gossip ─▶ signer? role? asked? ─▶ Gather ── window of 200 ms ──▶ rank ─▶ for each plan, best first
                                                  fence ─▶ Ledger.grant ─▶ WorkerOffer ─▶ Ack: the scheduler decides
                                                            │ NoRoom: skip     └─ refused, unreachable: revoke
                                                            └ the lapse of an unanswered offer is the ledger's own

One task closes windows, grants and starts the sending, so fences rise in the order of the grants. While as many offers
are under way as are allowed, the window stays open and goes on gathering.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence

import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError, StoreError
from hypha.network.retry import Backoff, attempt
from hypha.network.seam import Network, Peer
from hypha.protocol.auction_worker import Gather, OfferPlan, rank
from hypha.protocol.lease import Lease, Ledger, NoRoom, State
from hypha.protocol.messages import TOPIC_WORKER, Message, TaskAdvertisement, WorkerOffer
from hypha.runtime import Runtime
from hypha.telemetry import ChangeLogger, get_logger, span_from
from hypha.worker.config import Config
from hypha.worker.fences import FenceKeeper

# Each holds a stream and a dial at most; schedulers whose offers wait beyond it are served by the next window.
OFFERS_AT_ONCE_MAX = 32
# After so much of its ttl an offer that could not be handed over is of no use: the scheduler could not accept it.
HAND_OVER_SHARE = 0.5
# One attempt to hand it over; a lost packet costs a retry, not the offer.
ATTEMPT_SHARE = 0.2
RETRY_BASE_S = 0.05
RETRY_MAX_S = 0.5
# Clocks are floats: waking a rounding error early must cost a moment, not spin.
TICK_S = 0.001
# 53 bits are what a float holds exactly, so the fraction stays below 1.
FRACTION_BITS = 53

log = get_logger("worker.arbiter")


class Arbiter:
    """Answers advertisements for one worker; `run` until cancelled."""

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        ledger: Ledger,
        fences: FenceKeeper,
        config: Config,
        *,
        rests: Callable[[], bool] = lambda: False,
    ) -> None:
        """`rests` says whether nothing should be offered for now."""
        self._network = network
        self._runtime = runtime
        self._ledger = ledger
        self._fences = fences
        self._config = config
        self._rests = rests
        self._executors = frozenset((executor.work, executor.name) for executor in config.executors)
        self._gather = Gather()
        self._opened = trio.Event()
        self._at_once = trio.Semaphore(OFFERS_AT_ONCE_MAX)
        self._why_none = ChangeLogger(log)
        self._fence_trouble = ChangeLogger(log, level=logging.ERROR)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and offer until cancelled; started once the topic is subscribed."""
        async with self._network.subscribe(TOPIC_WORKER) as announcements, trio.open_nursery() as nursery:
            nursery.start_soon(self._answer_windows, nursery)
            task_status.started()
            async for signer, message in announcements:
                self._hear(signer, message)

    def _hear(self, signer: Peer, message: Message) -> None:
        passed_over = self._note(signer, message)
        if passed_over is not None:
            log.debug("Advertisement passed over", peer_id=signer.peer_id, reason=passed_over)
        elif not self._opened.is_set():
            self._opened.set()

    def _note(self, signer: Peer, message: Message) -> str | None:
        if not isinstance(message, TaskAdvertisement):
            return f"{type(message).__name__} is not an advertisement"
        if message.scheduler != signer.peer_id:
            return f"it names {message.scheduler} as its scheduler but was signed by {signer.peer_id}"
        if signer.roles and "scheduler" not in signer.roles:
            return f"its signer holds {', '.join(sorted(signer.roles))}, not scheduler"
        try:
            self._network.learn(message.scheduler, message.addresses)
        except RemoteProtocolError as error:
            return str(error)
        fraction = hash_fraction(message.advertisement_id, self._network.peer_id)
        return self._gather.hear(message, hash_fraction=fraction, now=self._runtime.now())

    # --- windows ------------------------------------------------------------------------------------------------------

    async def _answer_windows(self, nursery: trio.Nursery) -> None:
        while True:
            while (closes_at := self._gather.closes_at()) is None:
                self._opened = trio.Event()
                await self._opened.wait()
            await self._runtime.sleep(max(closes_at - self._runtime.now(), TICK_S))
            if advertisements := self._gather.close(self._runtime.now()):
                await self._answer(advertisements, nursery)

    async def _answer(self, advertisements: Sequence[TaskAdvertisement], nursery: trio.Nursery) -> None:
        if self._rests():
            for each in advertisements:
                self._why_none.log_when_changed(each.job_id, "No offer: a job failed here, this worker rests")
            return
        free = self._ledger.free(self._runtime.now())
        plans = rank(
            advertisements,
            free=free,
            capacity=self._ledger.capacity,
            executors=self._executors,
            config=self._config.offer,
        )
        planned = {plan.advertisement.advertisement_id for plan in plans}
        for advertisement in advertisements:
            if advertisement.advertisement_id not in planned:
                reason = f"No offer: of what is asked nothing fits {free} free, the executors here and the floor"
                self._why_none.log_when_changed(advertisement.job_id, reason, scheduler=advertisement.scheduler)
        for plan in plans:
            await self._at_once.acquire()
            if (lease := await self._grant(plan)) is None:
                self._at_once.release()
            else:
                nursery.start_soon(self._offer, plan, lease)

    async def _grant(self, plan: OfferPlan) -> Lease | None:
        advertisement = plan.advertisement
        try:
            fence = await self._fences.take()
        except StoreError as error:
            self._fence_trouble.log_when_changed("fences", f"No offers without a new fence: {error}")
            return None
        self._fence_trouble.forget("fences")
        granted = self._ledger.grant(
            self._runtime.new_id(),
            advertisement.scheduler,
            plan.resources,
            ttl_s=self._config.lease.offer_ttl_s,
            fence=fence,
            now=self._runtime.now(),
            job_epoch=advertisement.job_epoch,
        )
        if isinstance(granted, NoRoom):
            self._why_none.log_when_changed(advertisement.job_id, f"No offer: {granted.reason}")
            return None
        self._gather.answered(advertisement.advertisement_id)
        self._why_none.forget(advertisement.job_id)
        return granted

    # --- one offer ----------------------------------------------------------------------------------------------------

    async def _offer(self, plan: OfferPlan, lease: Lease) -> None:
        advertisement = plan.advertisement
        try:
            with span_from(
                advertisement.traceparent,
                "offer",
                advertisement_id=advertisement.advertisement_id,
                lease_id=lease.lease_id,
                scheduler=lease.holder,
            ) as span:
                refusal = await self._hand_over(plan, lease)
                if refusal is not None:
                    span.set(refused=refusal)
                    self._withdraw(lease, refusal)
        finally:
            self._at_once.release()

    async def _hand_over(self, plan: OfferPlan, lease: Lease) -> str | None:
        """Send the offer until it is acknowledged or of no use; return why the scheduler does not have it."""
        ttl_s = self._config.lease.offer_ttl_s
        backoff = Backoff(self._runtime, base_s=RETRY_BASE_S, max_s=RETRY_MAX_S)
        until, reason = self._runtime.now() + HAND_OVER_SHARE * ttl_s, "no time was left to send it"
        while self._is_pending(lease) and self._runtime.now() < until:
            try:
                await attempt(self._network, lease.holder, self._message(plan, lease), patience_s=ATTEMPT_SHARE * ttl_s)
            except PeerUnreachable as error:
                reason = str(error)
            except Refused as refusal:
                if refusal.code not in ("busy", "retry"):
                    return str(refusal)
                reason = str(refusal)
            except RemoteProtocolError as error:
                return str(error)
            else:
                self._log_sent(plan, lease)
                return None
            await backoff.wait()
        return reason

    def _message(self, plan: OfferPlan, lease: Lease) -> WorkerOffer:
        return WorkerOffer(
            advertisement_id=plan.advertisement.advertisement_id,
            choices=plan.choices,
            lease_id=lease.lease_id,
            fence=lease.fence,
            resources=lease.resources,
            ttl_s=max(0.0, lease.deadline - self._runtime.now()),
            addresses=self._network.signed_addresses(),
        )

    def _log_sent(self, plan: OfferPlan, lease: Lease) -> None:
        asks = plan.advertisement.asks
        log.info(
            "Offer sent",
            lease_id=lease.lease_id,
            fence=lease.fence,
            scheduler=lease.holder,
            job_id=plan.advertisement.job_id,
            prices=", ".join(f"{asks[choice.ask].work} {choice.price:g}" for choice in plan.choices),
            resources=str(lease.resources),
        )

    def _withdraw(self, lease: Lease, reason: str) -> None:
        # The acknowledgement may have been lost where the offer was not: what was accepted meanwhile stays.
        if self._is_pending(lease):
            self._ledger.revoke(lease.lease_id, reason=reason, now=self._runtime.now())
            log.info("Offer not taken", lease_id=lease.lease_id, scheduler=lease.holder, reason=reason)

    def _is_pending(self, lease: Lease) -> bool:
        found = self._ledger.live(lease.lease_id, fence=lease.fence, now=self._runtime.now())
        return found is not None and found.state is State.TEMPORARY


def hash_fraction(advertisement_id: str, peer_id: str) -> float:
    """Return where in [0, 1) this worker lies for this advertisement: below its fraction it is asked."""
    digest = hashlib.sha256(f"{advertisement_id}{peer_id}".encode()).digest()
    bits = int.from_bytes(digest[:8], "big") >> (64 - FRACTION_BITS)
    return float(bits / 2**FRACTION_BITS)
