"""Large transfers keep one contract on every way: in memory, on their own connection, on a muxed stream, by relay."""

from contextlib import asynccontextmanager

import pytest

from hypha.network import bulk
from hypha.network.memory import MemoryFabric
from tests.network import libp2p_nodes
from tests.network.contract_transfers import TransferContract
from tests.network.libp2p_nodes import Nodes, until


class TestMemory(TransferContract):
    """In memory there is one way only."""

    @pytest.fixture
    def make_network(self):
        fabric = MemoryFabric("contract")
        return lambda name, *roles: fabric.node(name, frozenset(roles))


class OnSockets(TransferContract):
    @pytest.fixture
    async def make_network(self, pki, ways):
        nodes = Nodes(pki)
        async with nodes.alone("gateway", "gateway") as gateway:
            yield lambda name, *roles: nodes.joined(gateway, name, *roles)


@pytest.mark.slow
class TestOwnConnection(OnSockets):
    """Where the peers can dial each other."""

    @pytest.fixture
    def ways(self, monkeypatch):
        taken = []
        dial = bulk.BulkTransport.dial

        async def counted(*arguments):
            taken.append(await dial(*arguments))
            return taken[-1]

        monkeypatch.setattr(bulk.BulkTransport, "dial", counted)
        return taken


@pytest.mark.slow
class TestOwnConnectionOneThread(TestOwnConnection):
    """Where no core is free to write beside receiving."""

    @pytest.fixture(autouse=True)
    def busy(self, monkeypatch):
        monkeypatch.setattr(bulk.BulkTransport, "core_to_spare", False)


@pytest.mark.slow
class TestMuxedStream(OnSockets):
    """Where no place is free for a connection of its own."""

    @pytest.fixture
    def ways(self, monkeypatch):
        monkeypatch.setattr(bulk, "TRANSFERS_MAX", 0)


@pytest.mark.slow
class TestRelayed(TransferContract):
    """Where only a gateway leads from one to the other."""

    @pytest.fixture
    async def make_network(self, pki, monkeypatch):
        # Every byte passes three nodes, which share one process here.
        monkeypatch.setattr(libp2p_nodes, "PATIENCE_S", 60.0)
        nodes = Nodes(pki)

        @asynccontextmanager
        async def hidden(name, *roles):
            async with nodes.joined(gateway, name, *roles, exclude_cidr=("127.0.0.0/8",)) as network:
                await until(network._relay.circuits)
                yield network

        async with nodes.alone("gateway", "gateway") as gateway:
            yield hidden
