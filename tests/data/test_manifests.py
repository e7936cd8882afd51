"""Manifests are fetched by name or digest, and one that is not what it says is not taken."""

import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypha.data_node import DataNode
from hypha.dataset import MANIFEST_NAME, digest_of_manifest, open_dataset, render_manifest
from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.network.fetch import Providers, fetch_manifest, provider_key
from hypha.protocol.messages import FetchSlice, FileHeader
from tests.data.cast import ask, fetch, runtime


@asynccontextmanager
async def liar(fabric, header, data, dataset="book"):
    """Announce a dataset and answer every request for it with this."""
    async with fabric.node("liar", {"data"}) as network:

        async def serve(stream, _wanted):
            if header is None:
                await trio.sleep_forever()
            await stream.send_message(header)
            await stream.send_all(data)
            await stream.send_eof()

        network.accept_streams(FetchSlice, serve)
        for key in (provider_key(dataset), provider_key(dataset, digest_of_manifest(data))):
            await network.provide(key)
        yield network


async def fetched_manifest(scheduler, name="book", **options):
    machine = runtime("sched")
    return await fetch_manifest(scheduler, machine, Providers(scheduler, machine, name), passes_max=1, **options)


async def test_a_manifest_of_another_dataset_is_not_taken(autojump_clock, fabric, directory):
    data = (directory / MANIFEST_NAME).read_bytes()
    header = FileHeader(bytes=len(data), digest=digest_of_manifest(data))
    async with liar(fabric, header, data, "film"), fabric.node("sched", {"scheduler"}) as scheduler:
        with pytest.raises(RemoteProtocolError, match="is that of dataset 'book'"):
            await fetched_manifest(scheduler, "film")


async def test_a_manifest_that_changed_on_the_way_is_not_taken(autojump_clock, fabric, directory):
    data = (directory / MANIFEST_NAME).read_bytes()
    header = FileHeader(bytes=len(data), digest="00" * 32)
    async with liar(fabric, header, data), fabric.node("sched", {"scheduler"}) as scheduler:
        with pytest.raises(RemoteProtocolError, match=f"digest {digest_of_manifest(data)}, not {'00' * 32}"):
            await fetched_manifest(scheduler)


async def test_a_manifest_too_large_to_read_is_refused_before_it_comes(autojump_clock, fabric, directory):
    async with (
        liar(fabric, FileHeader(bytes=2**40, digest="00" * 32), b"x"),
        fabric.node("sched", {"scheduler"}) as scheduler,
    ):
        with pytest.raises(RemoteProtocolError, match="exceeds"):
            await fetched_manifest(scheduler)


async def test_a_manifest_cut_short_is_an_unreachable_provider(autojump_clock, fabric, directory):
    data = (directory / MANIFEST_NAME).read_bytes()
    header = FileHeader(bytes=len(data) + 1, digest=digest_of_manifest(data))
    async with liar(fabric, header, data), fabric.node("sched", {"scheduler"}) as scheduler:
        with pytest.raises(PeerUnreachable, match="1 bytes before the end"):
            await fetched_manifest(scheduler)


async def test_a_provider_that_never_answers_is_given_up(autojump_clock, fabric, directory):
    data = (directory / MANIFEST_NAME).read_bytes()
    async with liar(fabric, None, data), fabric.node("sched", {"scheduler"}) as scheduler:
        started = trio.current_time()
        with pytest.raises(PeerUnreachable, match="sent no header for 7 s"):
            await fetched_manifest(scheduler, stall_s=7)
        assert trio.current_time() - started < 8


async def test_a_provider_that_describes_another_file_is_refused_before_a_byte_is_kept(
    autojump_clock, fabric, directory, tmp_path
):
    dataset = open_dataset(directory)
    ref = dataset.manifest.train[0]
    header = FileHeader(bytes=ref.bytes, digest="00" * 32)
    async with liar(fabric, header, dataset.manifest_bytes), fabric.node("worker", {"worker"}) as worker:
        with pytest.raises(RemoteProtocolError, match=f"with {ref.digest} were asked for"):
            await fetch(worker, dataset, tmp_path / "slice", passes_max=1)
    assert list(tmp_path.glob("slice*")) == []


async def test_two_versions_of_one_dataset_are_told_apart_by_digest(autojump_clock, fabric, directory, tmp_path):
    import msgspec

    first = open_dataset(directory)
    newer = Path(shutil.copytree(directory, tmp_path / "newer"))
    changed = msgspec.structs.replace(first.manifest, tokenizer="other")
    (newer / MANIFEST_NAME).write_bytes(render_manifest(changed))
    second = open_dataset(newer)
    async with fabric.node("data", {"data"}) as network, trio.open_nursery() as nursery:
        node = DataNode(network, runtime("data"), [first, second], streams_max=4)
        await nursery.start(node.run)
        async with fabric.node("worker", {"worker"}) as worker:
            for dataset in (first, second):
                header = await ask(worker, "data", slice=MANIFEST_NAME, manifest_digest=dataset.digest)
                assert header.digest == dataset.digest
            assert (await ask(worker, "data", slice=MANIFEST_NAME)).digest == first.digest
        nursery.cancel_scope.cancel()
