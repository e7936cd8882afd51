"""The gateway answers for its health and its documented configuration loads."""

from pathlib import Path

import trio

from hypha.config import load_config
from hypha.gateway import Config, serve
from hypha.network.memory import MemoryFabric
from hypha.protocol.messages import Health
from tests.sim.virtual import VirtualRuntime

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_documented_configuration_loads_with_its_paths_beside_the_file():
    config = load_config(Config, CONFIGS / "gateway.toml", {})
    assert config.listen_addresses == ("/ip4/0.0.0.0/tcp/4001",)
    assert config.cert_pem == CONFIGS / "certs/gateway.pem"


async def test_a_gateway_reports_its_role_uptime_and_how_many_it_is_connected_to(autojump_clock):
    fabric = MemoryFabric(1)
    async with fabric.node("gateway", {"gateway"}) as gateway, fabric.node("other") as other, trio.open_nursery() as n:
        await n.start(serve, gateway, VirtualRuntime(1, "gateway"))
        await trio.sleep(5)
        report = await other.request("gateway", Health())
        assert (report.role, report.peer_id) == ("gateway", "gateway")
        assert 5 <= report.uptime_s < 6
        assert report.detail == {"connected peers": "1"}
        n.cancel_scope.cancel()
