"""Who gets in, who does not, what both sides hear of it, and that nobody else is harmed."""

import logging
from datetime import UTC, datetime, timedelta

import pytest
import trio

from hypha.errors import ConfigError, PeerUnreachable, RemoteProtocolError
from hypha.network import addresses, revocation
from hypha.network.probe import identify, probe
from hypha.pki import Identity, issue_node, load_identity
from hypha.pki.pem import read_certificates
from hypha.protocol.messages import Ack, Health, HealthReport
from hypha.telemetry import metrics
from tests.network.cast import status
from tests.network.libp2p_nodes import Nodes, answering, introduce, running, until

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(pki):
    return Nodes(pki)


def unjudged(pki, name: str, **dates: object) -> Identity:
    """An identity whose certificate `load_identity` would refuse."""
    issued = issue_node(pki.org, name, ["worker"], **dates)
    files = pki.write(name, issued)
    chain = read_certificates("cert_pem", files.cert_pem).certificates
    trust = read_certificates("trust_pem", files.trust_pem)
    return Identity(key=issued.key, chain=chain, trust=trust, crl_paths=(), warnings=[])


async def refused(asker, other) -> str:
    introduce(asker, other)
    with pytest.raises(PeerUnreachable) as error:
        await asker.request(other.peer_id, status())
    return str(error.value)


async def test_a_certificate_of_another_authority_is_refused_by_both_sides_and_harms_nobody(nodes, foreign_pki, caplog):
    strangers = Nodes(foreign_pki)
    async with (
        nodes.alone("listener", "worker") as listener,
        strangers.alone("stranger", "scheduler") as stranger,
        nodes.alone("friend", "scheduler") as friend,
    ):
        answering(listener), answering(stranger)
        assert "its certificate refused: unknown CA" in await refused(stranger, listener)
        assert "its certificate refused: unknown CA" in await refused(friend, stranger)
        introduce(friend, listener)
        assert await friend.request(listener.peer_id, status()) == Ack()
        assert stranger.connected_peers() == []
        refusals = [r for r in caplog.records if r.message == "Connection refused"]
        assert {r.hypha_fields["reason"] for r in refusals} == {"our certificate refused: unknown CA"}


async def test_a_refused_dialer_is_told_why_and_the_listener_says_so_once(pki, caplog):
    late = unjudged(pki, "late", start=datetime.now(UTC) - timedelta(days=30), days=1)
    nodes = Nodes(pki)
    async with nodes.alone("listener", "worker") as listener, running(late) as expired:
        answering(listener)
        before = metrics.snapshot().get("hypha_connections_failed_total", 0.0)
        assert "our certificate refused: expired" in await refused(expired, listener)
        assert "our certificate refused: expired" in await refused(expired, listener)
        await until(lambda: metrics.snapshot()["hypha_connections_failed_total"] >= before + 2)
        told = [r.hypha_fields["reason"] for r in caplog.records if r.message == "Connection refused"]
        assert told == ["its certificate refused: expired"]


@pytest.fixture
def with_lists(pki, tmp_path, monkeypatch):
    """A node that is given revocation lists, one whose certificate is not in them yet, the serial, and the file."""
    monkeypatch.setattr(revocation, "POLL_S", 0.05)
    crls = tmp_path / "crls.pem"
    pki.crls(crls, {})
    leaver = issue_node(pki.org, "leaver", ["scheduler"])
    files = pki.node("listener", ["worker"])
    listener = load_identity(type(files)(files.directory, files.cert_pem, files.key_pem, files.trust_pem, (crls,)))
    return listener, load_identity(pki.write("leaver", leaver)), leaver.certificate.serial_number, crls


async def test_a_peer_revoked_while_the_node_runs_is_hung_up_on_and_others_are_not(pki, nodes, with_lists, caplog):
    listener, leaver, serial, crls = with_lists
    caplog.set_level(logging.INFO, "hypha.network.revocation")
    async with (
        running(listener) as host,
        running(leaver, "scheduler") as guest,
        nodes.alone("friend", "scheduler") as friend,
    ):
        answering(host)
        for each in (guest, friend):
            introduce(each, host)
            assert await each.request(host.peer_id, status()) == Ack()
        kept = next(iter(friend._swarm.connections.values()))[0]
        pki.crls(crls, {serial: datetime.now(UTC)}, number=2)
        await until(lambda: guest.connected_peers() == [])
        assert "our certificate refused: revoked" in await refused(guest, host)
        assert await friend.request(host.peer_id, status()) == Ack()
        assert not kept.is_closed
        said = [r.message for r in caplog.records if r.name.endswith("revocation")]
        assert said == ["Revocation lists read again", "Hung up on a revoked peer"]


async def test_lists_that_cannot_be_used_leave_the_old_ones_in_force_and_are_named_once(
    pki, with_lists, caplog, monkeypatch
):
    listener, leaver, serial, crls = with_lists
    said, looks = "hypha.network.revocation", []
    look = revocation._stamps
    monkeypatch.setattr(revocation, "_stamps", lambda paths: looks.append(paths) or look(paths))
    async with running(listener) as host, running(leaver, "scheduler") as guest:
        answering(host)
        pki.crls(crls, {serial: datetime.now(UTC)}, number=2)
        await until(lambda: listener.is_revoked(leaver._me))
        crls.write_text("half a list")
        await until(lambda: any(r.name == said and r.levelno == logging.ERROR for r in caplog.records))
        assert "our certificate refused: revoked" in await refused(guest, host)
        seen = len(looks)
        await until(lambda: len(looks) >= seen + 3)
        (complaint,) = [r.message for r in caplog.records if r.name == said]
        assert str(crls) in complaint
        pki.crls(crls, {}, number=3)
        await until(lambda: not listener.is_revoked(leaver._me))
        introduce(guest, host)
        assert await guest.request(host.peer_id, status()) == Ack()


async def test_lists_are_read_again_when_asked(pki, with_lists, monkeypatch):
    monkeypatch.setattr(revocation, "POLL_S", 3600.0)
    listener, leaver, serial, crls = with_lists
    async with running(listener) as host, running(leaver, "scheduler") as guest:
        answering(host)
        introduce(guest, host)
        assert await guest.request(host.peer_id, status()) == Ack()
        pki.crls(crls, {serial: datetime.now(UTC)}, number=2)
        assert await host.reload_crls()
        await until(lambda: guest.connected_peers() == [])
        assert not await host.reload_crls()


async def test_another_key_at_the_right_address_is_not_the_peer(nodes):
    async with nodes.alone("a", "scheduler") as a, nodes.alone("b", "worker") as b:
        answering(b)
        absent = nodes.identity("absent", "worker").peer_id
        port = b.listen_addresses()[0].partition("/p2p/")[0]
        a._dialer.learn(addresses_id(absent), [addresses.parse("", port)])
        with pytest.raises(PeerUnreachable, match=f"expected {absent}, but the certificate is of {b.peer_id}"):
            await a.request(absent, status())


def addresses_id(peer_id: str):
    from libp2p.peer.id import ID

    return ID.from_string(peer_id)


async def test_noise_on_the_port_harms_nobody(nodes):
    async with nodes.alone("a", "scheduler") as a, nodes.alone("b", "worker") as b:
        answering(b)
        port = int(b.listen_addresses()[0].split("/")[4])
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b""):
            socket = await trio.open_tcp_stream("127.0.0.1", port)
            await socket.send_all(junk)
            await socket.aclose()
        silent = await trio.open_tcp_stream("127.0.0.1", port)
        introduce(a, b)
        assert await a.request(b.peer_id, status()) == Ack()
        await silent.aclose()


async def test_garbage_on_a_stream_harms_no_other_stream(nodes):
    async with nodes.alone("a", "scheduler") as a, nodes.alone("b", "worker") as b:
        answering(b)
        introduce(a, b)
        assert await a.request(b.peer_id, status()) == Ack()
        conn = next(iter(a._swarm.connections.values()))[0].muxed_conn
        for junk in (b"\x05hello", b"\xff" * 1000, b"\x13/multistream/1.0.0\n\x03\xff\xfe\n"):
            stream = await conn.open_stream()
            await stream.write(junk, last=True)
        assert await a.request(b.peer_id, status()) == Ack()
        assert not conn.is_closed


# --- probe -----------------------------------------------------------------------------------------------------------


async def report(peer, _message):
    return HealthReport(peer_id="me", role="worker", version="1", uptime_s=1.0, detail={"asked by": peer.peer_id})


async def test_a_node_is_probed_with_any_certificate_its_own_included(nodes):
    async with nodes.alone("b", "worker") as b:
        b.serve(Health, report)
        where = b.listen_addresses()[0]
        for identity in (nodes.identity("b"), nodes.identity("somebody", "data")):
            health = await probe(identity, where)
            assert health.detail == {"asked by": identity.peer_id}
        assert (await probe(nodes.identity("b"), where.partition("/p2p/")[0])).role == "worker"
        assert (await identify(nodes.identity("b"), addresses.parse("", where))).peer_id == b.peer_id
        assert b.connected_peers() == []


async def test_a_probe_says_why_it_failed(nodes, foreign_pki):
    async with nodes.alone("b", "worker") as b:
        where = b.listen_addresses()[0]
        stranger = Nodes(foreign_pki).identity("stranger", "worker")
        with pytest.raises(PeerUnreachable, match="its certificate refused: unknown CA"):
            await probe(stranger, where)
        other = nodes.identity("other", "worker").peer_id
        with pytest.raises(PeerUnreachable, match=f"expected {other}"):
            await probe(nodes.identity("b"), where.replace(b.peer_id, other))
        with pytest.raises(RemoteProtocolError, match="Health is not served"):
            await probe(nodes.identity("b"), where)
    with pytest.raises(PeerUnreachable, match="refused"):
        await probe(nodes.identity("b"), where)
    with pytest.raises(ConfigError, match="nonsense"):
        await probe(nodes.identity("b"), "nonsense")
