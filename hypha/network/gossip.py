"""Signed gossip (gossipsub 1.2): small announcements that flood the network and may get lost.

    publish ─▶ 64 KiB? ─▶ sign ─▶ neighbours ─▶ validator: signed, decodable? ─▶ Topics ─▶ subscriptions
                                                └ no: counted, logged once per signer, goes no further

    worker ◀──┐           ┌──▶ worker       a gateway passes on to every subscriber it is connected to,
    worker ◀── gateway ◀── scheduler        everybody else to up to 6 neighbours and to every gateway
                  └──▶ gateway ──▶ …

Nodes know gateways and few others, so a mesh of a few neighbours each would leave out most of a gateway's nodes. Who
subscribes carries for others; a gateway always does. A publisher does not hear itself.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial

import trio
from libp2p.abc import ISubscriptionAPI
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from hypha.network.dispatch import Refusals, prepare
from hypha.network.patches import FOREIGN
from hypha.network.seam import Peer
from hypha.network.topics import Topics
from hypha.protocol.codec import GOSSIP_BYTES_MAX, encode
from hypha.protocol.messages import Message
from hypha.telemetry import get_logger, metrics

# libp2p's recommendation for the mesh (gossipsub v1.0, "parameters").
DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 9
HEARTBEAT_S = 1
# Upstream's spam protection drops what exceeds this per peer and topic, forwarded messages included.
MESSAGES_PER_S_MAX = 1000.0
# One RPC may carry several messages and control entries besides.
RPC_BYTES_MAX = 4 * GOSSIP_BYTES_MAX
MEASURE_S = 10.0

log = get_logger("network.gossip")


class _Pubsub(Pubsub):
    """Upstream runs this for every message heard, as a task of the service: an error in it would end the service."""

    refusals: Refusals

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Take in or pass on one message; what cannot even be judged is dropped and counted."""
        try:
            await super().push_msg(msg_forwarder, msg)
        except FOREIGN as error:
            self.refusals.note(str(msg_forwarder), "malformed", f"gossip: {error}")


class _Router(GossipSub):
    """Gossipsub's mesh, and gateways besides it: they need no mesh to pass on to all who are connected to them."""

    is_gateway: bool
    gateways: Callable[[], list[ID]]

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        """Return whom a message goes to now."""
        assert self.pubsub is not None, "attached before it runs"
        chosen = set(super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id))
        gateways = () if self.is_gateway else self.gateways()
        for topic in topic_ids:
            subscribed = self.pubsub.peer_topics.get(topic, set())
            chosen |= subscribed if self.is_gateway else subscribed.intersection(gateways)
        return chosen - {msg_forwarder, origin}

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Iterable[str]) -> None:
        """Announcements are small: to say that one is not wanted costs as much as the announcement (gossipsub 1.2)."""


class Gossip:
    """A node's part in gossip. `peer_of` gives a signer's roles, as far as they are known; `gateways` who is connected.

    With `is_gateway` this node passes on to everybody.
    """

    def __init__(
        self,
        host: BasicHost,
        topics: Topics,
        refusals: Refusals,
        peer_of: Callable[[str], Peer],
        *,
        gateways: Callable[[], list[ID]],
        is_gateway: bool,
    ) -> None:
        self._router = _Router(
            protocols=[PROTOCOL_ID_V12, PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            max_messages_per_topic_per_second=MESSAGES_PER_S_MAX,
        )
        self._router.gateways, self._router.is_gateway = gateways, is_gateway
        self._pubsub = _Pubsub(host, self._router, strict_signing=True, max_inbound_rpc_size=RPC_BYTES_MAX)
        self._pubsub.refusals = refusals
        # Upstream counts from the second of its start: after a busy life and a restart, its messages would look seen.
        self._pubsub.counter = time.time_ns()
        self._me = host.get_id()
        self._topics = topics
        self._peer_of = peer_of
        self._joined: dict[str, int] = {}
        self._nursery: trio.Nursery

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part while the context is open."""
        async with (
            background_trio_service(self._pubsub),
            background_trio_service(self._router),
            trio.open_nursery() as self._nursery,
        ):
            await self._pubsub.wait_until_ready()
            self._nursery.start_soon(self._measure)
            yield
            self._nursery.cancel_scope.cancel()

    async def publish(self, topic: str, message: Message) -> None:
        """Announce. Raises LocalProtocolError over 64 KiB; says nothing about who hears it."""
        data = encode(prepare(message), bytes_max=GOSSIP_BYTES_MAX)
        try:
            await self._pubsub.publish(topic, data)
        except FOREIGN as error:
            log.warn("Announcement lost", topic=topic, reason=str(error))

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[AsyncIterator[tuple[Peer, Message]]]:
        """Listen on the topic while the context is open."""
        async with self.carried(topic), self._topics.subscribe(topic) as announcements:
            yield announcements

    @asynccontextmanager
    async def carried(self, topic: str) -> AsyncIterator[None]:
        """Be part of the topic's mesh while the context is open, whether or not anybody here listens."""
        self._joined[topic] = self._joined.get(topic, 0) + 1
        try:
            if self._joined[topic] == 1:
                await self._join(topic)
            yield
        finally:
            self._joined[topic] -= 1
            if not self._joined[topic]:
                del self._joined[topic]
                with trio.move_on_after(1) as scope:
                    scope.shield = True
                    await self._leave(topic)

    async def _join(self, topic: str) -> None:
        self._pubsub.set_topic_validator(topic, partial(self._hear, topic), is_async_validator=False)
        subscription = await self._pubsub.subscribe(topic)
        self._nursery.start_soon(_drain, subscription)

    async def _leave(self, topic: str) -> None:
        self._pubsub.remove_topic_validator(topic)
        try:
            await self._pubsub.unsubscribe(topic)
        except FOREIGN as error:
            log.debug("Leaving a topic failed", topic=topic, reason=str(error))

    def _hear(self, topic: str, _forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Validate a signed message, and hand it over: py-libp2p asks once for each before it passes it on."""
        if message.from_id == self._me.to_bytes():
            return True
        return self._topics.hear(topic, self._peer_of(str(ID(message.from_id))), message.data)

    async def _measure(self) -> None:
        while True:
            for topic, peers in list(self._router.mesh.items()):
                metrics.GOSSIP_MESH_PEERS.set(len(peers), topic=topic)
            await trio.sleep(MEASURE_S)


async def _drain(subscription: ISubscriptionAPI) -> None:
    """Empty upstream's own queue: the validator has handed everything over already."""
    async for _ in subscription:
        pass
