"""How nodes reach each other: gateways that come late, relays, restarts, ports, addresses."""

import logging

import pytest
import trio
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from hypha.errors import ConfigError, JobFailed, PeerUnreachable
from hypha.network import addresses, gateways
from hypha.protocol.messages import TOPIC_WORKER, Ack, FetchSlice, JobStatus
from hypha.telemetry import metrics
from tests.network.cast import CHUNK, ack, advertisement, eventually_answers, fetch, opened, receive_all, status
from tests.network.libp2p_nodes import Nodes, answering, introduce, until

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(pki):
    return Nodes(pki)


async def test_a_port_that_is_taken_names_the_key(nodes):
    async with nodes.alone("a", "worker") as a:
        taken = a.listen_addresses()[0].partition("/p2p/")[0]
        with pytest.raises(ConfigError, match=r"`listen_addresses`.*address already in use"):
            async with nodes.alone("b", "worker", listen_addresses=(taken,)):
                pass


async def test_both_families_may_share_a_port(nodes):
    async with nodes.alone("a", "worker") as a:
        port = addresses.value(addresses.parse("", a.listen_addresses()[0]), "tcp")
    both = (f"/ip4/0.0.0.0/tcp/{port}", f"/ip6/::/tcp/{port}")
    async with nodes.alone("a", "worker", listen_addresses=both) as a:
        assert {each.split("/")[4] for each in a.listen_addresses()} == {port}
        assert len(a._swarm.listeners) == 2


@pytest.mark.parametrize("key", ["listen_addresses", "gateway_addresses", "external_addresses", "exclude_cidr"])
async def test_an_address_that_does_not_parse_names_the_key(nodes, key):
    with pytest.raises(ConfigError, match=f"`{key}`"):
        async with nodes.alone("a", "worker", **{key: ("nonsense",)}):
            pass


async def test_a_gateway_that_comes_late_is_found_and_its_absence_is_said_once(nodes, caplog, monkeypatch):
    monkeypatch.setattr(gateways, "UNREACHABLE_S", 0.0)
    async with nodes.alone("gateway", "gateway") as gateway:
        where = gateway.listen_addresses()[0]
    port = where.partition("/p2p/")[0]
    caplog.clear()
    caplog.set_level(logging.INFO, "hypha")
    async with nodes.alone("a", "worker", gateway_addresses=(port,)) as a:
        await until(lambda: len([r for r in caplog.records if "No gateway reachable" in r.message]) > 0)
        async with nodes.alone("gateway", "gateway", listen_addresses=(port,)) as gateway:
            await until(lambda: [peer.peer_id for peer in a.connected_peers()] == [gateway.peer_id])
        await until(lambda: a.connected_peers() == [])
        async with nodes.alone("gateway", "gateway", listen_addresses=(port,)):
            await until(lambda: len(a.connected_peers()) == 1)
        said = [r.message for r in caplog.records if "ateway" in r.message]
        assert said.count("Gateway connected") == 2
        assert 2 <= said.count("No gateway reachable; trying on") <= 3


async def test_a_gateway_lost_for_a_moment_is_no_news(nodes, caplog):
    async with nodes.alone("gateway", "gateway") as gateway:
        port = gateway.listen_addresses()[0].partition("/p2p/")[0]
    caplog.clear()
    caplog.set_level(logging.INFO, "hypha")
    async with nodes.alone("a", "worker", gateway_addresses=(port,)) as a:
        for _ in range(2):
            async with nodes.alone("gateway", "gateway", listen_addresses=(port,)):
                await until(lambda: len(a.connected_peers()) == 1)
            await until(lambda: a.connected_peers() == [])
    said = [r.message for r in caplog.records if "ateway" in r.message]
    assert said == ["No gateway reachable; trying on", "Gateway connected"]


async def test_a_provider_is_found_again_after_its_gateway_forgot_everything(nodes):
    async with nodes.alone("gateway", "gateway") as gateway:
        where = gateway.listen_addresses()[0]
        port = where.partition("/p2p/")[0]
        gone = trio.Event()

        async def provider(task_status: trio.TaskStatus) -> None:
            async with nodes.alone("data", "data", gateway_addresses=(where,)) as data:
                await data.provide("dataset")
                task_status.started(data.peer_id)
                await gone.wait()

        async with trio.open_nursery() as nursery:
            peer_id = await nursery.start(provider)
            await gateway._close()
            async with nodes.alone("gateway", "gateway", listen_addresses=(port,)) as again:
                async with nodes.joined(again, "worker", "worker") as worker:
                    found = []
                    while found != [peer_id]:
                        found = await worker.find_providers("dataset", wanted=3)
                        await trio.sleep(0.05)
                gone.set()
        assert found == [peer_id]


@pytest.mark.parametrize("introduced", [True, False])
async def test_peers_that_cannot_dial_each_other_meet_through_the_gateways_relay(nodes, introduced):
    walls = ("127.0.0.0/8",)
    async with (
        nodes.alone("gateway", "gateway") as gateway,
        nodes.joined(gateway, "a", "scheduler", exclude_cidr=walls) as a,
        nodes.joined(gateway, "b", "worker", exclude_cidr=walls) as b,
    ):
        await until(lambda: "p2p-circuit" in str(b._relay.circuits()))
        if introduced:
            introduce(a, b)

        async def serve(stream, _header: FetchSlice) -> None:
            await stream.send_all(CHUNK * 8)

        b.serve(JobStatus, ack)
        b.accept_streams(FetchSlice, serve)
        assert await a.request(b.peer_id, status()) == Ack()
        conn = a._dialer.live(ID.from_string(b.peer_id))
        assert conn.get_connection_type() == ConnectionType.RELAYED
        async with opened(a, b.peer_id, fetch()) as stream:
            await stream.send_eof()
            assert await receive_all(stream) == CHUNK * 8
        assert metrics.snapshot()["hypha_relay_circuits_active"] >= 1
        assert metrics.snapshot()["hypha_relay_bytes_total"] > 8 * len(CHUNK)


async def test_without_relays_a_peer_behind_walls_is_unreachable_with_the_reasons(nodes):
    async with (
        nodes.alone("gateway", "gateway") as gateway,
        nodes.joined(gateway, "a", "scheduler", exclude_cidr=("127.0.0.0/8",), relay_circuit=False) as a,
        nodes.joined(gateway, "b", "worker", relay_circuit=False) as b,
    ):
        introduce(a, b)
        with pytest.raises(PeerUnreachable, match=f"{b.peer_id} cannot be reached"):
            await a.request(b.peer_id, status())


async def test_a_peer_on_a_new_port_is_found_by_what_it_signed(nodes):
    async with nodes.alone("a", "scheduler") as a:
        for _ in range(3):
            async with nodes.alone("b", "worker") as b:
                answering(b)
                introduce(a, b)
                assert await eventually_answers(a, b.peer_id) == Ack()


async def test_many_who_ask_at_once_share_one_dial(nodes):
    async with nodes.alone("a", "scheduler") as a, nodes.alone("b", "worker") as b:
        answering(b)
        introduce(a, b)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(a.request, b.peer_id, status())
        assert len(a._swarm.get_connections()) == 1


async def test_a_cancelled_write_leaves_the_connection_whole(nodes):
    async with nodes.alone("a", "scheduler") as a, nodes.alone("b", "worker") as b:
        answering(b)
        introduce(a, b)

        async def hold(stream, _header: FetchSlice) -> None:
            await trio.sleep_forever()

        b.accept_streams(FetchSlice, hold)
        for _ in range(10):
            with trio.move_on_after(0.02):
                async with opened(a, b.peer_id, fetch()) as stream:
                    await stream.send_all(CHUNK * 16)
        conns = a._swarm.get_connections()
        assert await a.request(b.peer_id, status()) == Ack()
        assert a._swarm.get_connections() == conns


async def test_inbound_places_come_back_when_connections_end(nodes):
    async with nodes.alone("b", "worker") as b:
        answering(b)
        b._swarm._inbound_limiter.total_tokens = 2
        for _ in range(5):
            async with nodes.alone("a", "scheduler") as a:
                introduce(a, b)
                assert await a.request(b.peer_id, status()) == Ack()
            await until(lambda: b._swarm._inbound_limiter.borrowed_tokens == 0)


async def test_gossip_that_nobody_understands_is_dropped_and_counted(nodes):
    async with (
        nodes.alone("gateway", "gateway") as gateway,
        nodes.joined(gateway, "a", "scheduler") as a,
        nodes.joined(gateway, "b", "worker") as b,
        b.subscribe(TOPIC_WORKER) as announcements,
    ):
        await until(lambda: len(a._gossip._pubsub.peer_topics.get(TOPIC_WORKER, ())) > 0)
        before = metrics.snapshot().get('hypha_messages_refused_total{reason="malformed"}', 0.0)
        await a._gossip._pubsub.publish(TOPIC_WORKER, b"\xa1junk")
        while True:
            await a.publish(TOPIC_WORKER, advertisement(7))
            with trio.move_on_after(0.2):
                signer, message = await anext(announcements)
                break
        assert message.advertisement_id == "ad-7"
        assert signer.peer_id == a.peer_id
        assert metrics.snapshot()['hypha_messages_refused_total{reason="malformed"}'] > before


async def test_what_is_announced_begins_with_external_addresses_and_leaves_out_excluded_networks(nodes):
    external = ("/ip4/192.0.2.1/tcp/4001", "/dns4/node.example/tcp/4001")
    async with nodes.alone("a", "worker", external_addresses=external, exclude_cidr=("127.0.0.0/8",)) as a:
        announced = addresses.verify(a.peer_id, a.signed_addresses())
        assert [str(each) for each in announced] == list(external)
        assert [str(each).partition("/p2p/")[0] for each in a._host.get_addrs()] == list(external)


async def test_an_error_of_the_body_comes_out_as_it_was_raised(nodes):
    with pytest.raises(JobFailed, match="no worker"):
        async with nodes.alone("a", "worker"):
            raise JobFailed("no worker")


async def test_gossip_that_cannot_even_be_judged_harms_nobody(nodes):
    async with (
        nodes.alone("gateway", "gateway") as gateway,
        nodes.joined(gateway, "a", "scheduler") as a,
        nodes.joined(gateway, "b", "worker") as b,
        b.subscribe(TOPIC_WORKER) as announcements,
    ):
        await until(lambda: len(a._gossip._pubsub.peer_topics.get(TOPIC_WORKER, ())) > 0)
        before = metrics.snapshot().get('hypha_messages_refused_total{reason="malformed"}', 0.0)
        junk = rpc_pb2.Message(
            data=b"x", topicIDs=[TOPIC_WORKER], from_id=b"\xff", seqno=b"1", signature=b"s", key=b"\xff"
        )
        (stream,) = a._gossip._pubsub.peers.values()
        await a._gossip._pubsub.write_msg(stream, rpc_pb2.RPC(publish=[junk]))
        await stream.write(b"\x04\xff\xff\xff\xff")
        await until(lambda: metrics.snapshot()['hypha_messages_refused_total{reason="malformed"}'] > before)
        async with nodes.joined(gateway, "c", "scheduler") as c:
            while True:
                await c.publish(TOPIC_WORKER, advertisement(8))
                with trio.move_on_after(0.2):
                    signer, _ = await anext(announcements)
                    break
            assert signer.peer_id == c.peer_id


async def test_whoever_is_no_gateway_by_its_certificate_is_none(nodes, caplog):
    async with nodes.alone("impostor", "worker") as impostor, nodes.joined(impostor, "a", "worker") as a:
        assert a._gateways.connected() == []
        (said,) = [r.hypha_fields["reasons"] for r in caplog.records if "No gateway reachable" in r.message]
        assert f"{impostor.peer_id} is not a gateway" in said
