"""Real libp2p nodes on loopback for tests: certificates, a gateway, and nodes that know nothing else."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from msgspec import Struct

from hypha.network.host import Libp2pNetwork, open_network
from hypha.pki import Identity
from hypha.protocol.messages import JobStatus
from hypha.runtime import RealRuntime
from tests.network.cast import ack

PATIENCE_S = 20.0


class Keys(Struct, frozen=True):
    """The network keys of a configuration."""

    gateway_addresses: tuple[str, ...] = ()
    listen_addresses: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    external_addresses: tuple[str, ...] = ()
    exclude_cidr: tuple[str, ...] = ()
    relay_circuit: bool = True


class Nodes:
    """Starts nodes; the same name is the same certificate, and so the same peer id."""

    def __init__(self, pki) -> None:
        self._pki = pki
        self._identities: dict[str, Identity] = {}

    def identity(self, name: str, *roles: str) -> Identity:
        if name not in self._identities:
            self._identities[name] = self._pki.node(name, roles).identity()
        return self._identities[name]

    @asynccontextmanager
    async def alone(self, name: str, *roles: str, **keys: object) -> AsyncIterator[Libp2pNetwork]:
        """A node that knows no gateway unless `keys` name one."""
        async with running(self.identity(name, *roles), roles[0], **keys) as network:
            yield network

    @asynccontextmanager
    async def joined(
        self, gateway: Libp2pNetwork, name: str, *roles: str, **keys: object
    ) -> AsyncIterator[Libp2pNetwork]:
        """A node that knows this gateway."""
        known = (gateway.listen_addresses()[0],)
        async with self.alone(name, *roles, gateway_addresses=known, **keys) as network:
            yield network


@asynccontextmanager
async def running(identity: Identity, role: str = "worker", **keys: object) -> AsyncIterator[Libp2pNetwork]:
    """A node with this identity that answers JobStatus, for not longer than PATIENCE_S."""
    with trio.fail_after(PATIENCE_S):
        async with open_network(identity, Keys(**keys), role=role, runtime=RealRuntime()) as network:
            yield network


def introduce(asker: Libp2pNetwork, *others: Libp2pNetwork) -> None:
    """Tell a node where others are, as a message from them would."""
    for other in others:
        asker.learn(other.peer_id, other.signed_addresses())


def answering(network: Libp2pNetwork) -> Libp2pNetwork:
    """The same, answering JobStatus."""
    network.serve(JobStatus, ack)
    return network


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that the network brings about."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the network has no event for everything a test waits for
            await trio.sleep(0.02)
