"""Staying connected to the gateways that the configuration names, for ever.

    address ─▶ whose is it? (/p2p/… or ask) ─▶ dial ─▶ connected ─▶ introduce: DHT, relay ─▶ until it closes ─┐
                        ▲                        └ failed: backoff with jitter, 0.2 s to 15 s                 │
                        └──────────────────────────────────────────────────────────────────────────────────────┘

"No gateway reachable" is logged when it has been true for a moment and not again; so is the return. The moment lets a
network be shut down as a whole, in any order, without every node complaining of the others.
"""

import math
from collections.abc import Awaitable, Callable

import trio
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from hypha.errors import PeerUnreachable
from hypha.network.addresses import value
from hypha.network.dialer import Dialer
from hypha.network.probe import identify
from hypha.network.retry import Backoff
from hypha.network.yamux import Yamux
from hypha.pki import Identity
from hypha.runtime import Runtime
from hypha.telemetry import get_logger

GATEWAY = "gateway"  # the role, as certificates name it
BACKOFF_BASE_S = 0.2
BACKOFF_MAX_S = 15.0
# A gateway lost for less is no news: it restarts, or this node is being stopped along with it.
UNREACHABLE_S = 2.0

# Called with the gateway's id and the address it was reached at, peer id included; cancelled when the connection ends.
Introduce = Callable[[ID, Multiaddr], Awaitable[None]]

log = get_logger("network.gateways")


class Gateways:
    """The configured gateways, and which of them this node is connected to."""

    def __init__(
        self,
        addresses: tuple[Multiaddr, ...],
        identity: Identity,
        dialer: Dialer,
        runtime: Runtime,
        introduce: Introduce,
    ) -> None:
        self._addresses = addresses
        self._identity = identity
        self._dialer = dialer
        self._runtime = runtime
        self._introduce = introduce
        self._connected: dict[ID, Multiaddr] = {}
        self._failing: dict[str, str] = {}
        self._reachable: bool | None = None
        self._lost_at = -math.inf
        self._scope = trio.CancelScope()
        self.first_connected = trio.Event()
        self.all_tried = trio.Event()

    def connected(self) -> list[ID]:
        """Gateways with an open connection."""
        return [peer_id for peer_id in self._connected if self._dialer.live(peer_id) is not None]

    def addresses(self) -> list[Multiaddr]:
        """Where the connected gateways were reached, peer ids included."""
        return [self._connected[peer_id] for peer_id in self.connected()]

    async def keep(self) -> None:
        """Hold a connection to each of them until `let_go`."""
        with self._scope:
            await self._keep_all()

    def let_go(self) -> None:
        """Stop redialling: the network is closing."""
        self._scope.cancel()

    async def _keep_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for address in self._addresses:
                nursery.start_soon(self._keep_one, address)

    async def _keep_one(self, address: Multiaddr) -> None:
        backoff = Backoff(self._runtime, base_s=BACKOFF_BASE_S, max_s=BACKOFF_MAX_S)
        while True:
            try:
                peer_id, conn = await self._reach(address)
            except PeerUnreachable as error:
                self._note(address, str(error))
                await backoff.wait()
                continue
            if conn is None:
                return  # this node itself is that gateway
            backoff.reset()
            self._connected[peer_id] = Multiaddr(f"{str(address).partition('/p2p/')[0]}/p2p/{peer_id}")
            self._note(address, None)
            await self._until_closed(peer_id, conn)
            del self._connected[peer_id]
            self._lost_at = self._runtime.now()
            self._note(address, "the connection ended")
            await backoff.wait()

    async def _reach(self, address: Multiaddr) -> tuple[ID, SwarmConn | None]:
        named = value(address, "p2p")
        peer_id = ID.from_string(named or (await identify(self._identity, address)).peer_id)
        if str(peer_id) == self._identity.peer_id:
            return peer_id, None
        if self._dialer.live(peer_id) is None and (reason := await self._dialer.dial(peer_id, address)) is not None:
            raise PeerUnreachable(reason)
        conn = self._dialer.live(peer_id)
        if conn is None or not isinstance(conn.muxed_conn, Yamux):
            raise PeerUnreachable("the connection ended at once")
        if GATEWAY not in conn.muxed_conn.secured_conn.identity.roles:
            raise PeerUnreachable(f"{peer_id} is not a gateway by its certificate")
        return peer_id, conn

    async def _until_closed(self, peer_id: ID, conn: SwarmConn) -> None:
        assert isinstance(conn.muxed_conn, Yamux)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._introduce, peer_id, self._connected[peer_id])
            await conn.muxed_conn.event_closed.wait()
            nursery.cancel_scope.cancel()

    def _note(self, address: Multiaddr, reason: str | None) -> None:
        if reason is None:
            self._failing.pop(str(address), None)
            self.first_connected.set()
        else:
            self._failing[str(address)] = reason
        if len(self._failing) + len(self._connected) >= len(self._addresses):
            self.all_tried.set()
        reachable = bool(self._connected) or self._runtime.now() - self._lost_at < UNREACHABLE_S
        if reachable == self._reachable or not (reachable or self.all_tried.is_set()):
            return
        self._reachable = reachable
        if reachable:
            log.info("Gateway connected", address=str(address))
        else:
            why = "; ".join(f"{where}: {what}" for where, what in sorted(self._failing.items()))
            log.warn("No gateway reachable; trying on", reasons=why)
