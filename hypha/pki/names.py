"""What a certificate says about its holder.

    peer id   base58( 00 24 │ 08 01 12 20 │ 32 bytes of Ed25519 public key )
                      └ identity multihash of 36 bytes
                               └ protobuf: Type = Ed25519, Data = 32 bytes
    roles     subject alternative names  URI:hypha:role:worker …

The multihash is libp2p's own (libp2p specs, peer-ids: keys of up to 42 bytes are inlined); it is built here so that
reading a certificate needs no libp2p.
"""

from datetime import datetime

import base58
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct

from hypha.errors import RemoteProtocolError

ROLE_URI_PREFIX = "hypha:role:"
_ED25519_MULTIHASH_PREFIX = bytes.fromhex("0024 0801 1220")


class PeerIdentity(Struct, frozen=True):
    """What a verified certificate says; (issuer, serial) is what a revocation list would name."""

    peer_id: str
    roles: frozenset[str]
    not_after: datetime
    subject: str
    issuer: str
    serial: int


def peer_id_of(key: Ed25519PublicKey) -> str:
    """Return the base58 peer id that libp2p derives from an Ed25519 public key."""
    return base58.b58encode(_ED25519_MULTIHASH_PREFIX + key.public_bytes_raw()).decode()


def roles_of(certificate: x509.Certificate) -> frozenset[str]:
    """Return the roles that the certificate names; empty where it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return frozenset(uri.removeprefix(ROLE_URI_PREFIX) for uri in uris if uri.startswith(ROLE_URI_PREFIX))


def is_authority(certificate: x509.Certificate) -> bool:
    """Say whether the certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def node_identity(certificate: x509.Certificate) -> PeerIdentity:
    """Read a node certificate; raises ValueError for a key or a kind that no node may have."""
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("the certificate's key is not Ed25519")  # noqa: TRY004 - a certificate's value
    if is_authority(certificate):
        raise ValueError("the certificate is a certificate authority's, not a node's")
    return PeerIdentity(
        peer_id=peer_id_of(key),
        roles=roles_of(certificate),
        not_after=certificate.not_valid_after_utc,
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=certificate.serial_number,
    )


def peer_of(der: bytes) -> PeerIdentity:
    """Say who a peer is from the DER certificate that OpenSSL has just verified.

    Raises RemoteProtocolError when it is not a node's Ed25519 certificate.
    """
    try:
        return node_identity(x509.load_der_x509_certificate(der))
    except ValueError as error:
        raise RemoteProtocolError(f"peer certificate refused: {error}") from error
