"""Each defect of py-libp2p that is patched or avoided is still there; when one of these fails, drop the patch.

The process that runs the tests may be patched already, so defaults are read in a fresh interpreter, and code is
recognised by the lines that are wrong.
"""

import inspect
import json
import logging
import subprocess
import sys

import pytest
import trio
from libp2p.host.basic_host import BasicHost
from libp2p.kad_dht import peer_routing, provider_store
from libp2p.network import swarm
from libp2p.network.auto_connector import AutoConnector
from libp2p.peer import peerstore
from libp2p.pubsub import pubsub, rpc_queue, utils
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.stream_muxer.yamux import yamux
from libp2p.transport.tcp import tcp

from hypha.network import patches

READ_DEFAULTS = """
import json
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.kad_dht import peer_routing, provider_store
print(json.dumps({
    "queue": RpcQueue.__init__.__defaults__[0],
    "record_s": provider_store.PROVIDER_RECORD_EXPIRATION_INTERVAL,
    "query_s": [peer_routing.QUERY_TIMEOUT, provider_store.QUERY_TIMEOUT],
}))
"""


@pytest.fixture(scope="module")
def upstream():
    """What py-libp2p says of itself, unpatched."""
    ran = subprocess.run([sys.executable, "-c", READ_DEFAULTS], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.fixture(autouse=True)
def _patched():
    patches.apply()


@pytest.mark.slow
def test_gossip_queues_are_too_short_for_a_burst(upstream):
    assert upstream["queue"] == 32
    assert len(rpc_queue.RpcQueue()) == 0
    assert rpc_queue.RpcQueue()._queue.max_size == patches.GOSSIP_QUEUE_MAX


@pytest.mark.slow
def test_provider_records_outlive_their_providers_by_two_days(upstream):
    assert upstream["record_s"] == 48 * 3600
    assert provider_store.PROVIDER_RECORD_EXPIRATION_INTERVAL == patches.PROVIDER_RECORD_S


@pytest.mark.slow
def test_one_silent_peer_holds_a_lookup_for_ten_seconds(upstream):
    assert upstream["query_s"] == [10, 10]
    assert (peer_routing.QUERY_TIMEOUT, provider_store.QUERY_TIMEOUT) == (patches.KAD_QUERY_S,) * 2


def test_every_gossip_message_carries_the_senders_addresses_made_and_verified_anew():
    assert "host.get_addrs()" in inspect.getsource(peerstore.env_to_send_in_RPC)
    assert "consume_envelope(" in inspect.getsource(utils.maybe_consume_signed_record)
    assert pubsub.env_to_send_in_RPC is not peerstore.env_to_send_in_RPC
    assert pubsub.maybe_consume_signed_record is not utils.maybe_consume_signed_record


async def test_two_listeners_share_a_port_without_a_word():
    assert "SO_REUSEPORT" in inspect.getsource(tcp._open_reuseport_listeners)
    (first,) = await tcp._open_reuseport_listeners("127.0.0.1", 0)
    try:
        port = first.socket.getsockname()[1]
        with pytest.raises(tcp.OpenConnectionError):
            await tcp._open_reuseport_listeners("127.0.0.1", port)
    finally:
        await first.aclose()
    assert first.socket.fileno() == -1


def test_everyday_events_are_logged_as_errors_over_several_lines():
    assert '"Failed to open stream to peer {peer_id}:\\n"' in inspect.getsource(BasicHost.new_stream)
    assert "[ADDCONN_FAIL]" in inspect.getsource(swarm.Swarm.add_conn)
    assert not logging.getLogger("libp2p.network.swarm").isEnabledFor(logging.ERROR)


def test_inbound_places_come_back_only_when_the_swarm_stops():
    assert "await self.manager.wait_finished()" in inspect.getsource(swarm.Swarm._do_handle_inbound_connection)
    assert "event_closed" in inspect.getsource(patches.Swarm._do_handle_inbound_connection)


def test_dials_wait_try_one_address_and_are_refused_for_a_minute():
    assert swarm._HAPPY_EYEBALLS_DELAY == 0.25
    assert swarm._NegativePeerCache()._ttl == 60
    assert patches.Swarm.dial_peer is not swarm.Swarm.dial_peer


def test_strangers_are_dialled_although_no_connection_is_wanted():
    assert "(low_watermark + high_watermark) / 2" in inspect.getsource(AutoConnector)
    assert patches.Swarm._schedule_auto_connect is not swarm.Swarm._schedule_auto_connect


def test_gossip_counts_from_the_second_of_its_start():
    assert "self.counter = int(time.time())" in inspect.getsource(pubsub.Pubsub.__init__)


def test_a_relay_gives_up_on_slow_readers():
    assert "trio.fail_after(self.write_timeout)" in inspect.getsource(CircuitV2Protocol._relay_data)


def test_the_stock_multiplexer_resets_slow_readers_and_notices_no_frozen_peer():
    assert "after 5 seconds" in inspect.getsource(yamux.YamuxStream.write)
    loop = inspect.getsource(yamux.Yamux._measure_rtt_loop)
    assert "_ping_event.wait()" in loop
    assert "_cleanup_on_error" not in loop


async def test_a_foreign_group_of_errors_is_recognised():
    with pytest.raises(patches.FOREIGN):
        async with trio.open_nursery():
            raise ValueError("from a parser")
