"""Where nodes can be dialled: what a node says of itself, signed, and which addresses are worth a dial.

    listeners ─▶ wildcard? every interface ─▶ not excluded ─┐
    external_addresses (as they are) ───────────────────────┼─▶ advertised ─▶ signed ─▶ inside messages ─▶ learn
    gateways with a reservation ─▶ …/p2p-circuit ───────────┘

    signed = 64 bytes of Ed25519 signature │ CBOR [peer id, [address, …]]

The signature is made with the node's own key, which its peer id contains: whoever holds the peer id can check it.
"""

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from functools import lru_cache

import base58
import cbor2
import msgspec
import psutil
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from hypha.errors import ConfigError, RemoteProtocolError

# A machine with many interfaces still needs no more, and a liar may not make us dial for ever.
ADDRESSES_MAX = 16
# Signed statements whose signature need not be checked again: one for each peer that a busy node talks to.
STATEMENTS_REMEMBERED_MAX = 4096
# Signatures are bound to this use of the key.
_CONTEXT = b"hypha addresses 1:"
_SIGNATURE_BYTES = 64
_KEY_BYTES = 32
CIRCUIT = "/p2p-circuit"
# An interface that does not exist any more, or was never meant for others.
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - recognised here, not bound to

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse(key: str, address: str) -> Multiaddr:
    """Return the multiaddr. Raises ConfigError naming the configuration key."""
    try:
        parsed = Multiaddr(address)
        names = [protocol.name for protocol in parsed.protocols()]
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(f"`{key}`: {address!r} is not a multiaddr: {error}") from error
    if "tcp" not in names:
        raise ConfigError(f"`{key}`: {address!r} is not a TCP address (/ip4/192.0.2.1/tcp/4001)")
    return parsed


def parse_networks(key: str, networks: Iterable[str]) -> tuple[Network, ...]:
    """Return the networks. Raises ConfigError naming the configuration key."""
    try:
        return tuple(ipaddress.ip_network(network) for network in networks)
    except ValueError as error:
        raise ConfigError(f"`{key}`: {error}") from error


def value(address: Multiaddr, protocol: str) -> str | None:
    """Return the first value of a protocol in the address, or None."""
    for known, found in address.items():
        if known.name == protocol:
            return str(found)
    return None


def host_of(address: Multiaddr) -> str | None:
    """Return the IP address or DNS name that the address begins with."""
    return next((found for name in ("ip4", "ip6", "dns4", "dns6", "dns") if (found := value(address, name))), None)


def is_circuit(address: Multiaddr) -> bool:
    """Whether the address leads through a relay."""
    return CIRCUIT in str(address)


def without_peer(address: Multiaddr) -> Multiaddr:
    """Return the address without its last /p2p part, unless that follows a circuit."""
    text = str(address)
    head, mark, _ = text.rpartition("/p2p/")
    return Multiaddr(head) if mark and "/" not in text[len(head) + len(mark) :] else address


def is_excluded(address: Multiaddr, excluded: Iterable[Network]) -> bool:
    """Whether the address lies in one of the networks; names and relays never do."""
    host = host_of(address)
    if host is None or is_circuit(address):
        return False
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(ip in network for network in excluded)


def _interfaces(family: socket.AddressFamily) -> list[str]:
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == family and "%" not in entry.address
    ]
    reachable = [host for host in found if not ipaddress.ip_address(host).is_loopback]
    return sorted(reachable or found)


def expand(listening: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Replace each wildcard by the machine's interfaces; loopback only where there is nothing else."""
    expanded: list[Multiaddr] = []
    for address in listening:
        host, port = host_of(address), value(address, "tcp")
        if host not in _WILDCARDS:
            expanded.append(address)
            continue
        kind = "ip6" if host == "::" else "ip4"
        family = socket.AF_INET6 if host == "::" else socket.AF_INET
        expanded += [Multiaddr(f"/{kind}/{each}/tcp/{port}") for each in _interfaces(family)]
    return expanded


def advertised(
    *,
    listening: Iterable[Multiaddr],
    external: Iterable[Multiaddr],
    circuits: Iterable[Multiaddr],
    excluded: Sequence[Network],
) -> list[Multiaddr]:
    """Return what others should dial, best first, without duplicates: external, own interfaces, circuits."""
    own = [address for address in expand(listening) if not is_excluded(address, excluded)]
    plain = [without_peer(address) for address in (*external, *own)]
    return list(dict.fromkeys((*plain, *circuits)))[:ADDRESSES_MAX]


def sign(key: Ed25519PrivateKey, peer_id: str, addresses: Iterable[Multiaddr]) -> bytes:
    """Return the addresses with a signature over them and the peer id."""
    body: bytes = cbor2.dumps([peer_id, [str(address) for address in addresses]])
    return key.sign(_CONTEXT + body) + body


@lru_cache(maxsize=STATEMENTS_REMEMBERED_MAX)
def verify(peer_id: str, signed: bytes) -> tuple[Multiaddr, ...]:
    """Return what `peer_id` says of itself. Raises RemoteProtocolError when it did not sign this.

    Every offer and advertisement carries the same statement for as long as its sender's addresses stay.
    """
    signature, body = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
    try:
        _key_in(peer_id).verify(signature, _CONTEXT + body)
        signer, texts = msgspec.convert(cbor2.loads(body), tuple[str, list[str]])
        addresses = tuple(Multiaddr(text) for text in texts[:ADDRESSES_MAX])
    except InvalidSignature as error:
        raise RemoteProtocolError(f"addresses of {peer_id} are not signed by it") from error
    except (ValueError, cbor2.CBORDecodeError, msgspec.ValidationError, MultiaddrError) as error:
        raise RemoteProtocolError(f"addresses of {peer_id} are malformed: {error}") from error
    if signer != peer_id:
        raise RemoteProtocolError(f"addresses of {peer_id} name {signer} instead")
    return addresses


def _key_in(peer_id: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(base58.b58decode(peer_id)[-_KEY_BYTES:])
