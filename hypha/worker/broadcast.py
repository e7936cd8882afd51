"""Outer updates from a parameter server to everybody who trains: the same bytes to each, retried until taken.

    announce(Outgoing) ─▶ for each member and follower of the newest view ─▶ OuterUpdate stream ─▶ Accepted
                                 └── broken, or "retry": again, while the update still leads to the view's base

A view that adds a follower adds a recipient. A later Close of the round, or a view two rounds on, ends the sending.
What makes a round durable may wait for those who train on it: `delivered` says when they have it.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio
from msgspec import Struct

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError, StoreError
from hypha.network.retry import Backoff
from hypha.network.transfer import send_file
from hypha.protocol.messages import Accepted, Member, OuterUpdate, RoundView
from hypha.telemetry import get_logger, inject, span_from
from hypha.worker.session import JobContext

log = get_logger("worker.broadcast")

# Whoever asks for what it is going to store waits so long at most: a request must not outlive its sender's patience.
DELIVERY_WAIT_S = 4.0
T = TypeVar("T")


class Outgoing(Struct, frozen=True, kw_only=True):
    """The update of one merge: digests of base, update and the model that it leads to are this shard's."""

    round: int
    close: int
    base_digest: str
    model_digest: str
    digest: str
    bytes: int


class Sending(Protocol):
    """What a broadcast needs of its session."""

    context: JobContext
    stopped: bool

    @property
    def view(self) -> RoundView | None:
        """The newest view."""

    def backoff(self) -> Backoff:
        """Fresh waits."""

    async def changed(self) -> None:
        """Wait for the next change."""

    def wake(self) -> None:
        """Something changed."""

    async def pause(self, backoff: Backoff) -> None:
        """Wait before another attempt."""

    async def while_wanted(
        self, operation: Callable[[], Awaitable[T | None]], still_wanted: Callable[[], bool]
    ) -> T | None:
        """Await `operation()`; None as soon as a change makes it unwanted."""


class Broadcast:
    """Sends the newest merge's update; `run` owns the tasks."""

    def __init__(self, session: Sending) -> None:
        self._session = session
        self._newest: Outgoing | None = None
        self._path: Path | None = None
        self._trace: str | None = None
        self._over: set[tuple[str, int, int]] = set()  # recipients done with, by lease, round and close
        self._announced_at = 0.0
        self._limiter = trio.CapacityLimiter(session.context.transfers.at_once)

    def announce(self, newest: Outgoing, path: Path, traceparent: str | None) -> None:
        """Send this from now on, and nothing older, if it is new; whoever calls it wakes the session."""
        if newest == self._newest:
            return
        self._newest, self._path, self._trace = newest, path, traceparent
        self._announced_at = trio.current_time()

    async def delivered(self, patience_s: float = DELIVERY_WAIT_S) -> None:
        """Wait until everybody in the view has the newest update, or the session ends; so long after it was announced.

        DELIVERY_WAIT_S is the most.
        """
        with trio.move_on_at(self._announced_at + min(patience_s, DELIVERY_WAIT_S)):
            while not self._session.stopped and any(key not in self._over for key, _ in self._recipients()):
                await self._session.changed()

    def _recipients(self) -> list[tuple[tuple[str, int, int], Member]]:
        newest, view = self._newest, self._session.view
        if newest is None or view is None:
            return []
        return [((each.lease_id, newest.round, newest.close), each) for each in (*view.members, *view.followers)]

    async def run(self) -> None:
        """Start one task for each recipient and merge, until cancelled."""
        begun: set[tuple[str, int, int]] = set()
        async with trio.open_nursery() as nursery:
            while True:
                newest = self._newest
                if newest is not None:
                    # Keys of other merges are of no use any more: they cannot come back under the same number.
                    begun = {key for key in begun if key[1:] == (newest.round, newest.close)}
                    self._over &= begun
                    for key, target in self._recipients():
                        if key not in begun:
                            begun.add(key)
                            nursery.start_soon(self._send, newest, target, key)
                await self._session.changed()

    def _wanted(self, update: Outgoing, target: Member) -> bool:
        view = self._session.view
        if update is not self._newest or view is None or view.round not in (update.round, update.round + 1):
            return False
        return target in view.members or target in view.followers

    async def _send(self, update: Outgoing, target: Member, key: tuple[str, int, int]) -> None:
        backoff, wanted = self._session.backoff(), partial(self._wanted, update, target)
        with span_from(self._trace, "outer_update", round=update.round, worker=target.peer_id):
            while wanted():
                if await self._session.while_wanted(partial(self._try, update, target), wanted):
                    break
                if wanted():
                    await self._session.pause(backoff)
        self._over.add(key)
        self._session.wake()

    async def _try(self, update: Outgoing, target: Member) -> bool:
        """Whether this recipient is done with: it has the update, or will not take it from us."""
        worker = target.peer_id
        try:
            async with self._limiter:
                await self._attempt(update, target)
        except (PeerUnreachable, RemoteProtocolError) as error:
            final = isinstance(error, Refused) and error.code not in ("retry", "busy")
            log.info("Outer update not taken", worker=worker, round=update.round, reason=str(error), final=final)
            return final
        except StoreError as error:
            # The round was committed and its files have gone; whoever has not got it yet fetches the model.
            log.warn("Outer update is not there any more", worker=worker, round=update.round, reason=str(error))
        return True

    async def _attempt(self, update: Outgoing, target: Member) -> None:
        context, view, path = self._session.context, self._session.view, self._path
        assert view is not None
        assert path is not None
        header = OuterUpdate(
            job_id=view.job_id,
            job_epoch=view.job_epoch,
            view=view.view,
            round=update.round,
            lease_id=target.lease_id,
            close=update.close,
            base_digest=update.base_digest,
            model_digest=update.model_digest,
            digest=update.digest,
            bytes=update.bytes,
            shard=context.job.shard,
            traceparent=inject(),
        )
        with trio.move_on_after(context.transfers.stall_s) as patience:
            stream = await context.network.open_stream(target.peer_id, header)
            try:
                patience.deadline = float("inf")  # the transport finds a transfer that stands still
                await send_file(stream, path, offset=0, length=update.bytes, runtime=context.runtime)
                await stream.send_eof()
                await stream.receive_message(Accepted)
            finally:
                await stream.aclose()
            return
        raise PeerUnreachable(f"{target.peer_id} did not take the update within {context.transfers.stall_s:g} s")
