"""Security transport `/hypha/mtls/1.0.0`: mutual TLS 1.3 against the private CA, peer id = certificate key.

    dialer                                   listener
      ClientHello ───────────────────────────▶
      ◀──────────── ServerHello, certificate, wants yours
      certificate, finished ─────────────────▶ OpenSSL judges chain, dates, usage, revocation
      ◀─────────────────────────────── 0x01    or an alert that says why not

In TLS 1.3 the dialer has finished before the listener has judged its certificate; the confirmation byte makes a
refusal surface in the dial and not at some later read. Both sides raise HandshakeRefused with the reason in words; the
listener also logs it, once per remote host and reason.
"""

import ssl
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import IRawConnection, ISecureTransport
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from multiaddr import Multiaddr

from hypha.errors import RemoteProtocolError
from hypha.network.tls_pipe import RAW_READ_BYTES, TlsPipe
from hypha.pki import Identity, PeerIdentity
from hypha.telemetry import OncePerKey, get_logger, metrics

PROTOCOL_ID = TProtocol("/hypha/mtls/1.0.0")
ALPN = "hypha"
CONFIRMATION = b"\x01"
# Four round trips of a bad satellite link; whoever is silent longer only holds a slot.
HANDSHAKE_S = 10.0
# TLS hands out one record at a time (RFC 8446 §5.1).
RECORD_BYTES = 1 << 14

log = get_logger("network.mtls")

# In every reason that is about a certificate.
CERTIFICATE_REFUSED = "certificate refused: "
# OpenSSL's X509_V_ERR_* numbers (openssl/x509_vfy.h).
_VERDICTS = {
    2: "unknown CA",
    3: "no revocation list of its CA",
    9: "not yet valid",
    10: "expired",
    12: "its CA's revocation list is out of date",
    18: "unknown CA",
    19: "unknown CA",
    20: "unknown CA",
    21: "unknown CA",
    23: "revoked",
    26: "not meant for this use",
}
# TLS alerts (RFC 8446 §6.2) by the tail of OpenSSL's name for them.
_ALERTS = {
    "CERTIFICATE_EXPIRED": "expired",
    "CERTIFICATE_REVOKED": "revoked",
    "UNKNOWN_CA": "unknown CA",
    "CERTIFICATE_REQUIRED": "none was shown",
    "UNSUPPORTED_CERTIFICATE": "not meant for this use",
    "BAD_CERTIFICATE": "bad, or not yet valid",
}


Judge = Callable[[TlsPipe], Awaitable[PeerIdentity]]


class HandshakeRefused(HandshakeFailure):
    """The handshake failed; the message is the reason, fit for people."""


def reason_of(error: ssl.SSLError) -> str:
    """Say in words why a handshake failed: whose certificate was refused, and why."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its {CERTIFICATE_REFUSED}{_VERDICTS.get(error.verify_code, error.verify_message)}"
    name = error.reason or str(error)
    for tail, words in _ALERTS.items():
        if name.endswith(tail):
            return f"our {CERTIFICATE_REFUSED}{words}"
    if name == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return f"its {CERTIFICATE_REFUSED}none was shown"
    return f"TLS: {name}"


class SecureConn(BaseSession):
    """A verified connection; `identity` is what the peer's certificate says."""

    def __init__(self, pipe: TlsPipe, identity: PeerIdentity, *, local: ID, key: Ed25519PrivateKey) -> None:
        remote = ID.from_string(identity.peer_id)
        remote_key = remote.extract_public_key()
        assert remote_key is not None, "an Ed25519 peer id holds its key"
        super().__init__(
            local_peer=local,
            local_private_key=key,
            remote_peer=remote,
            remote_permanent_pubkey=remote_key,
            is_initiator=pipe.raw.is_initiator,
        )
        self.identity = identity
        self._pipe = pipe

    async def read(self, n: int | None = None) -> bytes:
        """Return some bytes, at most `n`. Raises ConnectionClosedError at the end."""
        if n == 0:
            return b""
        piece = bytearray(min(n or RECORD_BYTES, RECORD_BYTES))
        count = await self._read_into(memoryview(piece))
        return bytes(piece[:count])

    async def read_exact(self, count: int) -> bytearray:
        """Return exactly `count` bytes, decrypted straight into the result."""
        whole = bytearray(count)
        await self._read_into(memoryview(whole), count)
        return whole

    async def _read_into(self, view: memoryview, least: int = 1) -> int:
        try:
            return await self._pipe.read_into(view, least)
        except ssl.SSLError as error:
            raise ConnectionClosedError(reason_of(error)) from error

    async def write(self, data: bytes) -> None:
        """Send it all."""
        await self._pipe.write(data)

    async def write_parts(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send several buffers as if they were one, without joining them."""
        await self._pipe.write(*parts)

    @property
    def frame_bytes(self) -> int:
        """How large a write may be for others not to wait long behind it; changes with what the connection takes."""
        return self._pipe.frame_bytes

    async def close(self) -> None:
        """Close the connection beneath."""
        await self._pipe.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the socket at the other end."""
        return self._pipe.raw.get_remote_address()

    @property
    def tcp_address(self) -> tuple[str, int] | None:
        """Host and port of the peer's own socket; None where a relay lies between."""
        return self.get_remote_address() if self._pipe.on_tcp else None

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Where the other end is."""
        return self._pipe.raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self._pipe.raw.get_connection_type()


class MutualTls(ISecureTransport):
    """The only security transport a node offers. `admitted` hears of every peer that got in."""

    def __init__(self, identity: Identity, admitted: Callable[[PeerIdentity], None] = lambda _: None) -> None:
        self._identity = identity
        self._admitted = admitted
        self._key = Ed25519PrivateKey.from_bytes(identity.private_key)
        self._local = ID.from_string(identity.peer_id)
        self._once = OncePerKey(log)
        self._landing = memoryview(bytearray(RAW_READ_BYTES))

    async def secure_inbound(self, conn: IRawConnection) -> SecureConn:
        """Accept a dialer with a certificate of our CA. Raises HandshakeRefused."""
        secured = await self.accept(conn)
        if secured.get_remote_peer() == self._local:
            await secured.close()
            raise HandshakeRefused("a node does not connect to itself")
        self._admitted(secured.identity)
        return secured

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> SecureConn:
        """Make sure that `peer_id` answers. Raises HandshakeRefused."""
        secured = await self.open(conn, expected=str(peer_id))
        self._admitted(secured.identity)
        return secured

    async def accept(self, conn: IRawConnection) -> SecureConn:
        """Shake hands as the listener; a refusal is logged once per remote host and reason, and counted."""
        try:
            return await self._secure(conn, self._identity.server_context(ALPN), self._judge_dialer)
        except HandshakeRefused as refusal:
            self.report(conn.get_remote_address(), str(refusal))
            raise

    async def open(self, conn: IRawConnection, *, expected: str | None) -> SecureConn:
        """Shake hands as the dialer; whoever holds a certificate of our CA will do where no peer id is expected."""

        async def judge(pipe: TlsPipe) -> PeerIdentity:
            peer = self._peer(pipe)
            if expected is not None and peer.peer_id != expected:
                raise RemoteProtocolError(f"expected {expected}, but the certificate is of {peer.peer_id}")
            answer = bytearray(1)
            await pipe.read_into(memoryview(answer))
            if bytes(answer) != CONFIRMATION:
                raise RemoteProtocolError("answered the handshake with nonsense")
            return peer

        return await self._secure(conn, self._identity.client_context(ALPN), judge)

    async def _secure(self, conn: IRawConnection, context: ssl.SSLContext, judge: Judge) -> SecureConn:
        pipe = TlsPipe(conn, context, server_side=not conn.is_initiator, landing=self._landing)
        try:
            with trio.fail_after(HANDSHAKE_S):
                await pipe.handshake()
                peer = await judge(pipe)
        except (ssl.SSLError, RemoteProtocolError, IOException, RawConnError, trio.TooSlowError, OSError) as error:
            await pipe.aclose()
            raise HandshakeRefused(_words(error)) from error
        except BaseException:
            await pipe.aclose()
            raise
        return SecureConn(pipe, peer, local=self._local, key=self._key)

    async def _judge_dialer(self, pipe: TlsPipe) -> PeerIdentity:
        peer = self._peer(pipe)
        await pipe.write(CONFIRMATION)
        return peer

    def _peer(self, pipe: TlsPipe) -> PeerIdentity:
        if pipe.alpn != ALPN:
            raise RemoteProtocolError(f"speaks {pipe.alpn or 'no protocol of ours'} over TLS")
        return self._identity.peer_of(pipe.peer_certificate())

    def report(self, address: tuple[str, int] | None, reason: str) -> None:
        """Count and log a dialer at `address` that was refused."""
        metrics.CONNECTIONS_FAILED.add(
            1, direction="inbound", reason=reason if CERTIFICATE_REFUSED in reason else "handshake"
        )
        host = "unknown" if address is None else address[0]
        self._once.log(f"{host} {reason}", "Connection refused", remote=host, reason=reason)


def _words(error: BaseException) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"no handshake within {HANDSHAKE_S:g} s"
    for cause in (error, error.__cause__):
        if isinstance(cause, ssl.SSLError):
            return reason_of(cause)
    return str(error) or type(error).__name__
