"""Slices reach whoever may have them, whole and right, whatever happens to one provider."""

import shutil
from pathlib import Path

import pytest
import trio

from hypha.config import load_config
from hypha.data_node import Config, DataNode, Turns, open_datasets
from hypha.dataset import MANIFEST_NAME, open_dataset
from hypha.errors import ConfigError, PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.breaker import BreakerLimits, Breakers
from hypha.network.fetch import LOOKUP_FRESH_S, Providers, fetch_manifest, provider_key
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.network.transfer import partial_path
from hypha.protocol.messages import Health
from hypha.telemetry import metrics
from tests.data.cast import SEED, ask, data_node, fetch, runtime

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_the_documented_configuration_loads_with_its_paths_beside_the_file():
    config = load_config(Config, CONFIGS / "data.toml", {})
    assert config.dataset_path == (CONFIGS / "datasets/text",)
    assert config.streams_max == 16


def test_one_dataset_may_stand_for_a_list_and_none_is_refused(tmp_path):
    text = (CONFIGS / "data.toml").read_text()
    (tmp_path / "one.toml").write_text(text.replace('["datasets/text"]', '"here"'))
    assert load_config(Config, tmp_path / "one.toml", {}).dataset_path == (tmp_path / "here",)
    (tmp_path / "none.toml").write_text(text.replace('["datasets/text"]', "[]"))
    with pytest.raises(ConfigError, match="`dataset_path`: at least one"):
        load_config(Config, tmp_path / "none.toml", {})


def test_a_missing_or_damaged_dataset_is_refused_at_start_by_key_and_file(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset_path: .*nowhere"):
        open_datasets([directory, tmp_path / "nowhere"])
    (directory / "train-00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"dataset_path: .*train-00000.safetensors: 0 bytes"):
        open_datasets([directory])


async def test_a_slice_arrives_whole_and_is_counted(autojump_clock, fabric, directory, tmp_path):
    dataset = open_dataset(directory)
    before = metrics.snapshot().get('hypha_bytes_served_total{dataset="book"}', 0)
    async with data_node(fabric, "data", directory), fabric.node("worker", {"worker"}) as worker:
        ref = await fetch(worker, dataset, tmp_path / "slice")
        assert (tmp_path / "slice").read_bytes() == (directory / ref.name).read_bytes()
        assert not partial_path(tmp_path / "slice").exists()
    served = metrics.snapshot()['hypha_bytes_served_total{dataset="book"}'] - before
    assert served == ref.bytes
    assert metrics.snapshot()["hypha_streams_active"] == 0


async def test_a_manifest_is_found_by_name_and_pinned_by_its_digest(autojump_clock, fabric, directory):
    dataset = open_dataset(directory)
    async with data_node(fabric, "data", directory), fabric.node("sched", {"scheduler"}) as scheduler:
        machine = runtime("sched")
        providers = Providers(scheduler, machine, "book")
        assert await fetch_manifest(scheduler, machine, providers) == (dataset.manifest, dataset.digest)
        pinned = await fetch_manifest(scheduler, machine, providers, manifest_digest=dataset.digest)
        assert pinned == (dataset.manifest, dataset.digest)
        with pytest.raises(PeerUnreachable, match="dataset book: nobody provides it"):
            await fetch_manifest(scheduler, machine, providers, manifest_digest="00" * 32, passes_max=2)


async def test_a_transfer_goes_on_where_it_stopped(autojump_clock, fabric, directory, tmp_path):
    dataset = open_dataset(directory)
    whole = (directory / dataset.manifest.train[0].name).read_bytes()
    partial_path(tmp_path / "slice").write_bytes(whole[:150_000])
    before = metrics.snapshot().get('hypha_bytes_served_total{dataset="book"}', 0)
    async with data_node(fabric, "data", directory), fabric.node("worker", {"worker"}) as worker:
        await fetch(worker, dataset, tmp_path / "slice")
    assert (tmp_path / "slice").read_bytes() == whole
    assert metrics.snapshot()['hypha_bytes_served_total{dataset="book"}'] - before == len(whole) - 150_000


async def test_what_was_half_fetched_wrong_is_fetched_again_and_nobody_blamed(
    autojump_clock, fabric, directory, tmp_path, caplog
):
    dataset = open_dataset(directory)
    partial_path(tmp_path / "slice").write_bytes(b"x" * 1000)
    async with data_node(fabric, "data", directory), fabric.node("worker", {"worker"}) as worker:
        await fetch(worker, dataset, tmp_path / "slice")
    assert (tmp_path / "slice").stat().st_size == dataset.manifest.train[0].bytes
    assert not [record for record in caplog.records if "wrong bytes" in record.getMessage()]


async def test_a_corrupt_slice_is_never_delivered_its_digest_named_and_its_provider_comes_last(
    autojump_clock, fabric, directory, tmp_path, caplog
):
    dataset = open_dataset(directory)
    ref = dataset.manifest.train[0]
    sound = Path(shutil.copytree(directory, tmp_path / "sound"))
    data = bytearray((directory / ref.name).read_bytes())
    data[5000] ^= 1
    (directory / ref.name).write_bytes(data)
    async with data_node(fabric, "bad", directory), fabric.node("worker", {"worker"}) as worker:
        providers = Providers(worker, runtime(), "book")
        with pytest.raises(RemoteProtocolError, match=ref.digest):
            await fetch(worker, dataset, tmp_path / "slice", providers=providers, passes_max=1)
        assert not (tmp_path / "slice").exists()
        async with data_node(fabric, "good", sound):
            await trio.sleep(5)
            for _ in range(5):
                assert await providers.ranked(dataset.digest) == ["good", "bad"]
            await fetch(worker, dataset, tmp_path / "slice", providers=providers, passes_max=1)
    assert (tmp_path / "slice").read_bytes() == (sound / ref.name).read_bytes()
    assert any("wrong bytes" in record.getMessage() for record in caplog.records)


async def test_providers_are_looked_up_once_while_they_deliver(autojump_clock, fabric, directory):
    dataset = open_dataset(directory)
    async with data_node(fabric, "one", directory), fabric.node("worker", {"worker"}) as worker:
        providers = Providers(worker, runtime(), "book")
        assert await providers.ranked(dataset.digest) == ["one"]
        async with data_node(fabric, "two", directory):
            await trio.sleep(5)
            assert await providers.ranked(dataset.digest) == ["one"]
            assert sorted(await providers.ranked(dataset.digest, anew=True)) == ["one", "two"]
            async with data_node(fabric, "three", directory):
                await trio.sleep(5)
                providers.failed("one")
                assert await providers.ranked(dataset.digest) == ["two", "one"]
                await trio.sleep(LOOKUP_FRESH_S)
                assert sorted(await providers.ranked(dataset.digest)) == ["one", "three", "two"]
                providers.failed("two")
                assert (await providers.ranked(dataset.digest))[0] == "three"


@pytest.mark.parametrize("answer", ["nobody", "silence"])
async def test_a_lookup_that_finds_nobody_does_not_unmake_who_was_there(
    autojump_clock, fabric, directory, monkeypatch, answer
):
    async with data_node(fabric, "one", directory), fabric.node("worker", {"worker"}) as worker:
        dataset = open_dataset(directory)
        machine = runtime()
        providers = Providers(worker, machine, "book")
        assert await providers.ranked(dataset.digest) == ["one"]

        async def find(_key: str, *, wanted: int) -> list[str]:
            assert wanted
            await trio.sleep(0 if answer == "nobody" else 3600)
            return []

        monkeypatch.setattr(worker, "find_providers", find)
        assert await providers.ranked(dataset.digest, anew=True) == ["one"]
        await machine.sleep(LOOKUP_FRESH_S + 1)
        assert await providers.ranked(dataset.digest) == ["one"]


async def test_a_provider_that_stays_silent_is_not_tried_while_there_is_another(autojump_clock, fabric, directory):
    dataset = open_dataset(directory)
    async with (
        data_node(fabric, "one", directory),
        data_node(fabric, "two", directory),
        fabric.node("worker", {"worker"}) as worker,
    ):
        machine = runtime()
        providers = Providers(worker, machine, "book", Breakers(machine, BreakerLimits(failures=2, open_s=10.0)))
        assert sorted(await providers.ranked(dataset.digest)) == ["one", "two"]
        providers.failed("one", silent=True)
        assert await providers.ranked(dataset.digest) == ["two", "one"]
        providers.failed("one", silent=True)
        assert await providers.ranked(dataset.digest) == ["two"]
        providers.failed("two", silent=True)
        providers.failed("two", silent=True)
        assert sorted(await providers.ranked(dataset.digest)) == ["one", "two"]
        await trio.sleep(10.0)
        assert sorted(await providers.ranked(dataset.digest)) == ["one", "two"]
        providers.worked("two")
        providers.failed("one", silent=True)
        assert await providers.ranked(dataset.digest) == ["two"]


async def test_a_provider_that_dies_in_the_middle_is_replaced_and_the_rest_comes_from_another(
    autojump_clock, directory, tmp_path
):
    fabric = MemoryFabric(SEED, FaultProfile(bandwidth=100_000))
    dataset = open_dataset(directory)
    ref = dataset.manifest.train[0]
    sizes = []
    async with fabric.node("worker", {"worker"}) as worker, trio.open_nursery() as nursery:

        async def serve(name):
            async with data_node(fabric, name, directory):
                await trio.sleep_forever()

        async def kill_whoever_serves():
            await trio.sleep(ref.bytes / 100_000 / 2)
            fabric.crash(serving())

        def serving():
            return next(event.dst for event in reversed(events) if event.what == "stream FetchSlice")

        events = []
        fabric.on_event(events.append)
        for name in ("data-1", "data-2"):
            nursery.start_soon(serve, name)
        await trio.sleep(5)
        nursery.start_soon(kill_whoever_serves)
        await fetch(worker, dataset, tmp_path / "slice", stall_s=5)
        sizes = [event.dst for event in events if event.what == "stream FetchSlice" and event.src == "worker"]
        nursery.cancel_scope.cancel()
    assert (tmp_path / "slice").read_bytes() == (directory / ref.name).read_bytes()
    assert len(set(sizes)) == 2


async def test_a_provider_that_stands_still_is_left_for_another(autojump_clock, fabric, directory, tmp_path):
    dataset = open_dataset(directory)
    async with (
        data_node(fabric, "frozen", directory),
        data_node(fabric, "lively", directory),
        fabric.node("worker", {"worker"}) as worker,
    ):
        await trio.sleep(5)
        fabric.stop("frozen")
        for index in range(3):
            await fetch(worker, dataset, tmp_path / f"{index}", index=index, stall_s=4)
            assert (tmp_path / f"{index}").exists()
        fabric.go("frozen")


async def test_a_damaged_copy_is_refused_by_its_own_node_and_fetched_elsewhere(
    autojump_clock, fabric, directory, tmp_path
):
    dataset = open_dataset(directory)
    sound = Path(shutil.copytree(directory, tmp_path / "sound"))
    ref = dataset.manifest.train[0]
    async with (
        data_node(fabric, "cut", directory),
        data_node(fabric, "whole", sound),
        fabric.node("worker", {"worker"}) as worker,
    ):
        (directory / ref.name).write_bytes(b"short")
        with pytest.raises(Refused, match=f"damaged: {ref.name}: 5 bytes"):
            await ask(worker, "cut", slice=ref.name)
        await trio.sleep(5)
        await fetch(worker, dataset, tmp_path / "slice")
        assert (tmp_path / "slice").stat().st_size == ref.bytes


async def test_when_nobody_delivers_the_last_reason_is_told_after_bounded_attempts(
    autojump_clock, fabric, directory, tmp_path
):
    dataset = open_dataset(directory)
    async with fabric.node("worker", {"worker"}) as worker:
        started = trio.current_time()
        with pytest.raises(PeerUnreachable, match="dataset book: nobody provides it"):
            await fetch(worker, dataset, tmp_path / "slice")
        assert 10 < trio.current_time() - started < 120
        async with data_node(fabric, "data", directory):
            (directory / dataset.manifest.train[0].name).unlink()
            with pytest.raises(PeerUnreachable, match=r"in 2 passes; last: this copy is damaged"):
                await fetch(worker, dataset, tmp_path / "slice", passes_max=2)


@pytest.mark.parametrize(
    "name", ["../book.txt", "/etc/passwd", "train-00000.safetensors/../dataset.toml", "bucket-00000", "dataset.toml\n"]
)
async def test_only_names_of_the_manifest_are_served(autojump_clock, fabric, directory, name):
    async with data_node(fabric, "data", directory), fabric.node("worker", {"worker"}) as worker:
        assert (await ask(worker, "data", slice=MANIFEST_NAME)).digest == open_dataset(directory).digest
        with pytest.raises(Refused, match="has no slice"):
            await ask(worker, "data", slice=name)


async def test_who_may_not_fetch_and_what_is_not_served_is_refused(autojump_clock, fabric, directory):
    async with (
        data_node(fabric, "data", directory),
        fabric.node("worker", {"worker"}) as worker,
        fabric.node("gateway", {"gateway"}) as gateway,
    ):
        with pytest.raises(Refused, match="for the role scheduler or worker"):
            await ask(gateway, "data", slice=MANIFEST_NAME)
        with pytest.raises(Refused, match="dataset film is not served here"):
            await ask(worker, "data", slice=MANIFEST_NAME, dataset="film")
        with pytest.raises(Refused, match="is not served here"):
            await ask(worker, "data", slice=MANIFEST_NAME, manifest_digest="00" * 32)
        with pytest.raises(RemoteProtocolError, match="lies beyond"):
            await ask(worker, "data", slice="train-00000.safetensors", offset=2**40)
        report = await gateway.request("data", Health())
        assert report.role == "data"
        assert list(report.detail) == ["dataset book"]


async def test_turns_are_bounded_and_go_to_the_peer_that_has_the_fewest(autojump_clock):
    turns = Turns(2)
    order, running, most = [], 0, 0

    async def take(peer):
        nonlocal running, most
        async with turns.turn(peer):
            running += 1
            most = max(most, running)
            order.append(peer)
            await trio.sleep(1)
            running -= 1

    async with trio.open_nursery() as nursery:
        for peer in ("greedy",) * 6:
            nursery.start_soon(take, peer)
        await trio.sleep(0.1)
        nursery.start_soon(take, "modest")
    assert most == 2
    assert len(order) == 7
    assert order.index("modest") <= 3


async def test_whoever_waits_too_long_for_a_turn_is_told_and_frees_the_queue(autojump_clock):
    turns = Turns(1)
    async with turns.turn("holder"):
        with pytest.raises(Refused, match="no turn within") as refusal:
            async with turns.turn("waiter"):
                pass
        assert refusal.value.code == "busy"
        with trio.move_on_after(1):
            async with turns.turn("impatient"):
                pass
    async with turns.turn("next"):
        assert trio.current_time() >= 16


async def test_more_fetchers_than_turns_are_all_served(autojump_clock, directory, tmp_path):
    fabric = MemoryFabric(SEED, FaultProfile(bandwidth=1_000_000))
    dataset = open_dataset(directory)
    async with data_node(fabric, "data", directory, streams_max=2), trio.open_nursery() as nursery:

        async def work(name):
            async with fabric.node(name, {"worker"}) as worker:
                await fetch(worker, dataset, tmp_path / name)

        for number in range(6):
            nursery.start_soon(work, f"worker-{number}")
    whole = (directory / dataset.manifest.train[0].name).read_bytes()
    assert all((tmp_path / f"worker-{number}").read_bytes() == whole for number in range(6))


async def test_an_announcement_that_failed_is_made_again(autojump_clock, fabric, directory):
    async with fabric.node("data", {"data"}) as network, fabric.node("worker", {"worker"}) as worker:
        dataset = open_dataset(directory)
        provide, calls = network.provide, []

        async def unreliable(key):
            calls.append(key)
            if len(calls) <= 3:
                raise PeerUnreachable("no peers yet")
            await provide(key)

        network.provide = unreliable
        async with trio.open_nursery() as nursery:
            await nursery.start(DataNode(network, runtime("data"), [dataset], streams_max=2).run)
            await trio.sleep(30)
            for key in (provider_key("book"), provider_key("book", dataset.digest)):
                assert await worker.find_providers(key, wanted=3) == ["data"]
            before = len(calls)
            await trio.sleep(1000)
            assert before < len(calls) < before + 20
            nursery.cancel_scope.cancel()
