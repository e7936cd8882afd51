"""Certificates and revocation lists in words: what `hypha-certutil show` and `hypha doctor` print.

kind  subject  issuer  serial  not_before  not_after  [roles  peer_id]        node, authority, other
kind  issuer  number  next_update  revoked                                    revocation list
"""

from cryptography import x509

from hypha.pki.names import is_authority, node_identity, roles_of
from hypha.pki.pem import Crl


def describe(certificate: x509.Certificate) -> dict[str, object]:
    """Return what a certificate says, in values that JSON has; times are RFC 3339, UTC."""
    entry: dict[str, object] = {
        "kind": "authority" if is_authority(certificate) else "node",
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
    }
    if entry["kind"] == "authority":
        return entry
    entry["roles"] = sorted(roles_of(certificate))
    try:
        entry["peer_id"] = node_identity(certificate).peer_id
    except ValueError as error:
        entry |= {"kind": "other", "reason": str(error)}
    return entry


def describe_crl(crl: Crl) -> dict[str, object]:
    """Return what a revocation list says; serials in hexadecimal, as `describe` prints them."""
    parsed = x509.load_pem_x509_crl(crl.pem)
    try:
        number = parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = None
    return {
        "kind": "revocation list",
        "issuer": crl.issuer,
        "number": number,
        "next_update": None if crl.next_update is None else crl.next_update.isoformat(),
        "revoked": sorted(f"{serial:x}" for _, serial in crl.revoked),
    }
