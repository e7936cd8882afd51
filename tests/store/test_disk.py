"""The two disks keep one contract; the one in memory forgets exactly what was not synced."""

import pytest

from hypha.errors import StoreError
from hypha.store.disk import AlreadyExists, NotFound, RealDisk, replace_durably
from hypha.store.memory_disk import Fault, MemoryDisk, PowerLoss


@pytest.fixture(params=["real", "memory"])
def disk(request, tmp_path):
    return RealDisk(tmp_path / "root") if request.param == "real" else MemoryDisk()


def test_appended_bytes_are_read_back_by_offset_and_length(disk):
    disk.write_new("a", b"01")
    disk.append("a", b"2345")
    assert disk.read("a") == b"012345"
    assert disk.read("a", offset=1, length=3) == b"123"
    assert disk.read("a", offset=6, length=3) == b""
    assert disk.size("a") == 6


def test_creation_and_link_are_exclusive(disk):
    disk.write_new("a", b"first")
    disk.write_new("b", b"second")
    with pytest.raises(AlreadyExists):
        disk.write_new("a", b"")
    with pytest.raises(AlreadyExists):
        disk.link("b", "a")
    assert disk.read("a") == b"first"


def test_what_is_missing_is_named(disk):
    for attempt in (
        lambda: disk.read("none"),
        lambda: disk.append("none", b"x"),
        lambda: disk.size("none"),
        lambda: disk.unlink("none"),
        lambda: disk.listdir("none"),
        lambda: disk.write_new("none/file", b""),
    ):
        with pytest.raises(NotFound, match="none"):
            attempt()


def test_a_rename_replaces_and_a_truncation_cuts(disk):
    disk.write_new("old", b"old")
    disk.write_new("new", b"newer")
    disk.rename("new", "old")
    disk.truncate("old", 3)
    disk.fsync("old")
    disk.fsync_dir("")
    assert disk.listdir("") == ["old"]
    assert disk.read("old") == b"new"


def test_directories_are_made_with_their_parents_and_listed_sorted(disk):
    disk.mkdir("x/y")
    disk.mkdir("x/y")
    disk.write_new("x/y/2", b"")
    disk.write_new("x/y/1", b"")
    assert disk.listdir("x") == ["y"]
    assert disk.listdir("x/y") == ["1", "2"]
    assert disk.exists("x")
    assert not disk.exists("x/z")


def test_a_second_opener_is_refused_until_the_first_is_done(disk):
    with disk.lock("lock"), pytest.raises(StoreError, match="in use"), disk.lock("lock"):
        pass
    with disk.lock("lock"), pytest.raises(StoreError, match="in use"), disk.lock("lock"):
        pass


def test_an_error_inside_a_lock_stays_what_it_was(disk):
    with pytest.raises(FileNotFoundError), disk.lock("lock"):
        raise FileNotFoundError("the caller's own")


def test_no_path_leads_out_of_the_root(tmp_path):
    disk = RealDisk(tmp_path)
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(StoreError, match="leads out"):
            disk.read(path)


def test_only_synced_bytes_and_names_surely_survive_a_crash():
    lost_bytes = lost_name = 0
    for seed in range(30):
        disk = MemoryDisk(seed=seed)
        disk.write_new("kept", b"safe")
        disk.fsync("kept")
        disk.fsync_dir("")
        disk.append("kept", b"volatile")
        disk.write_new("named", b"")
        disk.crash()
        data = disk.read("kept")
        assert data.startswith(b"safe")
        lost_bytes += data != b"safevolatile"
        lost_name += not disk.exists("named")
    assert lost_bytes > 5
    assert lost_name > 5


def test_the_same_seed_forgets_the_same():
    def survivor(seed):
        disk = MemoryDisk(seed=seed)
        disk.write_new("a", bytes(range(200)))
        disk.fsync_dir("")
        disk.crash()
        return disk.read("a")

    assert survivor(7) == survivor(7)
    assert len({survivor(seed) for seed in range(10)}) > 5


def test_a_full_disk_takes_what_fits_and_says_so():
    disk = MemoryDisk(capacity_bytes=5)
    disk.write_new("a", b"123")
    with pytest.raises(StoreError, match="No space left"):
        disk.append("a", b"4567")
    assert disk.read("a") == b"12345"


def test_planned_faults_strike_their_operation_only():
    disk = MemoryDisk()
    disk.plan = {1: Fault.EIO, 2: Fault.CRASH}
    disk.write_new("a", b"")
    with pytest.raises(StoreError, match="Input/output"):
        disk.fsync("a")
    with pytest.raises(PowerLoss):
        disk.fsync("a")
    with pytest.raises(PowerLoss, match="down"):
        disk.exists("a")
    disk.crash()
    assert disk.faults_struck == 2
    assert disk.listdir("") in ([], ["a"])


@pytest.mark.parametrize("fault", list(Fault))
def test_a_durable_replacement_leaves_old_or_new_whole_at_every_fault(fault):
    outcomes = set()
    for seed in range(4):
        for at in range(12):
            disk = MemoryDisk(seed=seed)
            replace_durably(disk, "f", b"old")
            disk.plan = {disk.operations + at: fault}
            try:
                replace_durably(disk, "f", b"newest")
                acknowledged = True
            except (StoreError, PowerLoss):
                acknowledged = False
            disk.plan = {}
            disk.crash()
            assert disk.read("f") in ((b"newest",) if acknowledged else (b"old", b"newest"))
            outcomes.add(disk.read("f"))
    assert outcomes == {b"old", b"newest"}


def test_slowness_adds_up_for_the_simulator_to_spend():
    disk = MemoryDisk(operation_s=0.25)
    disk.write_new("a", b"")
    disk.fsync("a")
    assert disk.busy_s == 0.5
