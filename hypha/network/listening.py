"""Opening the node's port, and counting who is connected.

listen_addresses ─▶ can it be bound? ─▶ swarm.listen
                     └ no: ConfigError with what the system says
"""

import socket

from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.network.connection.swarm_connection import SwarmConn
from multiaddr import Multiaddr

from hypha.errors import ConfigError
from hypha.network.addresses import host_of, value
from hypha.network.patches import Swarm
from hypha.telemetry import metrics


async def listen(swarm: Swarm, addresses: tuple[Multiaddr, ...]) -> None:
    """Listen on all of them. Raises ConfigError naming the key; `try_to_bind` gives the reason."""
    for address in addresses:
        if not await swarm.listen(address):
            raise ConfigError(f"`listen_addresses`: cannot listen on {address}")


def try_to_bind(address: Multiaddr) -> None:
    """Bind the port for a moment, since the swarm swallows the reason. Raises ConfigError with what the system says."""
    host, port = host_of(address), value(address, "tcp")
    if host is None or port is None:
        raise ConfigError(f"`listen_addresses`: {address} names no interface and port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise ConfigError(f"`listen_addresses`: {address}: {(error.strerror or str(error)).lower()}") from error


class Census(INotifee):
    """Keeps the connection metrics."""

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """One more."""
        direction = conn.direction.value if isinstance(conn, SwarmConn) else "unknown"
        metrics.CONNECTIONS_ESTABLISHED.add(1, direction=str(direction))
        metrics.CONNECTIONS_ACTIVE.add(1)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """One less."""
        metrics.CONNECTIONS_ACTIVE.add(-1)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not counted."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not counted."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Not counted."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Not counted."""
