"""The gateway: the one kind of node whose address others are told; they find everything else through it.

    others ── dial ──▶ gateway: DHT server, gossip, relay for those who cannot dial each other, Health

All of that is the network's own work in this role. Nothing depends on a gateway once peers know each other.
"""

import trio

from hypha.config import NodeConfig
from hypha.network.health import serve_health
from hypha.network.host import open_network
from hypha.network.seam import Network
from hypha.pki import load_identity
from hypha.runtime import RealRuntime, Runtime
from hypha.telemetry import get_logger

log = get_logger("gateway")


class Config(NodeConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A gateway's configuration: a node's. `gateway_addresses` names the other gateways, if any."""


async def serve(
    network: Network, runtime: Runtime, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer Health until cancelled; the network does the rest."""
    serve_health(network, runtime, "gateway", lambda: {"connected peers": str(len(network.connected_peers()))})
    log.info("Gateway ready", peer_id=network.peer_id)
    task_status.started()
    await trio.sleep_forever()


async def run(config: Config, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Run a gateway of this configuration until cancelled. Raises ConfigError."""
    runtime = RealRuntime()
    async with open_network(load_identity(config), config, role="gateway", runtime=runtime) as network:
        await serve(network, runtime, task_status=task_status)
