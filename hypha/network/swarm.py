"""The swarm of a node: TCP, our security transports, our multiplexer, and nothing else that upstream would add.

    raw TCP ─┬─ /hypha/mtls/1.0.0  ─▶ /hypha/yamux/1.0.0 ─▶ a peer's connection
             ├─ /hypha/probe/1.0.0 ─▶ one answer
             └─ /hypha/bulk/1.0.0  ─▶ one large transfer      (neither becomes a connection of the swarm's)

Built by hand: `libp2p.new_host` accepts plaintext unless told otherwise and brings a resource manager with limits of
its own. Here connections are bounded by the swarm, streams by the multiplexer, requests by the dispatcher.
"""

import resource

from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader

from hypha.network import bulk, mtls, probe, yamux
from hypha.network.dispatch import Dispatcher
from hypha.network.listening import Census
from hypha.network.patches import Swarm
from hypha.pki import Identity

# Each connection is an open file; of those that the system allows (`ulimit -n`, often 1024) a node needs some besides.
FILES_BESIDES = 124
# A scheduler or gateway of the largest networks; beyond it something dials without end.
CONNECTIONS_MAX = 8192
# Both sides may dial at once, and a relayed connection may stay beside a direct one.
CONNECTIONS_PER_PEER_MAX = 4


def connections_max(files_max: int) -> int:
    """Return how many connections a node may have that may open so many files (-1: any number)."""
    return (
        CONNECTIONS_MAX
        if files_max < 0
        else max(CONNECTIONS_PER_PEER_MAX, min(CONNECTIONS_MAX, files_max - FILES_BESIDES))
    )


def build_swarm(
    identity: Identity, tls: mtls.MutualTls, dispatcher: Dispatcher, bulk_transport: bulk.BulkTransport
) -> Swarm:
    """Return a swarm that does not run yet and whose `dial` is still to be set."""
    key = Ed25519PrivateKey.from_bytes(identity.private_key)
    peer_id, peerstore = ID.from_string(identity.peer_id), PeerStore()
    peerstore.add_key_pair(peer_id, KeyPair(key, key.get_public_key()))
    upgrader = TransportUpgrader(
        secure_transports_by_protocol={
            mtls.PROTOCOL_ID: tls,
            probe.PROTOCOL_ID: probe.ProbeTransport(tls, dispatcher),
            bulk.PROTOCOL_ID: bulk_transport,
        },
        muxer_transports_by_protocol={TProtocol(yamux.PROTOCOL_ID): yamux.Yamux},
    )
    most = connections_max(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    limits = ConnectionConfig(
        max_connections=most,
        high_watermark=most,
        min_connections=0,
        low_watermark=0,
        max_connections_per_peer=CONNECTIONS_PER_PEER_MAX,
    )
    swarm = Swarm(
        peer_id, peerstore, upgrader, [TCP()], retry_config=RetryConfig(max_retries=0), connection_config=limits
    )
    swarm.register_notifee(Census())
    return swarm
