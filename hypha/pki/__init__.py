"""Certificates: who a node is, whom it believes, and how certificates come to be.

    root CA ──signs──▶ organisation CA ──signs──▶ node certificate ──names──▶ peer id, roles
       │                      │                          │
       └─ trust.pem           └─ carried as chain        └─ Ed25519 key = libp2p key
       └──────── one CRL each, where revocation is configured

`identity` loads and judges a node's files and builds its TLS contexts; `authority` issues. OpenSSL verifies every
chain; nothing here ever decides that one is good.
"""

from hypha.pki.authority import (
    ROLES,
    Issued,
    issue_crl,
    issue_node,
    issue_org,
    issue_root,
    save,
)
from hypha.pki.identity import Identity, load_identity
from hypha.pki.names import PeerIdentity, peer_id_of, peer_of

__all__ = [
    "ROLES",
    "Identity",
    "Issued",
    "PeerIdentity",
    "issue_crl",
    "issue_node",
    "issue_org",
    "issue_root",
    "load_identity",
    "peer_id_of",
    "peer_of",
    "save",
]
