"""hypha-certutil: the authorities, node certificates and revocation lists of a private network, as PEM files.

    root   DIR/ root.pem  root-key.pem  trust.pem
    org    DIR/ org.pem   org-key.pem   trust.pem
    node   DIR/ NAME.pem (leaf, then org.pem)  NAME-key.pem  trust.pem
    crl    DIR/ root-crl.pem  org-crl.pem  crls.pem (both)   root-revoked.json  org-revoked.json (what is revoked)
    show   FILE …

Keys are written 0600 and nothing is overwritten without --force; only `crl`, whose purpose is to renew its lists,
replaces them from the index beside the authority.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from msgspec import Struct

from hypha import cli_app
from hypha.cli_app import Force, Json, Version
from hypha.errors import ConfigError
from hypha.pki import ROLES, Issued, issue_crl, issue_node, issue_org, issue_root, pem, save
from hypha.pki.authority import CRL_DAYS, NODE_DAYS, ORG_DAYS, ROOT_DAYS
from hypha.pki.certificate_report import describe, describe_crl

PROGRAM = "hypha-certutil"
AUTHORITIES = ("root", "org")
# Names of files that a node's must not collide with in a shared directory.
_RESERVED = frozenset({"root", "org", "trust", "crls", "root-crl", "org-crl"})
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

app = cli_app.new_app("Certificates for a private Hypha network.")

Out = Annotated[Path, typer.Option("--out", help="Directory to write to; made if missing.")]
Days = Annotated[int, typer.Option(min=1, help="Valid for so many days, never longer than the issuer.")]
NewFile = tuple[str, bytes, bool]  # name, content, private


class Revocations(Struct, forbid_unknown_fields=True):
    """The index beside an authority: the last list's number and, by serial in hexadecimal, when it was revoked."""

    number: int = 0
    revoked: dict[str, datetime] = {}


@app.callback(no_args_is_help=True)
def options(version: Version = False) -> None:
    """Certificates for a private Hypha network."""


@app.command()
def root(
    name: Annotated[str, typer.Option(help="Common name of the root CA.")] = "Hypha root",
    out: Out = Path("certs"),
    days: Days = ROOT_DAYS,
    force: Force = False,
) -> None:
    """Make a root CA: the one certificate that every node trusts."""
    issued = issue_root(name, days=days)
    public = issued.certificate_pem()
    files = [("root.pem", public, False), ("root-key.pem", issued.key_pem(), True), ("trust.pem", public, False)]
    _write(out, files, force=force)


@app.command()
def org(
    name: Annotated[str, typer.Option(help="Common name of the organisation.")] = "Hypha organisation",
    out: Out = Path("certs"),
    root: Annotated[
        Path | None, typer.Option(help="Directory with root.pem and root-key.pem  [default: --out]")
    ] = None,
    days: Days = ORG_DAYS,
    force: Force = False,
) -> None:
    """Make an organisation's CA, signed by the root: it issues node certificates."""
    authority = _authority(root or out, "root", option="--root")
    issued = issue_org(authority, name, days=days)
    files = [("org.pem", issued.certificate_pem(), False), ("org-key.pem", issued.key_pem(), True)]
    _write(out, files + _trust(root or out, out), force=force)


@app.command()
def node(
    name: Annotated[str, typer.Option(help="Common name, and the name of the files.")],
    role: Annotated[list[str], typer.Option(help=f"What the node may be: {', '.join(ROLES)}; repeat for several.")],
    out: Out = Path("certs"),
    org: Annotated[Path | None, typer.Option(help="Directory with org.pem and org-key.pem  [default: --out]")] = None,
    days: Days = NODE_DAYS,
    force: Force = False,
) -> None:
    """Make a node's key and certificate. A new key is a new node."""
    if not _FILE_NAME.fullmatch(name) or name in _RESERVED or name.endswith("-key"):
        raise ConfigError(f"`--name`: {name!r} cannot name a node's files (letters, digits, '.', '_', '-')")
    authority = _authority(org or out, "org", option="--org")
    issued = issue_node(authority, name, role, days=days)
    chain = issued.certificate_pem() + authority.certificate_pem()
    files = [(f"{name}.pem", chain, False), (f"{name}-key.pem", issued.key_pem(), True)]
    _write(out, files + _trust(org or out, out), force=force)


@app.command()
def crl(
    out: Annotated[Path, typer.Option("--out", help="Directory of the authorities and their lists.")] = Path("certs"),
    revoke: Annotated[
        list[str] | None, typer.Option(help="Certificate file, or serial as `show` prints it; repeat for several.")
    ] = None,
    issuer: Annotated[str, typer.Option(help="Whose serials those are: root or org.")] = "org",
    days: Days = CRL_DAYS,
) -> None:
    """Revoke certificates and renew the list of every authority whose key is in the directory."""
    authorities = {
        stem: _authority(out, stem, option="--out") for stem in AUTHORITIES if (out / f"{stem}-key.pem").exists()
    }
    if not authorities:
        raise ConfigError(f"`--out`: neither root-key.pem nor org-key.pem is in {out}")
    indexes = {stem: _read_index(_index_path(out, stem)) for stem in authorities}
    for wanted in revoke or []:
        stem, serial = _to_revoke(wanted, authorities, issuer)
        indexes[stem].revoked.setdefault(f"{serial:x}", datetime.now(UTC).replace(microsecond=0))
    for stem, index in indexes.items():
        index.number += 1
        # The index first: a list that is lost is made again, a revocation that is forgotten is not.
        save(_index_path(out, stem), msgspec.json.format(msgspec.json.encode(index)), force=True)
        revoked = {int(serial, 16): when for serial, when in index.revoked.items()}
        save(out / f"{stem}-crl.pem", issue_crl(authorities[stem], revoked, number=index.number, days=days), force=True)
        typer.echo(out / f"{stem}-crl.pem")
    # An authority whose key is elsewhere counts, too, if its list was copied here.
    lists = [path for stem in AUTHORITIES if (path := out / f"{stem}-crl.pem").exists()]
    save(out / "crls.pem", b"".join(path.read_bytes() for path in lists), force=True)
    typer.echo(out / "crls.pem")


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Certificates or revocation lists.")],
    json: Json = False,
) -> None:
    """Print what certificates and revocation lists say; with --json, one object per line."""
    for path in files:
        for entry in _describe_file(path):
            if json:
                typer.echo(msgspec.json.encode({"file": str(path), **entry}))
                continue
            typer.echo(f"{path}")
            for key, value in entry.items():
                typer.echo(f"  {key:<12} {', '.join(map(str, value)) if isinstance(value, list) else value}")


def main() -> None:
    """Entry point of the console script."""
    cli_app.main(app, PROGRAM)


def _describe_file(path: Path) -> list[dict[str, object]]:
    try:
        return [describe(each) for each in pem.read_certificates("FILE", path).certificates]
    except ConfigError:
        if not path.is_file() or b"X509 CRL" not in path.read_bytes():
            raise
    return [describe_crl(each) for each in pem.read_crls([path])]


def _authority(directory: Path, stem: str, *, option: str) -> Issued:
    certificates = pem.read_certificates(option, directory / f"{stem}.pem")
    certificates.require_authorities()
    certificates.require_dates(datetime.now(UTC))
    key = pem.read_key(option, directory / f"{stem}-key.pem")
    certificate = certificates.certificates[0]
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"`{option}`: {stem}-key.pem is not the key of {stem}.pem in {directory}")
    return Issued(certificate, key)


def _trust(source: Path, out: Path) -> list[NewFile]:
    """Return the trust file to copy along, so that the directory is complete by itself."""
    path = source / "trust.pem"
    if not path.exists():
        raise ConfigError(f"no trust.pem (the root CA's certificate) in {source}")
    data = path.read_bytes()
    already = out / "trust.pem"
    return [] if already.exists() and already.read_bytes() == data else [("trust.pem", data, False)]


def _write(out: Path, files: list[NewFile], *, force: bool) -> None:
    """Write all of the files, or none of them where one exists."""
    for name, _, _ in files:
        if (out / name).exists() and not force:
            raise ConfigError(f"{out / name} exists; --force overwrites it")
    for name, data, private in files:
        save(out / name, data, private=private, force=force)
        typer.echo(out / name)


def _index_path(out: Path, stem: str) -> Path:
    return out / f"{stem}-revoked.json"


def _read_index(path: Path) -> Revocations:
    if not path.exists():
        return Revocations()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Revocations)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged, restore it from backup: {error}") from error


def _to_revoke(wanted: str, authorities: dict[str, Issued], issuer: str) -> tuple[str, int]:
    """Return (authority, serial) for a certificate file or a serial in hexadecimal."""
    if Path(wanted).is_file():
        certificate = pem.read_certificates("--revoke", Path(wanted)).certificates[0]
        for stem, authority in authorities.items():
            if _issued_by(certificate, authority.certificate):
                return stem, certificate.serial_number
        raise ConfigError(f"`--revoke`: {wanted} was issued by no authority in the directory")
    if not re.fullmatch(r"(0x)?[0-9a-fA-F:]+", wanted):
        raise ConfigError(f"`--revoke`: {wanted!r} is neither a file nor a serial in hexadecimal")
    if issuer not in authorities:
        raise ConfigError(f"`--issuer`: {issuer!r} has no key in the directory (there: {', '.join(authorities)})")
    return issuer, int(wanted.replace(":", ""), 16)


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
