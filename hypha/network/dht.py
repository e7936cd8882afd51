"""The Kademlia DHT: who is where, and who provides what.

    provide(key) ─▶ sha256 multihash ─▶ ADD_PROVIDER to the closest peers, again every few minutes and after each
                                        new gateway: a gateway that restarts has forgotten everything
    find_providers(key) ─▶ gateways, then the closest peers are asked, all at once; nothing is answered from a cache
    lookup(peer) ─▶ FIND_NODE to gateways first, then the usual walk; addresses end in the peerstore

Every node is a server: networks are small, and a client-mode node is asked by others all the same.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service

from hypha.network.patches import FOREIGN, KAD_QUERY_S
from hypha.runtime import Runtime
from hypha.telemetry import get_logger, metrics

PREFIX = TProtocol("/hypha")
# Well inside `patches.PROVIDER_RECORD_S`, so that three announcements may get lost.
ANNOUNCE_S = 300.0
# One node announces a handful of datasets; beyond this it is a bug.
KEYS_MAX = 1024
# One node's announcements to one peer per 10 s: upstream allows 10 and drops the rest silently.
ANNOUNCEMENTS_PER_WINDOW_MAX = KEYS_MAX
# Kademlia's k: the closest peers asked for providers.
ASKED_MAX = 20
LOOKUP_S = 6.0
# When the gateways know providers, others are waited for only so long: a dead peer would hold each lookup for LOOKUP_S.
MORE_S = 1.0
MEASURE_S = 10.0

log = get_logger("network.dht")


def record_key(key: str) -> bytes:
    """Return the multihash (sha256, 32 bytes) under which a key's providers are filed."""
    return b"\x12\x20" + hashlib.sha256(key.encode()).digest()


class Dht:
    """A node's part of the DHT. `gateways` are the ids of the gateways it is connected to."""

    def __init__(self, host: BasicHost, runtime: Runtime, gateways: Callable[[], list[ID]]) -> None:
        self._kad = KadDHT(host, DHTMode.SERVER, protocol_prefix=PREFIX, strict_validation=True, max_peers_per_subnet=0)
        self._kad._provider_rate_max = ANNOUNCEMENTS_PER_WINDOW_MAX
        self._host = host
        self._me = host.get_id()
        self._runtime = runtime
        self._gateways = gateways
        self._keys: set[str] = set()
        self._announce_now = trio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part while the context is open."""
        async with background_trio_service(self._kad), trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_announcing)
            nursery.start_soon(self._measure)
            yield
            nursery.cancel_scope.cancel()

    async def introduce(self, peer_id: ID) -> None:
        """A gateway has been connected: learn from it whom it knows, and announce everything to it."""
        with trio.move_on_after(LOOKUP_S):
            await self._ask_for(peer_id, self._me)
            await self._kad.add_peer(peer_id, skip_server_mode_check=True)
        self._announce_now.set()

    async def provide(self, key: str) -> None:
        """Announce the key now, and again and again."""
        assert len(self._keys) < KEYS_MAX or key in self._keys, "a node provides a handful of datasets"
        self._keys.add(key)
        await self._announce(key)

    async def find_providers(self, key: str, *, wanted: int) -> list[str]:
        """Return up to `wanted` peers that announced the key, never this node."""
        record = record_key(key)
        found = {str(info.peer_id) for info in self._kad.provider_store.get_providers(record)}
        asked: set[ID] = set()
        with trio.move_on_after(LOOKUP_S) as patience:
            await self._gather(self._gateways(), record, found, asked)
            if found - {str(self._me)}:
                patience.deadline = min(patience.deadline, trio.current_time() + MORE_S)
            if len(found - {str(self._me)}) < wanted:
                await self._gather(await self._closest(record), record, found, asked)
        found.discard(str(self._me))
        metrics.DHT_QUERIES.add(1, status="success" if found else "failure")
        return sorted(found)[:wanted]

    async def lookup(self, peer_id: ID) -> None:
        """Ask where a peer is; what is found lies in the peerstore afterwards."""
        with trio.move_on_after(LOOKUP_S):
            async with trio.open_nursery() as nursery:
                for gateway in self._gateways():
                    nursery.start_soon(self._ask_for, gateway, peer_id)
            if not self._knows(peer_id):
                await self._closest(peer_id.to_bytes())
        metrics.DHT_QUERIES.add(1, status="success" if self._knows(peer_id) else "failure")

    def _knows(self, peer_id: ID) -> bool:
        try:
            return bool(self._host.get_peerstore().addrs(peer_id))
        except FOREIGN:
            return False

    async def _ask_for(self, asked: ID, wanted: ID) -> None:
        try:
            await self._kad.peer_routing._query_peer_for_closest(asked, wanted.to_bytes())
        except FOREIGN as error:
            log.debug("DHT query failed", peer_id=str(asked), reason=str(error))

    async def _closest(self, key: bytes) -> list[ID]:
        try:
            return await self._kad.peer_routing.find_closest_peers_network(key)
        except FOREIGN as error:
            log.debug("DHT lookup failed", reason=str(error))
            return []

    async def _gather(self, peers: Iterable[ID], record: bytes, found: set[str], asked: set[ID]) -> None:
        async def ask(peer_id: ID) -> None:
            with trio.move_on_after(KAD_QUERY_S):
                try:
                    providers, _ = await self._kad.provider_store._get_providers_from_peer_with_closers(peer_id, record)
                except FOREIGN as error:
                    log.debug("DHT query failed", peer_id=str(peer_id), reason=str(error))
                    return
                for info in providers:
                    found.add(str(info.peer_id))
                    if info.addrs and info.peer_id != self._me:
                        self._host.get_peerstore().add_addrs(info.peer_id, info.addrs, int(ANNOUNCE_S))

        async with trio.open_nursery() as nursery:
            for peer_id in list(peers)[:ASKED_MAX]:
                if peer_id not in asked and peer_id != self._me:
                    asked.add(peer_id)
                    nursery.start_soon(ask, peer_id)

    async def _announce(self, key: str) -> None:
        try:
            with trio.move_on_after(LOOKUP_S):
                await self._kad.provider_store.provide(record_key(key))
        except FOREIGN as error:
            log.debug("Announcement failed", key=key, reason=str(error))

    async def _keep_announcing(self) -> None:
        while True:
            with trio.move_on_after(ANNOUNCE_S * (0.75 + 0.5 * self._runtime.random.random())):
                await self._announce_now.wait()
            self._announce_now = trio.Event()
            for key in sorted(self._keys):
                await self._announce(key)

    async def _measure(self) -> None:
        while True:
            metrics.DHT_TABLE_PEERS.set(self._kad.get_routing_table_size())
            await trio.sleep(MEASURE_S)
