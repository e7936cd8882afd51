"""What a node hears on gossip topics, kept for its readers within bounds.

    bytes from a peer ─▶ Topics.hear ─▶ decode, or drop and count ─▶ every subscription of the topic
                                        subscription full: the oldest announcement makes room

Announcements age quickly: a reader that lags wants the newest ones, and the sender is never held up by it.
"""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from hypha.errors import Refused
from hypha.network.dispatch import Refusals
from hypha.network.seam import Peer
from hypha.protocol.codec import GOSSIP_BYTES_MAX
from hypha.protocol.messages import Message
from hypha.telemetry import metrics

# Far more advertisements than arrive within one auction's window (200 ms) from all schedulers of a large network.
ANNOUNCEMENTS_BUFFERED_MAX = 256


class Subscription:
    """An endless iterator over (signer, message)."""

    def __init__(self) -> None:
        self._heard: deque[tuple[Peer, Message]] = deque(maxlen=ANNOUNCEMENTS_BUFFERED_MAX)
        self._more = trio.Event()

    def put(self, signer: Peer, message: Message) -> None:
        """Keep it for the reader; the oldest makes room."""
        if len(self._heard) == ANNOUNCEMENTS_BUFFERED_MAX:
            metrics.MESSAGES_REFUSED.add(1, reason="lagging")
        self._heard.append((signer, message))
        self._more.set()

    def __aiter__(self) -> AsyncIterator[tuple[Peer, Message]]:
        """Itself."""
        return self

    async def __anext__(self) -> tuple[Peer, Message]:
        """Wait for the next announcement."""
        await trio.lowlevel.checkpoint()
        while not self._heard:
            self._more = trio.Event()
            await self._more.wait()
        return self._heard.popleft()


class Topics:
    """The subscriptions of one node."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._subscriptions: dict[str, list[Subscription]] = {}

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[AsyncIterator[tuple[Peer, Message]]]:
        """Listen on the topic while the context is open."""
        subscription = Subscription()
        self._subscriptions.setdefault(topic, []).append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions[topic].remove(subscription)
            if not self._subscriptions[topic]:
                del self._subscriptions[topic]

    def topics(self) -> list[str]:
        """The topics somebody here listens on, sorted."""
        return sorted(self._subscriptions)

    def hear(self, topic: str, signer: Peer, data: bytes) -> bool:
        """Hand an announcement to whoever listens; False when it was dropped as too big or malformed."""
        try:
            message = self._refusals.decode(signer.peer_id, data, bytes_max=GOSSIP_BYTES_MAX)
        except Refused:
            return False
        for subscription in self._subscriptions.get(topic, ()):
            subscription.put(signer, message)
        return True
