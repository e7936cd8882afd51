"""Issues what a private network needs: two kinds of authority, node certificates, revocation lists.

    issue_root(name)                 self-signed, path length 1
      └─ issue_org(root, name)       path length 0: signs nodes, never another authority
           └─ issue_node(org, …)     client and server, roles as hypha:role:… URIs
    issue_crl(authority, serials)    one list per issuing authority

Profiles follow RFC 5280 strictly (key identifiers, critical constraints): verification runs with OpenSSL's strict flag.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from hypha.errors import ConfigError
from hypha.pki.names import ROLE_URI_PREFIX, is_authority

ROLES = ("gateway", "scheduler", "worker", "data")
ROOT_DAYS = 3650
ORG_DAYS = 1825
NODE_DAYS = 365
CRL_DAYS = 30
# Clocks of machines that just joined may lag this far behind the issuer's.
BACKDATE = timedelta(minutes=5)
# RFC 5280, appendix A: ub-common-name.
NAME_CHARS_MAX = 64
KEY_MODE = 0o600
PUBLIC_MODE = 0o644


class Issued(Struct, frozen=True):
    """A certificate and the key it was made for."""

    certificate: x509.Certificate
    key: Ed25519PrivateKey

    def certificate_pem(self) -> bytes:
        """Return the certificate as PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        """Return the private key as unencrypted PKCS#8 PEM: write it with `save(…, private=True)`."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def issue_root(name: str, *, days: int = ROOT_DAYS, start: datetime | None = None) -> Issued:
    """Make a self-signed root; `start` (aware) defaults to now."""
    key = Ed25519PrivateKey.generate()
    subject = _subject(name)
    builder = _builder(key, subject, issuer=subject, days=days, start=start, not_after_max=None)
    return Issued(_authority_profile(builder, path_length=1).sign(key, None), key)


def issue_org(root: Issued, name: str, *, days: int = ORG_DAYS, start: datetime | None = None) -> Issued:
    """Make an organisation's authority; it never outlives the root."""
    key = Ed25519PrivateKey.generate()
    builder = _issued_builder(root, key, name, days=days, start=start)
    return Issued(_authority_profile(builder, path_length=0).sign(root.key, None), key)


def issue_node(
    org: Issued,
    name: str,
    roles: Iterable[str],
    *,
    days: int = NODE_DAYS,
    start: datetime | None = None,
) -> Issued:
    """Make a node's key and certificate. Raises ConfigError for no role or one that does not exist."""
    wanted = sorted(set(roles))
    if unknown := [role for role in wanted if role not in ROLES]:
        raise ConfigError(f"no such role: {', '.join(unknown)} (roles are {', '.join(ROLES)})")
    if not wanted:
        raise ConfigError(f"a node needs at least one role (roles are {', '.join(ROLES)})")
    key = Ed25519PrivateKey.generate()
    uris = [x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role) for role in wanted]
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _issued_builder(org, key, name, days=days, start=start)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectAlternativeName(uris), critical=False)
        .sign(org.key, None)
    )
    return Issued(certificate, key)


def issue_crl(
    authority: Issued,
    revoked: Mapping[int, datetime],
    *,
    number: int,
    days: int = CRL_DAYS,
    start: datetime | None = None,
) -> bytes:
    """Return a PEM list of the revoked serials with their dates; `number` must rise with every list."""
    now = start or datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - BACKDATE)
        .next_update(now + timedelta(days=days))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    for serial, when in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority.key, None).public_bytes(Encoding.PEM)


def save(path: Path, data: bytes, *, private: bool = False, force: bool = False) -> None:
    """Write a file whole: keys 0600, everything else 0644, whatever the umask.

    Raises ConfigError when it exists and `force` is not given, or cannot be written.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; --force overwrites it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file of mode 0600 from the first byte on, so a key is at no time readable by others.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), KEY_MODE if private else PUBLIC_MODE)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _subject(name: str) -> x509.Name:
    if not name or len(name) > NAME_CHARS_MAX:
        raise ConfigError(f"a name has 1 to {NAME_CHARS_MAX} characters, not {len(name)}: {name!r}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    key: Ed25519PrivateKey,
    subject: x509.Name,
    *,
    issuer: x509.Name,
    days: int,
    start: datetime | None,
    not_after_max: datetime | None,
) -> x509.CertificateBuilder:
    begin = (start or datetime.now(UTC)) - BACKDATE
    end = begin + BACKDATE + timedelta(days=days)
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end if not_after_max is None else min(end, not_after_max))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _issued_builder(
    issuer: Issued, key: Ed25519PrivateKey, name: str, *, days: int, start: datetime | None
) -> x509.CertificateBuilder:
    if not is_authority(issuer.certificate):
        subject = issuer.certificate.subject.rfc4514_string()
        raise ConfigError(f"{subject} is not a certificate authority")
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return _builder(
        key,
        _subject(name),
        issuer=issuer.certificate.subject,
        days=days,
        start=start,
        not_after_max=issuer.certificate.not_valid_after_utc,
    ).add_extension(identifier, critical=False)


def _authority_profile(builder: x509.CertificateBuilder, *, path_length: int) -> x509.CertificateBuilder:
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True).add_extension(
        _key_usage(authority=True), critical=True
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
