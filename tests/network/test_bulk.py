"""Connections of their own for large transfers: when there is one, who gets in, and what ends it."""

import os
import random
import socket
import threading
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

import pytest
import trio
from blake3 import blake3

from hypha import data_node
from hypha.errors import PeerUnreachable
from hypha.network import bulk, bulk_socket
from hypha.network.bulk import BulkTransport
from hypha.network.fetch import Providers, fetch_slice, provider_key
from hypha.network.lane import LANE_BYTES_MIN, Terms, lane_of
from hypha.network.mtls import HandshakeRefused
from hypha.network.transfer import send_file
from hypha.pki import issue_node, load_identity
from hypha.protocol.messages import FetchSlice, FileHeader, SliceRef
from hypha.runtime import RealRuntime
from hypha.telemetry import metrics
from tests.network.cast import DIGEST, fetch, opened
from tests.network.contract_transfers import Files, Outcome
from tests.network.libp2p_nodes import Nodes, answering, introduce, running, until

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(pki):
    return Nodes(pki)


@pytest.fixture
def dials(monkeypatch):
    """How every bulk dial ended: "connected", or why not."""
    ends = []
    dial = BulkTransport.dial

    async def noted(*arguments):
        try:
            secured = await dial(*arguments)
        except HandshakeRefused as refusal:
            ends.append(str(refusal))
            raise
        ends.append("connected")
        return secured

    monkeypatch.setattr(BulkTransport, "dial", noted)
    return ends


def serving(network, files):
    async def serve(stream, _header) -> None:
        await files.send(stream)

    network.accept_streams(FetchSlice, serve)
    return answering(network)


async def bring(asker, server, files) -> None:
    async with opened(asker, server.peer_id, fetch()) as stream:
        await files.receive(stream)


def at_rest(*networks) -> bool:
    """Whether nothing is held for any transfer."""
    return all(
        not each._bulk._offers and not each._bulk._places.total and not each._bulk.limiter.borrowed_tokens
        for each in networks
    )


# --- which way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "ends"), [(LANE_BYTES_MIN, ["connected"]), (LANE_BYTES_MIN - 1, [])])
async def test_only_a_large_file_gets_a_connection_of_its_own(nodes, tmp_path, dials, size, ends):
    files = Files(tmp_path, size)
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b:
        introduce(a, b)
        sent = metrics.NETWORK_BYTES_SENT.total()
        await bring(a, serving(b, files), files)
        assert files.arrived()
        assert dials == ends
        assert metrics.NETWORK_BYTES_SENT.total() - sent >= size
        assert [len(conns) for conns in a._swarm.connections.values()] == [1]
        assert at_rest(a, b)


async def test_a_slice_comes_that_way_from_a_data_node_and_is_counted_there(nodes, tmp_path, dials):
    data = random.Random(1).randbytes(LANE_BYTES_MIN + 5)
    (tmp_path / "source").write_bytes(data)
    ref = SliceRef(name="one", samples=1, bytes=len(data), digest=blake3(data).hexdigest(), digest_algorithm="blake3")
    header = FileHeader(bytes=ref.bytes, digest=ref.digest)
    runtime = RealRuntime()
    async with (
        nodes.alone("gateway", "gateway") as gateway,
        nodes.joined(gateway, "a", "worker") as a,
        nodes.joined(gateway, "b", "data") as b,
    ):

        async def serve(stream, wanted) -> None:
            await stream.send_message(header)
            counted, length = data_node.Counted(stream, "counted"), ref.bytes - wanted.offset
            await send_file(counted, tmp_path / "source", offset=wanted.offset, length=length, runtime=runtime)
            await stream.send_eof()

        b.accept_streams(FetchSlice, serve)
        await b.provide(provider_key("d", DIGEST))
        before = metrics.BYTES_SERVED.total()
        providers = Providers(a, runtime, "d")
        await fetch_slice(a, runtime, providers, ref, tmp_path / "copy", manifest_digest=DIGEST)
        assert (tmp_path / "copy").read_bytes() == data
        assert dials == ["connected"]
        await until(lambda: metrics.BYTES_SERVED.total() - before == len(data))


async def test_through_a_relay_the_stream_serves(nodes, tmp_path, dials):
    files = Files(tmp_path)
    async with nodes.alone("gateway", "gateway") as gateway:
        hidden = {"exclude_cidr": ("127.0.0.0/8",)}
        async with nodes.joined(gateway, "a", "worker", **hidden) as a, nodes.joined(gateway, "b", "data") as b:
            await bring(a, serving(b, files), files)
            conn = a._dialer.live(next(each for each in a._swarm.connections if str(each) == b.peer_id))
            assert conn.muxed_conn.secured_conn.tcp_address is None
    assert files.arrived()
    assert dials == []


@pytest.mark.parametrize("why", ["the port is closed", "no answer", "another key"])
async def test_where_the_dial_fails_the_stream_serves(nodes, tmp_path, dials, monkeypatch, why):
    files, silent = Files(tmp_path), socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(bulk, "DIAL_S", 0.3)
    async with (
        nodes.alone("a", "worker") as a,
        nodes.alone("b", "data") as b,
        nodes.alone("c", "data") as c,
    ):
        introduce(a, b)
        serving(b, files)
        async with opened(a, b.peer_id, fetch()) as stream:
            port = {
                "no answer": silent.getsockname()[1],
                "another key": int(c.listen_addresses()[0].split("/")[4]),
                "the port is closed": 1,
            }[why]
            monkeypatch.setattr(type(stream.connection), "tcp_address", ("127.0.0.1", port))
            await files.receive(stream)
        assert at_rest(a, b)
    silent.close()
    assert files.arrived()
    (reason,) = dials
    assert {"the port is closed": "refused", "no answer": "within 0.3 s", "another key": "certificate is of"}[
        why
    ] in reason


async def test_a_peer_gets_so_many_places_and_others_still_find_some(nodes):
    async with nodes.alone("a", "worker") as a:
        held = ExitStack()
        places = [held.enter_context(a._bulk.place("greedy")) for _ in range(bulk.TRANSFERS_PER_PEER_MAX + 1)]
        assert places == [True] * bulk.TRANSFERS_PER_PEER_MAX + [False]
        others = [held.enter_context(a._bulk.place(str(number))) for number in range(bulk.TRANSFERS_MAX)]
        assert others.count(True) == bulk.TRANSFERS_MAX - bulk.TRANSFERS_PER_PEER_MAX
        held.close()
        assert at_rest(a)


# --- who gets in -----------------------------------------------------------------------------------------------------


def address_of(network) -> tuple[str, int]:
    return "127.0.0.1", int(network.listen_addresses()[0].split("/")[4])


async def test_a_token_lets_its_own_peer_in_and_only_once(nodes):
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b, nodes.alone("c", "worker") as c:
        with b._bulk.offered(a.peer_id) as offer:
            for stranger, token in ((a, os.urandom(32)), (c, offer.token), (b, offer.token)):
                with pytest.raises(HandshakeRefused):
                    await stranger._bulk.dial(*address_of(b), b.peer_id, token)
            ours = await a._bulk.dial(*address_of(b), b.peer_id, offer.token)
            with pytest.raises(HandshakeRefused):
                await a._bulk.dial(*address_of(b), b.peer_id, offer.token)
            theirs = offer.take()
            await bulk_socket.step(theirs, theirs.send, b"for you")
            assert await bulk_socket.receive_exactly(ours, 7) == b"for you"
            ours.close(), theirs.close()
        assert at_rest(a, b, c)
        assert b.connected_peers() == []


async def test_a_token_ends_with_its_time_and_with_its_transfer(nodes, monkeypatch):
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b:
        with b._bulk.offered(a.peer_id) as gone:
            pass
        with monkeypatch.context() as patch:
            patch.setattr(bulk, "OFFER_S", -1.0)
            with b._bulk.offered(a.peer_id) as late:
                for offer in (gone, late):
                    with pytest.raises(HandshakeRefused):
                        await a._bulk.dial(*address_of(b), b.peer_id, offer.token)
        with b._bulk.offered(a.peer_id) as left:
            ours = await a._bulk.dial(*address_of(b), b.peer_id, left.token)
        with pytest.raises(OSError, match=r"reset|EOF"):
            await bulk_socket.receive_exactly(ours, 1)
        ours.close()
        assert at_rest(a, b)


async def test_certificates_are_judged_as_everywhere(pki, nodes, foreign_pki, tmp_path, caplog):
    crls = tmp_path / "crls.pem"
    pki.crls(crls, {})
    issued = issue_node(pki.org, "leaver", ["worker"])
    leaver = load_identity(pki.write("leaver", issued))
    files = pki.node("listener", ["data"])
    listener = load_identity(type(files)(files.directory, files.cert_pem, files.key_pem, files.trust_pem, (crls,)))
    async with (
        running(listener, "data") as b,
        running(leaver) as a,
        Nodes(foreign_pki).alone("stranger", "worker") as stranger,
    ):
        with pytest.raises(HandshakeRefused, match="its certificate refused: unknown CA"):
            await stranger._bulk.dial(*address_of(b), b.peer_id, bytes(32))
        with b._bulk.offered(a.peer_id) as offer:
            pki.crls(crls, {issued.certificate.serial_number: datetime.now(UTC)}, number=2)
            await b.reload_crls()
            with pytest.raises(HandshakeRefused, match="our certificate refused: revoked"):
                await a._bulk.dial(*address_of(b), b.peer_id, offer.token)
            assert offer.take() is None
        assert "Connection refused" in caplog.text


async def test_who_says_nothing_holds_no_thread_and_stops_nobody(nodes, tmp_path):
    files = Files(tmp_path)
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b:
        silent = []
        for _ in range(5):
            raw = await trio.open_tcp_stream(*address_of(b))
            await raw.send_all(b"\x13/multistream/1.0.0\n\x12" + bulk.PROTOCOL_ID.encode() + b"\n")
            silent.append(raw)
        introduce(a, b)
        await bring(a, serving(b, files), files)
        assert files.arrived()
        assert at_rest(a, b)
        for raw in silent:
            await raw.aclose()


# --- what ends it ----------------------------------------------------------------------------------------------------


class Held:
    """A sender's source that stands still after the first MiB until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._first = True

    def __call__(self, buffer: memoryview) -> int:
        if not self._first:
            self.reached.set()
            self.go_on.wait(20)
        self._first = False
        return len(buffer)


async def held_transfer(a, b, held, ended, *, stall_s: float = 30.0):
    """Start a transfer from b to a that stands still, and say how the receiver's end comes."""

    async def serve(stream, _header) -> None:
        async with lane_of(stream, Terms(sending=True), 1 << 30) as lane:
            await lane.send(held, 1 << 30)

    b.accept_streams(FetchSlice, serve)

    async def receive() -> None:
        async with (
            opened(a, b.peer_id, fetch()) as stream,
            lane_of(stream, Terms(sending=False, stall_s=stall_s), 1 << 30) as lane,
        ):
            await lane.receive(lambda _view: None, 1 << 30)

    with suppress(PeerUnreachable):
        await ended.of(receive())


async def test_a_sender_that_stands_still_is_given_up(nodes):
    held, ended = Held(), Outcome()
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b:
        introduce(a, b)
        await held_transfer(a, b, held, ended, stall_s=0.4)
        assert "nothing moved for 0.4 s" in str(await ended.wait())
        held.go_on.set()
        await until(lambda: at_rest(a, b))


async def test_a_transfer_ends_with_the_connection_of_its_stream(nodes):
    held, ended = Held(), Outcome()
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b, trio.open_nursery() as nursery:
        introduce(a, b)
        nursery.start_soon(held_transfer, a, b, held, ended)
        await until(held.reached.is_set)
        (conns,) = a._swarm.connections.values()
        await conns[0].close()
        assert "the stream that it belongs to ended" in str(await ended.wait())
        held.go_on.set()
        await until(lambda: at_rest(a, b))


async def test_a_peer_revoked_during_a_transfer_does_not_get_the_rest(pki, tmp_path):
    crls = tmp_path / "crls.pem"
    pki.crls(crls, {})
    issued = issue_node(pki.org, "leaver", ["worker"])
    leaver = load_identity(pki.write("leaver", issued))
    files = pki.node("listener", ["data"])
    listener = load_identity(type(files)(files.directory, files.cert_pem, files.key_pem, files.trust_pem, (crls,)))
    held, ended = Held(), Outcome()
    async with running(listener, "data") as b, running(leaver) as a, trio.open_nursery() as nursery:
        introduce(a, b)
        nursery.start_soon(held_transfer, a, b, held, ended)
        await until(held.reached.is_set)
        pki.crls(crls, {issued.certificate.serial_number: datetime.now(UTC)}, number=2)
        assert await b.reload_crls()
        assert isinstance(await ended.wait(), PeerUnreachable)
        held.go_on.set()
        await until(lambda: at_rest(a, b))


async def test_a_peer_that_is_gone_before_the_handshake_leaves_no_socket_open(nodes):
    context = nodes.identity("a", "data").server_context(bulk.ALPN)
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    peer = socket.create_connection(listener.getsockname())
    accepted, _ = await listener.accept()
    listener.close()
    plain = socket.socket(fileno=accepted.detach())
    plain.settimeout(0.0)
    bulk_socket.abort(peer)
    await trio.lowlevel.wait_readable(plain)
    descriptor = plain.fileno()
    with pytest.raises(ConnectionResetError):
        await bulk_socket.handshake(plain, context, server_side=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_many_given_up_transfers_leave_nothing_behind(nodes, tmp_path):
    files = Files(tmp_path, 4 * LANE_BYTES_MIN)
    async with nodes.alone("a", "worker") as a, nodes.alone("b", "data") as b:
        introduce(a, b)
        serving(b, files)
        await bring(a, b, files)
        before = len(os.listdir("/proc/self/fd"))
        for number in range(24):
            with trio.move_on_after(0.002 * number):
                await bring(a, b, files)
        await until(lambda: at_rest(a, b))
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        await bring(a, b, files)
        assert files.arrived()
