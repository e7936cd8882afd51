"""Security transport `/hypha/bulk/1.0.0`: connections for one large transfer each, on the node's one listening port.

    listener                                              dialer
      offer(peer) ─ token ─────── over the stream ──────▶   dial(address, peer, token)
      ◀──────────── TCP, multistream-select, mutual TLS, token ──
      token known, unused, of this very peer ─ 0x01 ────▶
      offer.take() ─▶ socket                                socket ◀─

The swarm hands over the raw connection as it would for a peer's, but none comes of it: once the token has matched, the
socket belongs to the transfer, and the swarm is told that the handshake failed. Certificates, authorities and
revocation lists are those of every other connection; what the peer may do was decided on the stream that the token went
over.
"""

import os
import secrets
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

import trio
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MULTISELECT_PROTOCOL_ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.utils import encode_delim

from hypha.errors import RemoteProtocolError
from hypha.network import bulk_socket
from hypha.network.dispatch import Slots
from hypha.network.mtls import HandshakeRefused, MutualTls, reason_of
from hypha.network.probe import reason_of_socket
from hypha.pki import Identity, PeerIdentity
from hypha.telemetry import get_logger

PROTOCOL_ID = TProtocol("/hypha/bulk/1.0.0")
ALPN = "hypha-bulk"
_AGREEING = encode_delim(MULTISELECT_PROTOCOL_ID.encode()) + encode_delim(PROTOCOL_ID.encode())
TOKEN_BYTES = 32
WELCOME = b"\x01"
# Each holds up to two threads, a descriptor and 4 MiB; who comes after them goes over the stream.
TRANSFERS_MAX = 16
# One peer that asks and then does nothing must not take the places of all others.
TRANSFERS_PER_PEER_MAX = 4
# A peer that resumes reads again what it has before it dials.
OFFER_S = 120.0
# The same address carries a connection already, so a dial either works at once or not at all.
DIAL_S = 5.0

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

log = get_logger("network.bulk")


class TakenOver(HandshakeFailure):
    """The connection belongs to a transfer; the swarm forgets it."""


class Offer:
    """A token that waits for its peer, and then the socket that it came with."""

    def __init__(self, peer_id: str, *, expires_at: float) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.peer_id = peer_id
        self.expires_at = expires_at
        self._socket: ssl.SSLSocket | None = None
        self._over = False

    def deposit(self, secured: ssl.SSLSocket) -> None:
        """Leave the socket for whoever offered. Raises HandshakeFailure when nobody waits any more."""
        if self._over:
            raise HandshakeFailure("nobody waits for this bulk connection any more")
        self._socket = secured

    def take(self) -> ssl.SSLSocket | None:
        """Take the socket, for good; None when the peer has not come."""
        taken, self._socket = self._socket, None
        return taken

    def withdraw(self) -> None:
        """Nobody will take it."""
        self._over = True
        if (left := self.take()) is not None:
            bulk_socket.abort(left)


class BulkTransport(ISecureTransport):
    """The bulk connections of one node. Their number is bounded, whichever side dialled."""

    def __init__(self, identity: Identity, tls: MutualTls) -> None:
        self._identity = identity
        self._tls = tls
        self._offers: dict[bytes, Offer] = {}
        self._places = Slots(total_max=TRANSFERS_MAX, per_peer_max=TRANSFERS_PER_PEER_MAX)
        self.limiter = trio.CapacityLimiter(2 * TRANSFERS_MAX)

    @contextmanager
    def place(self, peer_id: str) -> Iterator[bool]:
        """Hold a place for one transfer while the context is open; False when there is none."""
        if not self._places.free(peer_id):
            yield False
            return
        with self._places.taken(peer_id):
            yield True

    @property
    def core_to_spare(self) -> bool:
        """Whether each transfer under way finds a second core: without one a second thread only adds to the queue."""
        return 2 * self._places.total <= CORES

    @contextmanager
    def offered(self, peer_id: str) -> Iterator[Offer]:
        """Let `peer_id` connect once, while the context is open and for OFFER_S at most."""
        offer = Offer(peer_id, expires_at=trio.current_time() + OFFER_S)
        self._offers[offer.token] = offer
        try:
            yield offer
        finally:
            self._offers.pop(offer.token, None)
            offer.withdraw()

    async def dial(self, host: str, port: int, peer_id: str, token: bytes) -> ssl.SSLSocket:
        """Connect to a peer's listener with the token that it gave us. Raises HandshakeRefused with the reason."""
        try:
            with trio.fail_after(DIAL_S):
                return await self._dial(host, port, peer_id, token)
        except trio.TooSlowError as error:
            raise HandshakeRefused(f"no bulk connection within {DIAL_S:g} s") from error

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Give the socket to whoever waits for its token. Always raises HandshakeFailure."""
        address = conn.get_remote_address()
        plain = bulk_socket.take_socket(conn)
        try:
            secured, peer = await self._secure(plain, server_side=True)
        except HandshakeRefused as refusal:
            self._tls.report(address, str(refusal))
            raise
        try:
            await self._match(secured, peer)
        except BaseException:
            bulk_socket.abort(secured)
            raise
        raise TakenOver("bulk")

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> Never:
        """The swarm never dials this way."""
        raise HandshakeFailure("a bulk connection is not a peer's")

    async def _match(self, secured: ssl.SSLSocket, peer: PeerIdentity) -> None:
        try:
            token = await bulk_socket.receive_exactly(secured, TOKEN_BYTES)
            offer = self._offers.get(token)
            if offer is None or offer.peer_id != peer.peer_id or trio.current_time() > offer.expires_at:
                log.warn("Bulk connection refused", peer_id=peer.peer_id, reason="its token is unknown")
                raise HandshakeFailure("unknown bulk token")
            del self._offers[token]
            await bulk_socket.step(secured, secured.send, WELCOME)
        except OSError as error:
            raise HandshakeFailure(str(error)) from error
        # Nothing is awaited between the welcome and this: the dialer finds the socket in its place.
        offer.deposit(secured)

    async def _dial(self, host: str, port: int, peer_id: str, token: bytes) -> ssl.SSLSocket:
        plain = await _open(host, port)
        secured, peer = await self._secure(plain, server_side=False)
        try:
            await _introduce(secured, peer, peer_id, token)
        except BaseException as error:
            bulk_socket.abort(secured)
            if isinstance(error, OSError):
                raise HandshakeRefused(_words(error)) from error
            raise
        return secured

    async def _secure(self, plain: socket.socket, *, server_side: bool) -> tuple[ssl.SSLSocket, PeerIdentity]:
        make = self._identity.server_context if server_side else self._identity.client_context
        try:
            secured = await bulk_socket.handshake(plain, make(ALPN), server_side=server_side)
        except OSError as error:
            raise HandshakeRefused(_words(error)) from error
        try:
            return secured, self._peer(secured)
        except RemoteProtocolError as error:
            secured.close()
            raise HandshakeRefused(str(error)) from error

    def _peer(self, secured: ssl.SSLSocket) -> PeerIdentity:
        if secured.selected_alpn_protocol() != ALPN:
            raise RemoteProtocolError("speaks no protocol of ours over TLS")
        der = secured.getpeercert(binary_form=True)
        assert der is not None, "contexts require a certificate"
        return self._identity.peer_of(der)


async def _introduce(secured: ssl.SSLSocket, peer: PeerIdentity, expected: str, token: bytes) -> None:
    """Make sure that the right peer answers, and that it takes the token. Raises HandshakeRefused, OSError."""
    if peer.peer_id != expected:
        raise HandshakeRefused(f"expected {expected}, but the certificate is of {peer.peer_id}")
    await bulk_socket.step(secured, secured.send, token)
    if await bulk_socket.receive_exactly(secured, len(WELCOME)) != WELCOME:
        raise HandshakeRefused("answered the token with nonsense")


async def _open(host: str, port: int) -> socket.socket:
    """Return a socket at whose other end the bulk protocol is agreed on. Raises HandshakeRefused."""
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise HandshakeRefused(reason_of_socket(error)) from error
    try:
        await _agree(stream)
    except BaseException as error:
        stream.socket.close()
        if isinstance(error, trio.BrokenResourceError):
            raise HandshakeRefused(f"broke off before it spoke {PROTOCOL_ID}") from error
        raise
    return bulk_socket.plain_of(stream)


async def _agree(stream: trio.SocketStream) -> None:
    """Say which protocol follows; the listener echoes it. All at once: two turns would cost a round trip more."""
    await stream.send_all(_AGREEING)
    echoed = b""
    while echoed != _AGREEING:
        more = await stream.receive_some(len(_AGREEING) - len(echoed))
        echoed += more
        if not more or not _AGREEING.startswith(echoed):
            raise HandshakeRefused(f"does not speak {PROTOCOL_ID}")


def _words(error: OSError) -> str:
    return reason_of(error) if isinstance(error, ssl.SSLError) else str(error)
