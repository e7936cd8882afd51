"""No acknowledged record is lost, whatever fails and wherever the power goes."""

import contextlib
import random
from typing import Any

import pytest
from msgspec import Struct

from hypha.errors import StoreError
from hypha.store.disk import RealDisk
from hypha.store.journal import FRAME_OVERHEAD_BYTES, open_journal
from hypha.store.memory_disk import Fault, MemoryDisk, PowerLoss


class Granted(Struct, frozen=True, tag=True):
    number: int
    data: bytes = b""


class Ended(Struct, frozen=True, tag=True):
    reason: str


RECORD: Any = Granted | Ended
PATH = "journal"


def reopened(disk):
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        return journal.records, journal.cut_bytes


def written(disk, count):
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        for number in range(count):
            journal.append(Granted(number))


def test_records_come_back_in_order_with_their_types(tmp_path):
    disk = RealDisk(tmp_path)
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        journal.append(Granted(1, b"\x00\xff"))
        journal.append(Ended("done"), Granted(2))
    assert reopened(disk) == ([Granted(1, b"\x00\xff"), Ended("done"), Granted(2)], 0)


def test_a_second_opener_is_refused(tmp_path):
    first = open_journal(RealDisk(tmp_path), PATH, label="job-1", record_type=RECORD)
    with first, pytest.raises(StoreError, match="in use by another process"):
        reopened(RealDisk(tmp_path))
    assert reopened(RealDisk(tmp_path)) == ([], 0)


def test_another_jobs_journal_is_refused_naming_both():
    disk = MemoryDisk()
    written(disk, 1)
    foreign = open_journal(disk, PATH, label="job-2", record_type=RECORD)
    with pytest.raises(StoreError, match="belongs to 'job-1', not to 'job-2'"), foreign:
        pass


@pytest.mark.parametrize("cut", [1, 5, FRAME_OVERHEAD_BYTES, FRAME_OVERHEAD_BYTES + 3])
def test_a_torn_tail_is_cut_and_writing_goes_on(cut):
    disk = MemoryDisk()
    written(disk, 3)
    disk.truncate(PATH, disk.size(PATH) - cut)
    assert reopened(disk)[0] == [Granted(0), Granted(1)]
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        assert journal.cut_bytes == 0
        journal.append(Granted(9))
    assert reopened(disk)[0] == [Granted(0), Granted(1), Granted(9)]


def test_zeros_and_noise_at_the_end_are_a_torn_tail():
    for tail in (bytes(4096), b"HJ", random.Random(1).randbytes(5000)):
        disk = MemoryDisk()
        written(disk, 2)
        disk.append(PATH, tail)
        assert reopened(disk) == ([Granted(0), Granted(1)], len(tail))


def test_decay_of_any_byte_is_found_and_the_offset_named():
    intact = MemoryDisk()
    written(intact, 4)
    size = intact.size(PATH)
    shorter = MemoryDisk()
    written(shorter, 3)
    last = shorter.size(PATH)
    for offset in range(last):
        disk = MemoryDisk()
        written(disk, 4)
        disk.corrupt(PATH, offset)
        with pytest.raises(StoreError, match=r"journal: damaged at offset \d+"):
            reopened(disk)
    disk = MemoryDisk()
    written(disk, 4)
    disk.corrupt(PATH, last + (size - last) // 2)
    records, cut = reopened(disk)
    assert records == [Granted(0), Granted(1), Granted(2)]
    assert cut > 0


def test_a_file_that_is_no_journal_is_refused():
    disk = MemoryDisk()
    disk.write_new(PATH, b"something else")
    with pytest.raises(StoreError, match="offset 0: not a journal"):
        reopened(disk)


def test_a_record_of_the_wrong_shape_is_refused():
    disk = MemoryDisk()
    written(disk, 1)
    narrow = open_journal(disk, PATH, label="job-1", record_type=Ended)
    with pytest.raises(StoreError, match="wrong shape"), narrow:
        pass


def test_a_rewrite_shrinks_the_file_and_keeps_what_was_given():
    disk = MemoryDisk()
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        for number in range(1000):
            journal.append(Granted(number, bytes(100)))
        before = journal.size_bytes
        journal.rewrite([Granted(number) for number in range(600)])
        assert journal.size_bytes < before / 5
        journal.append(Ended("later"))
    assert reopened(disk)[0] == [*(Granted(number) for number in range(600)), Ended("later")]


def test_a_full_disk_refuses_the_record_and_takes_the_next_once_there_is_room():
    disk = MemoryDisk()
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        journal.append(Granted(1))
        disk.capacity_bytes = disk.used_bytes() + 20
        with pytest.raises(StoreError, match="No space left"):
            journal.append(Granted(2))
        with pytest.raises(StoreError, match="No space left"):
            journal.append(Granted(3))
        disk.capacity_bytes = None
        journal.append(Granted(4))
    assert reopened(disk) == ([Granted(1), Granted(4)], 0)


class Promises:
    """What the journal may hold: after a failed append the record or not, after a failed rewrite either file."""

    def __init__(self):
        self.bases = [[]]  # states that the next append may build on
        self.maybe = []  # states with an append that failed, which the next one removes

    def append(self, journal, *new):
        grown = [[*base, *new] for base in self.bases]
        self.maybe = grown
        journal.append(*new)
        self.bases, self.maybe = grown, []

    def rewrite(self, journal, records):
        self.bases.append(records)
        journal.rewrite(records)
        self.bases, self.maybe = [records], []

    def check(self, found):
        assert found in self.bases + self.maybe
        self.bases, self.maybe = [found], []


def recovered(disk, promises):
    """Cut the power, open again, and hold the journal to its promises."""
    disk.plan = {}
    disk.crash()
    found, _ = reopened(disk)
    promises.check(found)


def workload(disk, promises):
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        for number in range(8):
            with contextlib.suppress(StoreError):
                if number == 4:
                    promises.rewrite(journal, promises.bases[-1][2:])
                else:
                    promises.append(journal, Granted(number, bytes(number * 7)), Granted(-number))


@pytest.mark.parametrize("fault", list(Fault))
def test_a_fault_at_every_operation_loses_no_acknowledged_record(fault):
    clean = MemoryDisk()
    workload(clean, Promises())
    for at in range(clean.operations):
        for seed in range(3):
            disk = MemoryDisk(seed=seed)
            disk.plan = {at: fault}
            promises = Promises()
            with contextlib.suppress(PowerLoss, StoreError):
                workload(disk, promises)
            assert disk.faults_struck == 1
            recovered(disk, promises)
            recovered(disk, promises)


def test_random_faults_and_power_losses_over_many_lives_lose_nothing():
    longest = 0
    for seed in range(40):
        chance = random.Random(seed)
        disk = MemoryDisk(seed=seed)
        promises = Promises()
        for _life in range(6):
            disk.plan = {disk.operations + chance.randrange(60): chance.choice(list(Fault)) for _ in range(4)}
            with contextlib.suppress(PowerLoss, StoreError):
                live(disk, promises, chance)
            recovered(disk, promises)
        longest = max(longest, len(promises.bases[0]))
    assert longest > 20


def live(disk, promises, chance):
    with open_journal(disk, PATH, label="job-1", record_type=RECORD) as journal:
        promises.check(journal.records)
        for _ in range(10):
            with contextlib.suppress(StoreError):
                if chance.random() < 0.2:
                    promises.rewrite(journal, promises.bases[-1][chance.randrange(3) :])
                else:
                    promises.append(journal, Granted(chance.randrange(1000), bytes(chance.randrange(50))))
