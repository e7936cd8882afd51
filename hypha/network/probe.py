"""Asking a node one thing without joining the network: a bare mutual TLS client, and the node's side of it.

    prober ──TCP── multistream-select: /hypha/probe/1.0.0 ── mutual TLS ── one framed request ──▶ node's dispatcher
       ◀───────────────────────────────────────────────── one framed answer, and the connection ends

There is no multiplexer, no listener, no DHT; the node does not take it for a peer. So a node can be probed with its
own certificate, and a gateway whose peer id is not configured can be asked for it.
"""

from typing import Never

import trio
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.exceptions import HandshakeFailure
from multiaddr import Multiaddr

from hypha.errors import ConfigError, PeerUnreachable, RemoteProtocolError
from hypha.network.addresses import host_of, parse, value
from hypha.network.dispatch import Dispatcher, interpret
from hypha.network.framing import framed, receive_frame
from hypha.network.mtls import HandshakeRefused, MutualTls, SecureConn
from hypha.network.patches import FOREIGN
from hypha.network.seam import Peer
from hypha.pki import Identity, PeerIdentity
from hypha.protocol.codec import encode
from hypha.protocol.messages import Health, HealthReport

PROTOCOL_ID = TProtocol("/hypha/probe/1.0.0")
# The swarm gives an inbound connection 10 s in all before it is a peer's.
ANSWER_S = 8.0


class Answered(HandshakeFailure):
    """The connection was a probe and is over; the swarm forgets it."""


class _Source:
    """What framing reads from."""

    def __init__(self, conn: SecureConn) -> None:
        self._conn = conn

    async def receive_some(self, bytes_max: int) -> bytes:
        try:
            return await self._conn.read(bytes_max)
        except IOException:
            return b""


class ProbeTransport(ISecureTransport):
    """Looks like a security transport to the swarm, which hands it the connection; no connection comes of it."""

    def __init__(self, tls: MutualTls, dispatcher: Dispatcher) -> None:
        self._tls = tls
        self._dispatcher = dispatcher

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Answer one request. Always raises HandshakeFailure, so that the swarm lets go."""
        secured = await self._tls.accept(conn)
        peer = Peer(secured.identity.peer_id, secured.identity.roles)
        try:
            with trio.move_on_after(ANSWER_S):
                request = await receive_frame(_Source(secured))
                if request is not None:
                    await secured.write(framed(await self._dispatcher.handle(peer, request)))
        except (RemoteProtocolError, IOException) as error:
            raise Answered(str(error)) from error
        finally:
            await secured.close()
        raise Answered("probe answered")

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> Never:
        """No node dials another this way."""
        raise HandshakeFailure("a probe is not a connection")


async def probe(identity: Identity, address: str, *, timeout_s: float = 5.0) -> HealthReport:
    """Ask the node at a multiaddr how it is.

    Raises ConfigError when the address does not parse, PeerUnreachable with the reason, Refused, RemoteProtocolError.
    """
    where = parse("ADDRESS", address)
    request = Health()
    try:
        with trio.fail_after(timeout_s):
            answer = await _ask(identity, where, framed(encode(request)))
    except trio.TooSlowError as error:
        raise PeerUnreachable(f"{address} did not answer within {timeout_s:g} s") from error
    return interpret(address, request, answer)


async def identify(identity: Identity, address: Multiaddr, *, timeout_s: float = 5.0) -> PeerIdentity:
    """Say who listens at an address, proved by its certificate. Raises PeerUnreachable with the reason."""
    try:
        with trio.fail_after(timeout_s):
            conn = await _open(identity, address)
            await conn.close()
            return conn.identity
    except trio.TooSlowError as error:
        raise PeerUnreachable(f"{address} did not answer within {timeout_s:g} s") from error


async def _ask(identity: Identity, where: Multiaddr, request: bytes) -> bytes:
    conn = await _open(identity, where)
    try:
        await conn.write(request)
        answer = await receive_frame(_Source(conn))
    except IOException as error:
        raise PeerUnreachable(f"{where}: {error}") from error
    finally:
        await conn.close()
    if answer is None:
        raise PeerUnreachable(f"{where} hung up without an answer")
    return answer


async def _open(identity: Identity, where: Multiaddr) -> SecureConn:
    host, port = host_of(where), value(where, "tcp")
    if host is None or port is None:
        raise ConfigError(f"{where} names no host and port")
    try:
        raw = RawConnection(TrioTCPStream(await trio.open_tcp_stream(host, int(port))), initiator=True)
    except OSError as error:
        raise PeerUnreachable(f"{where}: {reason_of_socket(error)}") from error
    try:
        await MultiselectClient().select_one_of([PROTOCOL_ID], MultiselectCommunicator(raw))
        return await MutualTls(identity).open(raw, expected=value(where, "p2p"))
    except HandshakeRefused as error:
        raise PeerUnreachable(f"{where}: {error}") from error
    except FOREIGN as error:
        await raw.close()
        raise PeerUnreachable(f"{where} does not speak our protocol: {error}") from error
    except trio.Cancelled:
        with trio.CancelScope() as scope:
            scope.shield = True  # closing a socket does not wait
            await raw.close()
        raise


def reason_of_socket(error: OSError) -> str:
    """Return what the system says; trio hides it in a group of one error per address."""
    if isinstance(error.__cause__, ExceptionGroup):
        first = error.__cause__.exceptions[0]
        if isinstance(first, OSError) and first.strerror:
            return first.strerror.lower()
    return (error.strerror or str(error)).lower()
