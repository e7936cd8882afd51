"""py-libp2p over mutual TLS keeps the contract of the seam: real sockets, nodes that know only a gateway."""

import pytest

from tests.network.contract import NetworkContract
from tests.network.libp2p_nodes import Nodes

pytestmark = pytest.mark.slow


@pytest.fixture
async def make_network(pki):
    nodes = Nodes(pki)
    async with nodes.alone("gateway", "gateway") as gateway:
        yield lambda name, *roles: nodes.joined(gateway, name, *roles)


class TestLibp2p(NetworkContract):
    """Everything in `contract`."""
