"""One successor per entry, whoever dies or races; damage is named."""

import contextlib

import pytest

from hypha.errors import StoreError
from hypha.protocol import manifest
from hypha.protocol.messages import SliceRef
from hypha.store.chain import Chain, StoreConflict
from hypha.store.disk import RealDisk
from hypha.store.memory_disk import Fault, MemoryDisk, PowerLoss
from hypha.store.objects import DirectoryObjects, open_objects


@pytest.fixture(params=["real", "memory", "fsspec"])
def objects(request, tmp_path):
    if request.param == "real":
        return DirectoryObjects(RealDisk(tmp_path))
    if request.param == "memory":
        return DirectoryObjects(MemoryDisk())
    return open_objects(f"memory://chain-{tmp_path.name}")


def test_entries_come_back_in_order_each_naming_its_predecessor(objects):
    chain = Chain(objects)
    assert chain.load() == ()
    first, second = chain.append(b"one"), chain.append(b"two")
    assert (first.number, first.previous) == (0, "")
    assert (second.number, second.previous) == (1, first.digest)
    again = Chain(objects)
    assert again.load() == (first, second)
    assert again.head_digest == second.digest


def test_the_second_to_make_an_entry_sees_the_first_ones(objects):
    mine, theirs = Chain(objects), Chain(objects)
    theirs.append(b"theirs")
    with pytest.raises(StoreConflict) as conflict:
        mine.append(b"mine")
    assert conflict.value.link.payload == b"theirs"
    assert [link.payload for link in mine.refresh()] == [b"theirs"]
    assert mine.append(b"mine").number == 1
    assert [link.payload for link in theirs.refresh()] == [b"mine"]


def test_making_an_entry_again_with_the_own_payload_is_success(objects):
    first = Chain(objects).append(b"mine")
    assert Chain(objects).append(b"mine") == first


def test_a_missing_entry_is_named(objects):
    chain = Chain(objects)
    for payload in (b"0", b"1", b"2"):
        chain.append(payload)
    objects.remove("chain/00000001")
    with pytest.raises(StoreError, match="chain/00000001: missing"):
        Chain(objects).load()


def test_an_entry_from_another_chain_is_refused(objects):
    chain, other = Chain(objects), Chain(objects, folder="other")
    chain.append(b"0")
    other.append(b"x")
    other.append(b"1")
    objects.create("chain/00000001", [objects.read("other/00000001")])
    with pytest.raises(StoreError, match="chain/00000001: says number 1 after"):
        Chain(objects).load()


def test_a_stranger_in_the_folder_is_named(objects):
    Chain(objects).append(b"0")
    objects.create("chain/notes", [b"x"])
    with pytest.raises(StoreError, match="chain/notes: does not belong"):
        Chain(objects).load()


def test_decay_of_any_byte_is_found():
    size = len(_one_entry()[0].read("chain/00000000"))
    for offset in range(size):
        objects, disk = _one_entry()
        disk.corrupt("chain/00000000", offset)
        with pytest.raises(StoreError, match="chain/00000000: damaged"):
            Chain(objects).load()


def _one_entry():
    disk = MemoryDisk()
    objects = DirectoryObjects(disk)
    Chain(objects).append(b"payload")
    return objects, disk


def test_the_entries_of_a_job_are_replayed_from_what_the_chain_kept(objects):
    slices = [SliceRef(name="a.safetensors", samples=10, bytes=100, digest="00" * 32)]
    kept, state = Chain(objects), manifest.Chain("job", slices)
    for nonce in ("one", "two"):
        entry = state.epoch_entry(scheduler="sched", nonce=nonce)
        link = kept.append(manifest.to_bytes(entry))
        state.append(link.digest, entry)
    found = [(link.digest, manifest.from_bytes(link.payload)) for link in Chain(objects).load()]
    replayed = manifest.replay("job", slices, found)
    assert replayed == state.state
    assert (replayed.number, replayed.job_epoch) == (2, found[1][1].job_epoch)
    assert found[1][1].previous == found[0][0]


def commit_all(objects, committed, attempts):
    chain = Chain(objects)
    chain.load()
    for number in range(len(chain.links), 4):
        payload = f"entry {number} {len(attempts)}".encode()
        attempts.append(payload)
        for _ in range(2):  # a failed attempt is made again with the same payload, as a committer does
            try:
                chain.append(payload)
            except StoreConflict:
                raise
            except StoreError:
                continue
            committed.append(payload)
            break


@pytest.mark.parametrize("fault", list(Fault))
def test_a_fault_at_every_operation_loses_no_committed_entry_and_makes_none_twice(fault):
    clean = MemoryDisk()
    commit_all(DirectoryObjects(clean), [], [])
    for at in range(clean.operations):
        for seed in range(3):
            disk = MemoryDisk(seed=seed)
            disk.plan = {at: fault}
            committed, attempts = [], []
            with contextlib.suppress(PowerLoss, StoreError):
                commit_all(DirectoryObjects(disk), committed, attempts)
            disk.plan = {}
            disk.crash()
            found = [link.payload for link in Chain(DirectoryObjects(disk)).load()]
            assert found[: len(committed)] == committed, (at, seed)
            assert set(found[len(committed) :]) <= set(attempts[len(committed) :])
            assert len(found) <= len(committed) + 1
