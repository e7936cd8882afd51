"""Every start-up patch of py-libp2p 0.8.1, one small function each, with the defect it is for.

    apply() ─▶ gossip_queue · provider_records · kad_patience · peer_records · exclusive_ports · quiet
    Swarm   ─▶ inbound slots that come back · dials through our Dialer

`tests/network/test_patches.py` has one test per patch that fails once upstream has mended the defect. Not patched but
avoided: the default security set (plaintext!), the stock multiplexer (see yamux.py), `host.connect` for relays,
request_response (no reasons in errors), PingService, QUIC.
"""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

import trio
from google.protobuf.message import Error as ProtobufError
from libp2p.abc import IHost, INetConn, INetStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.kad_dht import peer_routing, provider_store
from libp2p.metrics.swarm import SwarmEvent
from libp2p.network import swarm as upstream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.pubsub import gossipsub, pubsub, rpc_queue
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.utils import maybe_consume_signed_record
from libp2p.transport.tcp import tcp
from multiaddr import Multiaddr

from hypha.errors import PeerUnreachable
from hypha.network.yamux import Yamux

# What py-libp2p raises when a peer misbehaves or goes away: its own errors, and whatever its parsers stumble over.
FOREIGN = (
    BaseLibp2pError,
    OSError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    ExceptionGroup,
    ProtobufError,
)

# A burst of advertisements from one scheduler to one neighbour, RPCs.
GOSSIP_QUEUE_MAX = 1024
# A provider that is gone for half an hour is gone; living ones announce themselves every few minutes.
PROVIDER_RECORD_S = 1800
# A lookup asks ten peers at once; a dead one among them must not hold it up for upstream's 10 s.
KAD_QUERY_S = 3
# A node's addresses change when it learns of a new interface: nobody needs to hear that within the minute.
RECORD_S = 60.0
RECORDS_BELIEVED_MAX = 4096
# py-libp2p's loggers that report everyday events of a network (peers come and go) as warnings and errors.
EVERYDAY_LOGGERS = (
    "libp2p.host.basic_host",
    "libp2p.identity",
    "libp2p.kad_dht",
    "libp2p.network",
    "libp2p.pubsub",
    "libp2p.relay",
    "libp2p.transport",
)


def gossip_queue() -> None:
    """A peer's outbound gossip queue holds 32 RPCs and drops silently beyond: a burst of 100 arrives as 22."""
    rpc_queue.RpcQueue.__init__.__defaults__ = (GOSSIP_QUEUE_MAX, rpc_queue.DefaultMaxMessageSize)


def provider_records() -> None:
    """Provider records live 48 h and are republished after 22 h: the dead are offered for two days."""
    provider_store.PROVIDER_RECORD_EXPIRATION_INTERVAL = PROVIDER_RECORD_S


def kad_patience() -> None:
    """One silent peer holds every lookup that meets it for 10 s."""
    for module in (peer_routing, provider_store):
        module.QUERY_TIMEOUT = KAD_QUERY_S  # type: ignore[attr-defined]  # imported there from `common`


def peer_records() -> None:
    """Every gossip RPC carries the sender's signed addresses, gathered anew from its sockets and verified every time.

    That is a third of gossip's cost. Here a record is made anew after `RECORD_S`, and one seen before is believed.
    """
    made: WeakKeyDictionary[IHost, tuple[float, bytes]] = WeakKeyDictionary()
    believed: OrderedDict[tuple[ID, bytes], float] = OrderedDict()
    make, consume = env_to_send_in_RPC, maybe_consume_signed_record

    def record_of(host: IHost) -> tuple[bytes, bool]:
        until, record = made.get(host, (0.0, b""))
        if trio.current_time() < until:
            return record, False
        record, is_new = make(host)
        made[host] = (trio.current_time() + RECORD_S, record)
        return record, is_new

    def believe(message: rpc_pb2.RPC, host: IHost, peer_id: ID) -> bool:
        key, now = (peer_id, message.senderRecord), trio.current_time()
        if now < believed.get(key, 0.0):
            return True
        if not consume(message, host, peer_id):
            return False
        believed[key] = now + RECORD_S
        while len(believed) > RECORDS_BELIEVED_MAX:
            believed.popitem(last=False)
        return True

    for module in (pubsub, gossipsub):
        module.env_to_send_in_RPC = record_of  # type: ignore[attr-defined]  # imported there by name
        module.maybe_consume_signed_record = believe  # type: ignore[attr-defined]


def exclusive_ports() -> None:
    """Listeners set SO_REUSEPORT: a second node on a taken port starts, and gets every other connection.

    Nor do they keep IPv6 to itself, so that one port cannot be listened on by both /ip4 and /ip6 wildcards.
    """

    def set_flags(sock: trio.socket.SocketType) -> None:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        if sock.family == trio.socket.AF_INET6:
            sock.setsockopt(trio.socket.IPPROTO_IPV6, trio.socket.IPV6_V6ONLY, 1)

    tcp._set_reuse_flags = set_flags


def quiet() -> None:
    """Refused and failed dials are logged as errors over several lines, tracebacks included.

    What matters of it is logged here in one line; a level that HYPHA_LOG names for `libp2p…` stays.
    """
    named = logging.getLogger("libp2p").level in (logging.DEBUG, logging.INFO)
    for name in EVERYDAY_LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET and not named:
            logger.setLevel(logging.CRITICAL)


def apply() -> None:
    """Apply all of them; repeating it changes nothing."""
    for patch in (gossip_queue, provider_records, kad_patience, peer_records, exclusive_ports, quiet):
        patch()


class _NoAutoConnector(AutoConnector):
    """Dials nobody."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Nothing to run."""


class Swarm(upstream.Swarm):
    """The swarm without its dial logic and without its leak.

    *Strangers*: upstream dials everybody in the peerstore until half the connections allowed are open, even where the
    configured minimum is 0.

    *Dials*: upstream tries one address per transport, waits 250 ms before each, and refuses a peer that could not be
    reached for 60 s. Here every dial, also the DHT's and gossip's, goes through `dial`.
    *Inbound slots*: upstream gives a slot back only when the swarm stops, so that after 250 connections in its life
    a node refuses everybody. Here the slot comes back with the connection's end.
    """

    dial: Callable[[ID], Awaitable[INetConn]]

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Connect by our own means. Raises SwarmException, as py-libp2p expects."""
        try:
            return [await self.dial(peer_id)]
        except PeerUnreachable as error:
            raise SwarmException(str(error)) from error

    async def _do_handle_inbound_connection(
        self, read_write_closer: ReadWriteCloser, maddr: Multiaddr, failure_event: SwarmEvent
    ) -> None:
        raw = RawConnection(read_write_closer, initiator=False)
        try:
            connection = await self.upgrade_inbound_raw_conn(raw, maddr)
            assert isinstance(connection, Yamux), "no other multiplexer is offered"
            await connection.event_closed.wait()
        except FOREIGN:
            await raw.close()

    def _init_connection_management(self) -> None:
        super()._init_connection_management()
        self.auto_connector = _NoAutoConnector(swarm=self)

    def _schedule_auto_connect(self) -> None:
        """Nothing to schedule."""

    async def notify_opened_stream(self, stream: INetStream) -> None:
        """Nobody listens; upstream starts a task for each listener of every stream."""

    async def notify_closed_stream(self, stream: INetStream) -> None:
        """Likewise."""
