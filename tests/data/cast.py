"""A data node on the in-memory network, and whoever fetches from it."""

from contextlib import asynccontextmanager

import trio

from hypha.data_node import DataNode, open_datasets
from hypha.network.fetch import Providers, fetch_slice
from hypha.protocol.messages import FetchSlice, FileHeader
from tests.sim.virtual import VirtualRuntime

SEED = 3


@asynccontextmanager
async def data_node(fabric, name, directory, *, streams_max=16):
    async with fabric.node(name, {"data"}) as network, trio.open_nursery() as nursery:
        node = DataNode(network, VirtualRuntime(SEED, name), open_datasets([directory]), streams_max=streams_max)
        await nursery.start(node.run)
        yield network
        nursery.cancel_scope.cancel()


def runtime(name="worker"):
    return VirtualRuntime(SEED, name)


async def fetch(network, dataset, path, *, providers=None, index=0, **options):
    machine = runtime()
    providers = Providers(network, machine, "book") if providers is None else providers
    ref = dataset.manifest.train[index]
    await fetch_slice(network, machine, providers, ref, path, manifest_digest=dataset.digest, **options)
    return ref


async def ask(network, peer, **header):
    stream = await network.open_stream(peer, FetchSlice(**{"dataset": "book", "manifest_digest": None, **header}))
    try:
        return await stream.receive_message(FileHeader)
    finally:
        await stream.aclose()
