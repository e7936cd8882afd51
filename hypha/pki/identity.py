"""A node's own certificate files, judged once at start, and the TLS contexts made from them.

    cert_pem   leaf, then the organisation's CA      ─┐
    key_pem    PKCS#8, Ed25519                        ├─ load_identity ─▶ Identity ─▶ server_context / client_context
    trust_pem  root CA, or several                    │                      └ reload_crls (new handshakes only)
    crls_pem   one list per issuing CA, or nothing   ─┘

Whether the chain holds is not decided here: the node shakes hands with itself in memory, through the very contexts
its peers will meet. So OpenSSL judges chain, usage as client and as server, and revocation exactly as a peer would
(pyOpenSSL's X509StoreContext could do so too, but it links another OpenSSL and checks no usage;
cryptography's own verifier refuses Ed25519). The dates are looked at first only to name the right file.
"""

import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from hypha.errors import ConfigError
from hypha.pki import pem
from hypha.pki.names import PeerIdentity, node_identity, peer_of

# A certificate that ends sooner than this is worth a warning at every start.
EXPIRY_WARNING = timedelta(days=14)
# TLS 1.3 needs three turns with oneself; more means that it will never end.
HANDSHAKE_TURNS_MAX = 8
# A peer comes back for every large transfer, with the same bytes.
PEERS_READ_MAX = 1024

# OpenSSL's X509_V_ERR_* numbers (openssl/x509_vfy.h), by the configuration key that has to change.
_REVOKED = 23
_CRL_ERRORS = frozenset({3, 5, 8, 11, 12, 15, 16, 33, 35, 36, 44, 54})
_DATE_ERRORS = frozenset({9, 10})
_TRUST_ERRORS = frozenset({2, 7, 18, 19, 20, 21, 27})


class CertificateKeys(Protocol):
    """The four keys of a node's configuration that say who it is."""

    @property
    def cert_pem(self) -> Path: ...
    @property
    def key_pem(self) -> Path: ...
    @property
    def trust_pem(self) -> Path: ...
    @property
    def crls_pem(self) -> tuple[Path, ...]: ...


class Identity:
    """Who this node is and whom it believes. Build with `load_identity`.

    Contexts are cached: ask for one per handshake, so that the first handshake after `reload_crls` uses the new lists.
    """

    # Only the reading is done once: whether a certificate is to be believed is asked at every handshake.
    peer_of = staticmethod(lru_cache(PEERS_READ_MAX)(peer_of))

    def __init__(
        self,
        *,
        key: Ed25519PrivateKey,
        chain: tuple[x509.Certificate, ...],
        trust: pem.Certificates,
        crl_paths: tuple[Path, ...],
        warnings: Sequence[str],
    ) -> None:
        self._key = key
        self._chain = chain
        self._trust = trust
        self._crl_paths = crl_paths
        self._crls: tuple[pem.Crl, ...] = ()
        self._contexts: dict[tuple[bool, tuple[str, ...]], ssl.SSLContext] = {}
        self._me = node_identity(chain[0])
        self.warnings = list(warnings)

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id} {'+'.join(sorted(self.roles))}>"

    @property
    def peer_id(self) -> str:
        """This node's peer id, base58."""
        return self._me.peer_id

    @property
    def roles(self) -> frozenset[str]:
        """The roles this node's certificate names."""
        return self._me.roles

    @property
    def subject(self) -> str:
        """The certificate's subject, RFC 4514."""
        return self._me.subject

    @property
    def not_after(self) -> datetime:
        """When this node's certificate ends (aware, UTC)."""
        return self._me.not_after

    @property
    def crl_paths(self) -> tuple[Path, ...]:
        """The files that `reload_crls` reads."""
        return self._crl_paths

    @property
    def private_key(self) -> bytes:
        """The 32 raw bytes of the Ed25519 seed, as libp2p's KeyPair wants them. Never log them."""
        return self._key.private_bytes_raw()

    def server_context(self, *alpn: str) -> ssl.SSLContext:
        """Return the context for accepting. ALPN does not refuse by itself: check what was selected."""
        return self._context(server_side=True, alpn=alpn)

    def client_context(self, *alpn: str) -> ssl.SSLContext:
        """Return the context for dialling; wrap without a server hostname, peers are named by key."""
        return self._context(server_side=False, alpn=alpn)

    def is_revoked(self, peer: PeerIdentity) -> bool:
        """Say whether the lists loaded last name the peer's own certificate.

        Open connections outlive a new list; whoever holds them closes those for which this turns true. A revoked
        organisation is noticed at the next handshake only.
        """
        return any((peer.issuer, peer.serial) in crl.revoked for crl in self._crls)

    def reload_crls(self) -> bool:
        """Read `crls_pem` again; True if they changed.

        Raises ConfigError and keeps the old lists where the new ones cannot be used. Raises ConfigError, too, where
        they revoke this very node, but then they are in force: what else they revoke must not get in.
        Blocks on the disk and on one handshake in memory: call it from a thread.
        """
        crls = pem.read_crls(self._crl_paths)
        if crls == self._crls:
            return False
        self._check_each_authority_has_a_list(crls)
        try:
            _shake_hands(
                self._new_context(server_side=True, alpn=(), crls=crls),
                self._new_context(server_side=False, alpn=(), crls=crls),
            )
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _REVOKED:
                self._adopt(crls)
            raise ConfigError(self._verdict(error)) from error
        self._adopt(crls)
        return True

    def _adopt(self, crls: tuple[pem.Crl, ...]) -> None:
        self._crls = crls
        self._contexts = {}

    def verify(self) -> None:
        """Judge these files as a peer will. Raises ConfigError naming the key that is wrong."""
        if self._crl_paths:
            self.reload_crls()
            self.warnings += pem.crl_warnings(self._crls, datetime.now(UTC))
            return
        try:
            _shake_hands(self.server_context(), self.client_context())
        except ssl.SSLError as error:
            raise ConfigError(self._verdict(error)) from error

    def _check_each_authority_has_a_list(self, crls: tuple[pem.Crl, ...]) -> None:
        for authority in (*self._trust.certificates, *self._chain[1:]):
            subject = authority.subject.rfc4514_string()
            mine = [crl for crl in crls if crl.issuer == subject]
            if not mine:
                files = ", ".join(map(str, self._crl_paths))
                raise ConfigError(f"`crls_pem`: no revocation list of {subject} in {files}")
            if not any(crl.is_signed_by(authority) for crl in mine):
                raise ConfigError(
                    f"`crls_pem`: {mine[0].path}: the revocation list of {subject} is signed by another key"
                )

    def _context(self, *, server_side: bool, alpn: tuple[str, ...]) -> ssl.SSLContext:
        key = (server_side, alpn)
        if key not in self._contexts:
            self._contexts[key] = self._new_context(server_side=server_side, alpn=alpn, crls=self._crls)
        return self._contexts[key]

    def _new_context(self, *, server_side: bool, alpn: tuple[str, ...], crls: tuple[pem.Crl, ...]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a peer is named by its key, not by a host name
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if server_side:
            context.num_tickets = 0  # no resumption: every connection is verified anew
        if alpn:
            context.set_alpn_protocols(list(alpn))
        context.load_verify_locations(cadata=self._trust.der())
        with _as_file(self._own_pem()) as path:
            context.load_cert_chain(path)
        if crls:
            with _as_file(b"".join(crl.pem for crl in crls)) as path:
                context.load_verify_locations(cafile=path)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        return context

    def _own_pem(self) -> bytes:
        key = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key + b"".join(each.public_bytes(Encoding.PEM) for each in self._chain)

    def _verdict(self, error: ssl.SSLError) -> str:
        if not isinstance(error, ssl.SSLCertVerificationError):
            return f"`cert_pem`: TLS refuses the chain of {self.subject}: {error.reason or error}"
        said = error.verify_message
        files = ", ".join(map(str, self._crl_paths))
        if error.verify_code == _REVOKED:
            return f"`cert_pem`: {self.subject} or its authority is revoked by {files}"
        if error.verify_code in _CRL_ERRORS:
            return f"`crls_pem`: {files}: {said}"
        if error.verify_code in _DATE_ERRORS:
            return f"`trust_pem`: {self._trust.path}: {said}"
        if error.verify_code in _TRUST_ERRORS:
            issuer = self._chain[-1].issuer.rfc4514_string()
            return (
                f"`trust_pem`: {self._trust.path} does not vouch for {self.subject} "
                f"(chain ends at issuer {issuer}): {said}"
            )
        return f"`cert_pem`: {self.subject}: {said}"


def load_identity(config: CertificateKeys) -> Identity:
    """Load and verify the files that a node's configuration names. Raises ConfigError naming key and file.

    What is unwise but works is in `Identity.warnings`, for the caller to log.
    """
    certificates = pem.read_certificates("cert_pem", config.cert_pem)
    key = pem.read_key("key_pem", config.key_pem)
    trust = pem.read_certificates("trust_pem", config.trust_pem)
    trust.require_authorities()
    certificates.require_dates(datetime.now(UTC))
    try:
        me = node_identity(certificates.certificates[0])
    except ValueError as error:
        raise ConfigError(f"`cert_pem`: {config.cert_pem}: {error}") from error
    if key.public_key() != certificates.certificates[0].public_key():
        raise ConfigError(f"`key_pem`: {config.key_pem} is not the key of `cert_pem` {config.cert_pem}")
    identity = Identity(
        key=key,
        chain=certificates.certificates,
        trust=trust,
        crl_paths=config.crls_pem,
        warnings=[*pem.permission_warnings(config.key_pem), *_expiry_warnings(me)],
    )
    identity.verify()
    return identity


def _expiry_warnings(me: PeerIdentity) -> list[str]:
    if me.not_after - datetime.now(UTC) > EXPIRY_WARNING:
        return []
    return [f"the certificate of {me.subject} ends on {me.not_after:%Y-%m-%d %H:%M} UTC"]


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    waiting = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(HANDSHAKE_TURNS_MAX):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    if waiting:
        raise ssl.SSLError("the handshake does not end")


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Give OpenSSL, which reads only files, a file: in memory on Linux, else mode 0600 and gone at once."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("hypha-pem")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile(prefix="hypha-pem-") as file:
            file.write(content)
            file.flush()
            yield file.name
