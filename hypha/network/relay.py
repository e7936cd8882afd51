"""Relaying through gateways: libp2p's circuit relay v2, with our mutual TLS from end to end inside the circuit.

    dialer ──HOP CONNECT──▶ gateway ──STOP CONNECT──▶ peer that reserved a place and stays connected
       └──────────── mutual TLS, multiplexer, everything ─────────────┘        the gateway sees ciphertext

A gateway serves HOP within limits. Every other node reserves a place at each gateway it is connected to, renews it at
half its time, and announces the circuit address. py-libp2p's relaying loop gives up on a reader that is slow for 10 s
and ends all circuits of a peer with the first; it is replaced by one that passes back-pressure on.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import trio
from libp2p.abc import INetStream
from libp2p.host.basic_host import BasicHost
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID, CircuitV2Protocol
from libp2p.relay.circuit_v2.resources import RelayLimits
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from hypha.network.patches import FOREIGN
from hypha.network.yamux_stream import WINDOW_BYTES, YamuxStream
from hypha.runtime import Runtime
from hypha.telemetry import get_logger, metrics

# A circuit is torn down after a day or a TiB, so that nobody forgets one; both ends then dial again.
CIRCUIT_S = 86_400
CIRCUIT_BYTES = 1 << 40
# Circuits to one node at once, and nodes that may reserve: a gateway's fan-out.
CIRCUITS_PER_NODE_MAX = 64
RESERVATIONS_MAX = 1024
# A reservation is renewed at half its time, and asked for again so soon after a refusal.
RENEW_SHARE = 0.5
# A gateway whose clock is set forward forgets its places; that must not last.
RENEW_MAX_S = 300.0
RETRY_S = 10.0
RESERVE_S = 10.0

log = get_logger("network.relay")


class _Protocol(CircuitV2Protocol):
    async def _relay_data(
        self,
        src_stream: INetStream,
        dst_stream: INetStream,
        peer_id: ID,
        deadline: float | None = None,
        circuit_data_limit: list[int] | None = None,
    ) -> None:
        """Carry one direction of a circuit; its end, or a limit, ends the other direction, too."""
        source, target = _muxed(src_stream), _muxed(dst_stream)
        budget = circuit_data_limit or [CIRCUIT_BYTES]
        patience_s = CIRCUIT_S if deadline is None else deadline - time.monotonic()
        metrics.RELAY_CIRCUITS_ACTIVE.add(0.5)
        metrics.RELAY_CIRCUITS.add(0.5)
        try:
            with trio.move_on_after(patience_s):
                while budget[0] > 0 and (chunk := await source.receive_chunk(WINDOW_BYTES)):
                    budget[0] -= len(chunk)
                    metrics.RELAY_BYTES.add(len(chunk))
                    await target.write(chunk)
        except MuxedStreamError as error:
            log.debug("Circuit broke", peer_id=str(peer_id), reason=str(error))
        finally:
            metrics.RELAY_CIRCUITS_ACTIVE.add(-0.5)
            self._active_relays.pop(peer_id, None)
            source.reset_now()
            target.reset_now()


def _muxed(stream: INetStream) -> YamuxStream:
    return cast(YamuxStream, cast(NetStream, stream).muxed_stream)


class Relay:
    """A node's part in relaying; with `serves` it relays for others."""

    def __init__(self, host: BasicHost, runtime: Runtime, *, serves: bool) -> None:
        limits = RelayLimits(
            duration=CIRCUIT_S,
            data=CIRCUIT_BYTES,
            max_circuit_conns=CIRCUITS_PER_NODE_MAX,
            max_reservations=RESERVATIONS_MAX,
        )
        self._host = host
        self._runtime = runtime
        self._protocol = _Protocol(host, limits, allow_hop=serves)
        # Without the role CLIENT: it would reserve a place before each dial.
        roles = RelayRole.STOP | RelayRole.HOP if serves else RelayRole.STOP
        self._transport = CircuitV2Transport(host, self._protocol, RelayConfig(roles=roles, limits=limits))
        self._places: dict[ID, Multiaddr] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Accept circuits, and relay them where this node serves, while the context is open."""
        async with background_trio_service(self._protocol):
            yield

    def circuits(self) -> list[Multiaddr]:
        """Addresses under which this node can be reached through the gateways that keep a place for it."""
        me = self._host.get_id()
        return [Multiaddr(f"{address}/p2p-circuit/p2p/{me}") for _, address in sorted(self._places.items(), key=str)]

    async def dial(self, peer_id: ID, circuit: Multiaddr) -> None:
        """Connect to a peer through a relay. Raises what py-libp2p raises."""
        await self._transport.dial(circuit)

    async def keep_place(self, gateway: ID, address: Multiaddr) -> None:
        """Reserve a place at a gateway and renew it, until cancelled; `address` includes the gateway's peer id."""
        try:
            while True:
                if await self._reserve(gateway):
                    self._places[gateway] = address
                    lasts_s = self._transport._reservations[gateway] - time.time()
                    await self._runtime.sleep(min(max(RETRY_S, lasts_s * RENEW_SHARE), RENEW_MAX_S))
                else:
                    self._places.pop(gateway, None)
                    await self._runtime.sleep(RETRY_S * (0.5 + self._runtime.random.random()))
        finally:
            self._places.pop(gateway, None)

    async def _reserve(self, gateway: ID) -> bool:
        with trio.move_on_after(RESERVE_S):
            try:
                stream = await self._host.new_stream(gateway, [PROTOCOL_ID])
                try:
                    return await self._transport._make_reservation(stream, gateway)
                finally:
                    _muxed(stream).reset_now()
            except FOREIGN as error:
                log.debug("No place at a gateway", peer_id=str(gateway), reason=str(error))
        return False
