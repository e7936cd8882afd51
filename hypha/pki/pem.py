"""PEM files as they lie on disk: read whole, bounded, and refused with the configuration key and the file.

-----BEGIN CERTIFICATE-----   leaf first, then its authorities (cert_pem); roots (trust_pem)
-----BEGIN PRIVATE KEY-----   PKCS#8, Ed25519, unencrypted (key_pem)
-----BEGIN X509 CRL-----      any number in any number of files (crls_pem)
"""

import re
import stat
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from msgspec import Struct

from hypha.errors import ConfigError
from hypha.pki.names import is_authority

# A revocation entry takes about 40 bytes in base64-less DER: this holds some 300 000 of them.
PEM_BYTES_MAX = 16 * 2**20
# A list that ends sooner than this is worth a warning at every start.
CRL_WARNING = timedelta(days=3)
_CRL_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----\s*", re.DOTALL)


class Certificates(Struct, frozen=True):
    """The certificates of one file, in the file's order."""

    key: str
    path: Path
    certificates: tuple[x509.Certificate, ...]

    def der(self) -> bytes:
        """Return all of them as concatenated DER."""
        return b"".join(each.public_bytes(Encoding.DER) for each in self.certificates)

    def require_dates(self, now: datetime) -> None:
        """Raise ConfigError for the first that has expired or is not valid yet."""
        for each in self.certificates:
            subject = each.subject.rfc4514_string()
            if now > each.not_valid_after_utc:
                ended = f"{each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
                raise ConfigError(f"`{self.key}`: {self.path}: {subject} expired on {ended}")
            if now < each.not_valid_before_utc:
                begins = f"{each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
                raise ConfigError(f"`{self.key}`: {self.path}: {subject} is not valid before {begins}")

    def require_authorities(self) -> None:
        """Raise ConfigError for the first that may not sign others."""
        for each in self.certificates:
            if not is_authority(each):
                subject = each.subject.rfc4514_string()
                raise ConfigError(f"`{self.key}`: {self.path}: {subject} is not a certificate authority")


class Crl(Struct, frozen=True):
    """One revocation list; `revoked` holds (issuer, serial)."""

    path: Path
    pem: bytes
    issuer: str
    next_update: datetime | None
    revoked: frozenset[tuple[str, int]]

    def is_signed_by(self, authority: x509.Certificate) -> bool:
        """Say whether the list carries the authority's signature."""
        key = authority.public_key()
        return isinstance(key, Ed25519PublicKey) and x509.load_pem_x509_crl(self.pem).is_signature_valid(key)


def read_certificates(key: str, path: Path) -> Certificates:
    """Read every certificate of a file. Raises ConfigError when there is none or one is damaged."""
    data = _read(key, path)
    try:
        return Certificates(key, path, tuple(x509.load_pem_x509_certificates(data)))
    except ValueError as error:
        raise ConfigError(f"`{key}`: {path} holds no readable PEM certificate") from error


def read_key(key: str, path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises ConfigError when it is damaged, encrypted or not Ed25519."""
    data = _read(key, path)
    try:
        private = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise ConfigError(f"`{key}`: {path} is encrypted; keys are unencrypted PKCS#8") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"`{key}`: {path} holds no readable PEM private key") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"`{key}`: {path}: the key is not Ed25519")
    return private


def read_crls(paths: Iterable[Path]) -> tuple[Crl, ...]:
    """Read every revocation list of every file. Raises ConfigError for a file without one."""
    return tuple(crl for path in paths for crl in _read_crl_file(path))


def permission_warnings(path: Path) -> list[str]:
    """Return a warning when anyone on the machine may read the key."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & stat.S_IRWXO:
        return []
    return [f"`key_pem`: {path} is open to every user of this machine (mode {mode:04o}); chmod 600"]


def crl_warnings(crls: Iterable[Crl], now: datetime) -> list[str]:
    """Return a warning for each list that is about to end: from then on every handshake fails."""
    return [
        f"`crls_pem`: {crl.path}: the list of {crl.issuer} ends on {crl.next_update:%Y-%m-%d %H:%M} UTC"
        for crl in crls
        if crl.next_update is not None and crl.next_update - now < CRL_WARNING
    ]


def _read_crl_file(path: Path) -> list[Crl]:
    blocks = cast(list[bytes], _CRL_BLOCK.findall(_read("crls_pem", path)))
    if not blocks:
        raise ConfigError(f"`crls_pem`: {path} holds no PEM revocation list")
    try:
        return [_parse_crl(path, block) for block in blocks]
    except ValueError as error:
        raise ConfigError(f"`crls_pem`: {path}: damaged revocation list: {error}") from error


def _parse_crl(path: Path, block: bytes) -> Crl:
    crl = x509.load_pem_x509_crl(block)
    issuer = crl.issuer.rfc4514_string()
    revoked = frozenset((issuer, entry.serial_number) for entry in crl)
    return Crl(path, block, issuer, crl.next_update_utc, revoked)


def _read(key: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(PEM_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"`{key}`: no such file: {path}") from error
    except OSError as error:
        raise ConfigError(f"`{key}`: cannot read {path}: {error.strerror}") from error
    if len(data) > PEM_BYTES_MAX:
        raise ConfigError(f"`{key}`: {path} is larger than {PEM_BYTES_MAX} bytes")
    return data
