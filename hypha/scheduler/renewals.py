"""The renewals of one lease: sent when they are due, tried again while those before are still under way.

    due ──▶ attempt 1 ────────────── ttl/10: no answer yet ─▶ attempt 2 ──── … ──▶ the holder's deadline
              └────────────────────────── answered late ─▶ counts from its sending, and the lease lives

An attempt that was given up would be asked again behind the same bytes on a slow link, and never be answered; so it
stays open, and whichever answer comes first counts. What an answer is worth is `protocol.holder`'s to say.
"""

import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.retry import attempt
from hypha.network.seam import Network
from hypha.protocol.holder import HeldLease, HolderState
from hypha.protocol.messages import LeaseGone, RenewLease
from hypha.runtime import Runtime
from hypha.telemetry import get_logger, metrics, span_from

# Clocks are floats: waking a rounding error early must cost a moment, not spin.
TICK_S = 0.001

log = get_logger("scheduler.pool")


class Renewals:
    """What is under way to accept a lease, and later to keep it."""

    def __init__(self, network: Network, runtime: Runtime, held: HeldLease) -> None:
        self._network = network
        self._runtime = runtime
        self._held = held

    async def accept(self) -> None:
        """Renew for the first time; returns once the lease is held or has ended."""
        await self._renew()

    async def keep(self) -> None:
        """Renew again and again; returns once the lease has ended."""
        held = self._held
        while held.state is HolderState.HELD:
            await self._when_due()
            if held.state is HolderState.HELD:
                # A trace of its own: the one that this task was started in has long ended.
                with span_from(None, "renewal", lease_id=held.lease_id, worker_peer_id=held.worker):
                    await self._renew()

    async def _renew(self) -> None:
        """Try until an attempt is answered or the lease has ended."""
        async with trio.open_nursery() as under_way:
            while self._held.state is not HolderState.ENDED:
                await self._when_due()
                await self._try(under_way)
            under_way.cancel_scope.cancel()

    async def _when_due(self) -> None:
        """Return when the next attempt is due or the lease has ended."""
        while (due_at := self._held.next_event()) is not None and (wait_s := due_at - self._runtime.now()) > 0:
            await self._runtime.sleep(max(wait_s, TICK_S))

    async def _try(self, under_way: trio.Nursery) -> None:
        """Send one attempt, and give it its time; an answer to any cancels `under_way`."""
        held, now = self._held, self._runtime.now()
        held.lapse(now)
        if held.state is HolderState.ENDED:
            return
        number = held.begin_attempt(now)
        message = RenewLease(lease_id=held.lease_id, fence=held.fence, job_epoch=held.job_epoch, attempt=number)
        failed = trio.Event()
        # Once the deadline has passed no answer is worth anything.
        under_way.start_soon(self._ask, message, held.deadline - now, failed, under_way.cancel_scope)
        with trio.move_on_after(held.attempt_timeout_s(now)):
            await failed.wait()
        # Whatever is wrong, only the grantor's word or the deadline ends a lease.
        metrics.LEASE_RENEWALS.add(1, status="failure")
        held.unanswered(number, self._runtime.now(), self._runtime.random.random())

    async def _ask(
        self, message: RenewLease, patience_s: float, failed: trio.Event, under_way: trio.CancelScope
    ) -> None:
        held = self._held
        try:
            answer = await attempt(self._network, held.worker, message, patience_s=patience_s)
        except (PeerUnreachable, RemoteProtocolError) as error:
            if not isinstance(error, Refused) or error.code != "stale":
                log.debug("Renewal not answered", lease_id=held.lease_id, reason=str(error))
                failed.set()
                return
            held.gone(str(error))
        else:
            if isinstance(answer, LeaseGone):
                held.gone(answer.reason)
            elif held.answered(message.attempt, answer.remaining_s, self._runtime.now()):
                metrics.LEASE_RENEWALS.add(1, status="success")
        under_way.cancel()
