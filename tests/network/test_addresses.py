"""What a node says of where it can be dialled, and what it believes of others."""

import ipaddress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from multiaddr import Multiaddr

from hypha.errors import ConfigError, RemoteProtocolError
from hypha.network import addresses
from hypha.pki import peer_id_of

HERE = Multiaddr("/ip4/192.0.2.1/tcp/4001")
PRIVATE = Multiaddr("/ip4/10.1.2.3/tcp/4001")


@pytest.fixture
def key():
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def me(key):
    return peer_id_of(key.public_key())


def test_signed_addresses_are_read_back_as_they_were(key, me):
    assert addresses.verify(me, addresses.sign(key, me, [HERE, PRIVATE])) == (HERE, PRIVATE)


@pytest.mark.parametrize("position", [0, 63, 64, -1])
def test_a_changed_byte_breaks_the_signature(key, me, position):
    signed = bytearray(addresses.sign(key, me, [HERE]))
    signed[position] ^= 1
    with pytest.raises(RemoteProtocolError, match=me):
        addresses.verify(me, bytes(signed))


def test_a_signature_over_another_peers_addresses_is_refused(key, me):
    other = peer_id_of(Ed25519PrivateKey.generate().public_key())
    with pytest.raises(RemoteProtocolError, match=f"name {other} instead"):
        addresses.verify(me, addresses.sign(key, other, [HERE]))


@pytest.mark.parametrize("peer_id", ["", "nonsense", "0OIl", "Qm" + "a" * 44])
def test_nonsense_for_a_peer_id_is_refused(key, me, peer_id):
    with pytest.raises(RemoteProtocolError):
        addresses.verify(peer_id, addresses.sign(key, me, [HERE]))


def test_more_addresses_than_anybody_needs_are_cut(key, me):
    many = [Multiaddr(f"/ip4/192.0.2.{n}/tcp/1") for n in range(1, 100)]
    assert addresses.verify(me, addresses.sign(key, me, many)) == tuple(many[: addresses.ADDRESSES_MAX])


def test_external_addresses_come_first_then_interfaces_then_circuits(me):
    circuit = Multiaddr(f"/ip4/198.51.100.1/tcp/1/p2p/{me}/p2p-circuit/p2p/{me}")
    found = addresses.advertised(
        listening=[PRIVATE, HERE],
        external=[Multiaddr(f"/dns4/node.example/tcp/1/p2p/{me}")],
        circuits=[circuit],
        excluded=(ipaddress.ip_network("10.0.0.0/8"),),
    )
    assert found == [Multiaddr("/dns4/node.example/tcp/1"), HERE, circuit]


def test_a_wildcard_stands_for_the_machines_interfaces():
    for wildcard in ("/ip4/0.0.0.0/tcp/7", "/ip6/::/tcp/7"):
        expanded = addresses.expand([Multiaddr(wildcard)])
        hosts = [ipaddress.ip_address(addresses.host_of(each)) for each in expanded]
        assert not any(host.is_unspecified for host in hosts)
        assert all(addresses.value(each, "tcp") == "7" for each in expanded)
        assert len({host.is_loopback for host in hosts}) <= 1
    assert addresses.expand([HERE]) == [HERE]


def test_the_peer_part_is_cut_off_but_never_from_a_circuit(me):
    assert addresses.without_peer(Multiaddr(f"{HERE}/p2p/{me}")) == HERE
    assert addresses.without_peer(HERE) == HERE
    assert addresses.without_peer(Multiaddr(f"{HERE}/p2p/{me}/p2p-circuit")) == Multiaddr(
        f"{HERE}/p2p/{me}/p2p-circuit"
    )


@pytest.mark.parametrize("text", ["", "nonsense", "/ip4/1.2.3.4", "/ip4/1.2.3.4/udp/1", "/ip4/300.1.1.1/tcp/1"])
def test_an_address_that_is_none_names_the_key(text):
    with pytest.raises(ConfigError, match="`listen_addresses`"):
        addresses.parse("listen_addresses", text)


def test_names_and_relays_are_never_excluded(me):
    everything = (ipaddress.ip_network("0.0.0.0/0"),)
    assert addresses.is_excluded(HERE, everything)
    assert not addresses.is_excluded(Multiaddr("/dns4/node.example/tcp/1"), everything)
    assert not addresses.is_excluded(Multiaddr(f"{HERE}/p2p/{me}/p2p-circuit"), everything)
