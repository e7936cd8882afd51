"""The libp2p network: one node's host, put together from its parts.

    TCP ─ mtls ─ yamux ─ swarm ─┬─ streams, rpc ──▶ Dispatcher (handlers)
              ├ probe           ├─ dht · gossip ──▶ Topics
              └ bulk            ├─ relay          (circuits through gateways)
    dialer: how to get to a peer┘  gateways       (held for ever)

    async with open_network(identity, config, role="worker", runtime=runtime) as network: …

Nothing here retries on behalf of a caller, and no connection's end is reported as a peer's death.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol, TypeVar, cast

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from hypha.errors import HyphaError, LocalProtocolError, PeerUnreachable, RemoteProtocolError
from hypha.network import addresses, listening, mtls, patches, rpc, streams, yamux
from hypha.network.bulk import BulkTransport
from hypha.network.dht import Dht
from hypha.network.dialer import Dialer, Routes
from hypha.network.dispatch import Dispatcher, prepare
from hypha.network.gateways import Gateways
from hypha.network.gossip import Gossip
from hypha.network.relay import Relay
from hypha.network.revocation import Revocation
from hypha.network.seam import Peer, RequestHandler, Stream, StreamHandler
from hypha.network.streams import Libp2pStream
from hypha.network.swarm import build_swarm
from hypha.network.topics import Topics
from hypha.network.yamux_stream import YamuxStream
from hypha.pki import Identity, PeerIdentity
from hypha.protocol.messages import (
    PROTOCOL_API,
    PROTOCOL_HEALTH,
    PROTOCOL_PROGRESS,
    PROTOCOL_STREAM,
    TOPIC_WORKER,
    Message,
    Request,
)
from hypha.runtime import Runtime
from hypha.telemetry import get_logger

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

RPC_PROTOCOLS = frozenset({PROTOCOL_API, PROTOCOL_HEALTH, PROTOCOL_PROGRESS})
OUR_PROTOCOLS = RPC_PROTOCOLS | {PROTOCOL_STREAM}
# A stream says what it is for in its first bytes.
NEGOTIATION_S = 10.0
# At start a node gives its gateways this long, so that it usually begins connected; then it goes on without.
FIRST_GATEWAY_S = 3.0
CLOSE_S = 1.5
# Certificates seen, for the roles of gossip's signers.
PEERS_REMEMBERED_MAX = 4096

log = get_logger("network")


class NetworkConfig(Protocol):
    """The network keys of `hypha.config.NodeConfig`."""

    @property
    def gateway_addresses(self) -> tuple[str, ...]: ...
    @property
    def listen_addresses(self) -> tuple[str, ...]: ...
    @property
    def external_addresses(self) -> tuple[str, ...]: ...
    @property
    def exclude_cidr(self) -> tuple[str, ...]: ...
    @property
    def relay_circuit(self) -> bool: ...


class Libp2pNetwork:
    """`seam.Network` over py-libp2p. Made and run by `open_network`."""

    def __init__(self, identity: Identity, config: NetworkConfig, *, role: str, runtime: Runtime) -> None:
        self._identity = identity
        self._runtime = runtime
        self._role = role
        self._uses_relays = config.relay_circuit
        self._key = Ed25519PrivateKey.from_private_bytes(identity.private_key)
        self._peers: OrderedDict[str, PeerIdentity] = OrderedDict()
        self._listen = tuple(addresses.parse("listen_addresses", text) for text in config.listen_addresses)
        self._external = tuple(addresses.parse("external_addresses", text) for text in config.external_addresses)
        self._gateway = tuple(addresses.parse("gateway_addresses", text) for text in config.gateway_addresses)
        self._excluded = addresses.parse_networks("exclude_cidr", config.exclude_cidr)
        self._dispatcher = Dispatcher()
        self._tls = mtls.MutualTls(identity, self._admit)
        self._bulk = BulkTransport(identity, self._tls)
        self._swarm = build_swarm(identity, self._tls, self._dispatcher, self._bulk)
        self._host = BasicHost(
            network=self._swarm,
            addrs_factory=lambda found: self._advertised(found),
            disable_identify_address_discovery=True,
        )
        self._swarm.set_stream_handler(self._on_stream)
        self._topics = Topics(self._dispatcher.refusals)
        self._gossip = Gossip(
            self._host,
            self._topics,
            self._dispatcher.refusals,
            self._peer_named,
            gateways=self._connected_gateways,
            is_gateway=role == "gateway",
        )
        self._dht = Dht(self._host, runtime, self._connected_gateways)
        self._relay = Relay(self._host, runtime, serves=role == "gateway")
        self._revocation = Revocation(identity, self._swarm, runtime)
        self._dialer: Dialer
        self._gateways: Gateways

    # --- seam.Network -----------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """This node's own peer id (base58)."""
        return self._identity.peer_id

    async def request(self, peer_id: str, message: Request[R]) -> R:
        """Send one request and return its answer; see `seam.Network`."""
        return await rpc.ask(self._open, peer_id, message)

    def serve(self, kind: type[M], handler: RequestHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """Answer requests of `kind` from peers that hold one of `roles` (None: any certificate)."""
        self._dispatcher.serve(kind, handler, roles=roles)

    async def publish(self, topic: str, message: Message) -> None:
        """Gossip a message; delivery is likely, never certain. Raises LocalProtocolError over 64 KiB."""
        await self._gossip.publish(topic, message)

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[AsyncIterator[tuple[Peer, Message]]]:
        """Yield (signer, message) for everything heard on the topic while the context is open."""
        return self._gossip.subscribe(topic)

    async def provide(self, key: str) -> None:
        """Announce in the DHT that this node holds `key`, and keep announcing while the network runs."""
        await self._dht.provide(key)

    async def find_providers(self, key: str, *, wanted: int) -> list[str]:
        """Return up to `wanted` peer ids that announced `key`; an empty list is a possible answer."""
        return await self._dht.find_providers(key, wanted=wanted)

    async def open_stream(self, peer_id: str, header: Message) -> Stream:
        """Open a stream whose first frame is `header`. Raises PeerUnreachable."""
        stream = await self._open(peer_id, PROTOCOL_STREAM)
        await stream.send_message(prepare(header))
        return stream

    def accept_streams(self, kind: type[M], handler: StreamHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """Run `handler(stream, header)` for each stream opened with a header of `kind`; it is closed afterwards."""
        self._dispatcher.accept_streams(kind, handler, roles=roles)

    def signed_addresses(self) -> bytes:
        """Return this node's dialable addresses, signed with its key, to be carried in messages."""
        return addresses.sign(
            self._key, self.peer_id, self._advertised(self._host.get_transport_addrs(), circuits=True)
        )

    def learn(self, peer_id: str, signed: bytes) -> None:
        """Remember where `peer_id` can be dialled. Raises RemoteProtocolError if its signature does not match."""
        self._dialer.learn(_id(peer_id), addresses.verify(peer_id, signed))

    def connected_peers(self) -> list[Peer]:
        """Return the peers that a connection is open to, sorted by id. Not a statement about who lives."""
        found = {
            conn.muxed_conn.secured_conn.identity
            for conns in self._swarm.connections.values()
            for conn in conns
            if isinstance(conn.muxed_conn, yamux.Yamux) and conn.muxed_conn.is_established
        }
        peers = {each.peer_id: Peer(each.peer_id, each.roles) for each in found}
        return [peers[peer_id] for peer_id in sorted(peers)]

    # --- beyond the seam --------------------------------------------------------------------------------------------

    def listen_addresses(self) -> list[str]:
        """Where this node listens, wildcards replaced, peer id included: what a configuration elsewhere may name."""
        return [f"{each}/p2p/{self.peer_id}" for each in addresses.expand(self._host.get_transport_addrs())]

    def check_ports(self) -> None:
        """Raise ConfigError, naming the key, when a port cannot be had."""
        for address in self._listen:
            listening.try_to_bind(address)

    async def reload_crls(self) -> bool:
        """Read the revocation lists now; see `Revocation.reload`."""
        return await self._revocation.reload()

    # --- running ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen, join, and stay while the context is open."""
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            # Last of all: services that were cancelled would replace the caller's exception by their own.
            stack.callback(nursery.cancel_scope.cancel)
            self._start_dialing(nursery)
            await stack.enter_async_context(background_trio_service(self._swarm))
            stack.push_async_callback(self._close)
            await listening.listen(self._swarm, self._listen)
            for part in (self._relay, self._dht, self._gossip):
                await stack.enter_async_context(part.running())
            if self._role == "gateway":
                await stack.enter_async_context(self._gossip.carried(TOPIC_WORKER))
            nursery.start_soon(self._gateways.keep)
            nursery.start_soon(self._revocation.keep)
            stack.callback(self._gateways.let_go)
            await self._wait_for_gateway()
            log.info("Listening", addresses=", ".join(self.listen_addresses()), peer_id=self.peer_id)
            yield

    def _start_dialing(self, nursery: trio.Nursery) -> None:
        routes = Routes(
            lookup=self._dht.lookup,
            circuit=self._relay.dial,
            relays=lambda: self._gateways.addresses(),
            uses_relays=self._uses_relays,
            excluded=self._excluded,
        )
        self._dialer = Dialer(self._swarm, routes, self._runtime, nursery)
        self._swarm.dial = self._dialer.connect_unless_busy
        self._gateways = Gateways(self._gateway, self._identity, self._dialer, self._runtime, self._introduce)

    async def _wait_for_gateway(self) -> None:
        if not self._gateway:
            return
        with trio.move_on_after(FIRST_GATEWAY_S):
            async with trio.open_nursery() as nursery:

                async def first_of(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(first_of, self._gateways.first_connected)
                nursery.start_soon(first_of, self._gateways.all_tried)

    async def _introduce(self, gateway: ID, address: Multiaddr) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dht.introduce, gateway)
            if self._uses_relays and self._role != "gateway":
                nursery.start_soon(self._relay.keep_place, gateway, address)

    async def _close(self) -> None:
        with trio.move_on_after(CLOSE_S) as scope:
            scope.shield = True
            async with trio.open_nursery() as nursery:
                for conns in list(self._swarm.connections.values()):
                    for conn in conns:
                        nursery.start_soon(conn.close)
            await self._host.close()

    # --- streams ----------------------------------------------------------------------------------------------------

    async def _open(self, peer_id: str, protocol: str) -> Libp2pStream:
        target = _id(peer_id)
        if peer_id == self.peer_id:
            raise LocalProtocolError("a node does not talk to itself over the network")
        for _ in range(2):  # the connection may end between having it and using it
            conn = await self._dialer.connect(target)
            muxed = cast(yamux.Yamux, conn.muxed_conn)
            try:
                stream = await muxed.open_stream()
            except MuxedStreamError as error:
                reason = str(error)
                continue
            if protocol == PROTOCOL_STREAM:
                stream.expect_much()
            peer = muxed.secured_conn.identity
            return Libp2pStream.proposing(stream, Peer(peer.peer_id, peer.roles), protocol, self._bulk)
        raise PeerUnreachable(f"{peer_id}: no stream could be opened: {reason}")

    async def _on_stream(self, net_stream: INetStream) -> None:
        """Give a stream that a peer opened to whom it is for. Raises nothing but cancellation."""
        muxed = cast(YamuxStream, cast(NetStream, net_stream).muxed_stream)
        theirs = cast(Collection[str], self._host.multiselect.handlers)
        try:
            with trio.fail_after(NEGOTIATION_S):
                agreed = await streams.negotiate(muxed, lazy=OUR_PROTOCOLS, eager=theirs)
        except (MuxedStreamError, RemoteProtocolError, trio.TooSlowError):
            agreed = None
        if agreed is None:
            muxed.reset_now()
        elif agreed.protocol in OUR_PROTOCOLS:
            await self._serve_stream(muxed, agreed)
        else:
            await self._pass_on(net_stream, TProtocol(agreed.protocol))

    async def _serve_stream(self, muxed: YamuxStream, agreed: streams.Agreed) -> None:
        peer = muxed.connection.secured_conn.identity
        stream = Libp2pStream(muxed, Peer(peer.peer_id, peer.roles), self._bulk, to_say=agreed.to_say)
        if agreed.protocol in RPC_PROTOCOLS:
            await rpc.answer(stream, self._dispatcher)
            return
        muxed.expect_much()
        await self._dispatcher.handle_stream(stream)

    async def _pass_on(self, net_stream: INetStream, protocol: TProtocol) -> None:
        net_stream.set_protocol(protocol)
        handler = self._host.multiselect.handlers[protocol]
        assert handler is not None, "only registered protocols are agreed on"
        try:
            await handler(net_stream)
        except patches.FOREIGN as error:
            log.debug("A protocol of libp2p failed", protocol=protocol, reason=str(error))
            await net_stream.reset()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _advertised(self, found: list[Multiaddr], *, circuits: bool = False) -> list[Multiaddr]:
        return addresses.advertised(
            listening=found,
            external=self._external,
            circuits=self._relay.circuits() if circuits else (),
            excluded=self._excluded,
        )

    def _admit(self, peer: PeerIdentity) -> None:
        self._peers[peer.peer_id] = peer
        self._peers.move_to_end(peer.peer_id)
        while len(self._peers) > PEERS_REMEMBERED_MAX:
            self._peers.popitem(last=False)

    def _peer_named(self, peer_id: str) -> Peer:
        known = self._peers.get(peer_id)
        return Peer(peer_id, frozenset() if known is None else known.roles)

    def _connected_gateways(self) -> list[ID]:
        return self._gateways.connected()


def _id(peer_id: str) -> ID:
    try:
        return ID.from_string(peer_id)
    except ValueError as error:
        raise RemoteProtocolError(f"{peer_id!r} is not a peer id") from error


@asynccontextmanager
async def open_network(
    identity: Identity, config: NetworkConfig, *, role: str, runtime: Runtime
) -> AsyncIterator[Libp2pNetwork]:
    """Run a node's network while the context is open; role "gateway" also relays and carries gossip for others.

    Raises ConfigError when an address does not parse or a port is taken.
    """
    patches.apply()
    network = Libp2pNetwork(identity, config, role=role, runtime=runtime)
    network.check_ports()
    failure: HyphaError | None = None
    async with network.running():
        try:
            yield network
        except HyphaError as error:
            failure = error  # raised again outside, where no nursery wraps it into a group
    if failure is not None:
        raise failure
