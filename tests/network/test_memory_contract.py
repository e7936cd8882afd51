"""The in-memory network keeps the contract of the seam; on the real clock, as its fault tests run in virtual time."""

import pytest

from hypha.network.memory import MemoryFabric
from tests.network.contract import NetworkContract


@pytest.fixture
def make_network():
    fabric = MemoryFabric("contract")
    return lambda name, *roles: fabric.node(name, frozenset(roles))


class TestMemory(NetworkContract):
    """Everything in `contract`."""
