"""A gateway, a data node and a fetcher on real sockets: the roles' own `run`, knowing only the gateway's address."""

import socket

import pytest
import trio

from hypha import data_node as data
from hypha import gateway
from hypha.config import NodeConfig
from hypha.dataset_tool import prepare
from hypha.network.fetch import Providers, fetch_manifest, fetch_slice
from hypha.network.host import open_network
from hypha.protocol.messages import Health
from hypha.runtime import RealRuntime

pytestmark = pytest.mark.slow
FOUND_WITHIN_S = 30


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def keys(files):
    return {name: getattr(files, name) for name in ("cert_pem", "key_pem", "trust_pem", "crls_pem")}


async def test_a_fetcher_that_knows_only_a_gateway_gets_a_dataset(pki, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {n} of a book\n" for n in range(200_000)))
    prepare([tmp_path / "book.txt"], tmp_path / "set", name="book", slice_bytes=2_000_000)
    port = free_port()
    here = {"listen_addresses": ("/ip4/127.0.0.1/tcp/0",), "gateway_addresses": (f"/ip4/127.0.0.1/tcp/{port}",)}
    at = {"listen_addresses": (f"/ip4/127.0.0.1/tcp/{port}",)}
    gateway_config = gateway.Config(**keys(pki.node("gateway", ["gateway"])), **at, relay_circuit=False)
    data_config = data.Config(**keys(pki.node("data", ["data"])), **here, dataset_path=(tmp_path / "set",))
    worker = pki.node("worker", ["worker"])
    with trio.fail_after(FOUND_WITHIN_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.run, gateway_config)
            await nursery.start(data.run, data_config)
            runtime = RealRuntime()
            config = NodeConfig(**keys(worker), **here)
            async with open_network(worker.identity(), config, role="worker", runtime=runtime) as network:
                providers = Providers(network, runtime, "book")
                manifest, digest = await fetch_manifest(network, runtime, providers)
                for ref in (*manifest.train, *manifest.held_out):
                    path = tmp_path / "fetched" / ref.name
                    path.parent.mkdir(exist_ok=True)
                    await fetch_slice(network, runtime, providers, ref, path, manifest_digest=digest)
                    assert path.read_bytes() == (tmp_path / "set" / ref.name).read_bytes()
                [provider] = await providers.ranked(digest)
                report = await network.request(provider, Health())
                assert (report.role, list(report.detail)) == ("data", ["dataset book"])
            nursery.cancel_scope.cancel()
