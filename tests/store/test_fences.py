"""No fence leaves twice; a counter that cannot be trusted is refused with what to do."""

import contextlib
import itertools

import pytest

from hypha.errors import StoreError
from hypha.store.disk import RealDisk
from hypha.store.fences import FenceFile
from hypha.store.memory_disk import Fault, MemoryDisk, PowerLoss


def test_blocks_follow_one_another_across_restarts(tmp_path):
    disk = RealDisk(tmp_path)
    fences = FenceFile(disk, "peer")
    assert fences.reserve(100) == 0
    assert fences.reserve(100) == 100
    assert FenceFile(disk, "peer").reserved == 200
    assert FenceFile(disk, "peer").reserve(1) == 200


@pytest.mark.parametrize("fault", list(Fault))
def test_no_block_is_reserved_twice_whatever_fails(fault):
    for at in range(25):
        disk = MemoryDisk(seed=at)
        disk.plan = {at: fault}
        handed_out = []
        for _life in range(3):
            with contextlib.suppress(PowerLoss, StoreError):
                fences = FenceFile(disk, "peer")
                handed_out.extend(fences.reserve(10) for _ in range(3))
            disk.plan = {}
            disk.crash()
        assert handed_out == sorted(set(handed_out))
        assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(handed_out))
        assert len(handed_out) >= 6


def test_a_failed_reservation_hands_out_nothing_and_is_skipped():
    disk = MemoryDisk()
    fences = FenceFile(disk, "peer")
    disk.plan = {disk.operations + at: Fault.ENOSPC for at in range(3)}
    with pytest.raises(StoreError, match="No space left"):
        fences.reserve(10)
    disk.plan = {}
    assert fences.reserve(10) == 10


def test_a_counter_missing_beside_other_state_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "hypha-job-1").mkdir()
    with pytest.raises(StoreError, match=r"missing although .* hypha-job-1.*new key"):
        FenceFile(RealDisk(tmp_path), "peer")


def test_a_counter_older_than_known_grants_is_refused_with_what_to_do():
    disk = MemoryDisk()
    FenceFile(disk, "peer").reserve(10)
    assert FenceFile(disk, "peer", fence_seen=9).reserved == 10
    with pytest.raises(StoreError, match=r"below 10 but 10 was granted.*new key"):
        FenceFile(disk, "peer", fence_seen=10)


def test_another_identitys_counter_is_refused():
    disk = MemoryDisk()
    FenceFile(disk, "peer-1")
    with pytest.raises(StoreError, match="belongs to peer peer-1, not to peer-2"):
        FenceFile(disk, "peer-2")


def test_decay_of_any_byte_is_found():
    disk = MemoryDisk()
    FenceFile(disk, "peer").reserve(10)
    for offset in range(disk.size("fences")):
        disk.corrupt("fences", offset)
        with pytest.raises(StoreError, match="damaged"):
            FenceFile(disk, "peer")
        disk.corrupt("fences", offset)
    assert FenceFile(disk, "peer").reserved == 10
