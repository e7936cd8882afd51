"""Certificates for benchmark processes: one throw-away PKI, one identity file set per node."""

from pathlib import Path

import msgspec

from hypha.pki import Identity, issue_node, issue_org, issue_root, load_identity, save


class Files(msgspec.Struct, frozen=True):
    """Where one node's certificates lie; what `load_identity` reads."""

    cert_pem: Path
    key_pem: Path
    trust_pem: Path
    crls_pem: tuple[Path, ...] = ()

    def identity(self) -> Identity:
        """Load them."""
        return load_identity(self)


def issue(directory: Path, names: dict[str, str]) -> dict[str, Files]:
    """Make a CA and a certificate for each name with its role; returns the files by name."""
    root = issue_root("bench root")
    org = issue_org(root, "bench")
    trust = directory / "trust.pem"
    save(trust, root.certificate_pem())
    files = {}
    for name, role in names.items():
        node = issue_node(org, name, [role])
        cert, key = directory / f"{name}.pem", directory / f"{name}-key.pem"
        save(cert, node.certificate_pem() + org.certificate_pem())
        save(key, node.key_pem(), private=True)
        files[name] = Files(cert, key, trust)
    return files
