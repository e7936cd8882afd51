"""Real libp2p nodes on loopback for tests: certificates, a gateway, and nodes that know nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct

from hypha.network.host import Libp2pNetwork, open_network
from hypha.pki import Identity
from hypha.runtime import RealRuntime


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
        role = roles[0] if roles else "worker"
        identity = self.identity(name, *roles)
        async with open_network(identity, Keys(**keys), role=role, runtime=RealRuntime()) as network:
            yield network

    @asynccontextmanager
    async def joined(
        self, gateway: Libp2pNetwork, name: str, *roles: str, **keys: object
    ) -> AsyncIterator[Libp2pNetwork]:
        """A node that knows this gateway."""
        known = (gateway.listen_addresses()[0],)
        async with self.alone(name, *roles, gateway_addresses=known, **keys) as network:
            yield network
