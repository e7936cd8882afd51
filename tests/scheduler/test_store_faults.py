"""Whatever fails or dies at whichever write, no acknowledged state is lost; what decays is passed over, and said."""

import contextlib
import logging

import pytest

from hypha.errors import StoreError
from hypha.scheduler.config import CheckpointConfig
from hypha.store.blobs import Artifact
from hypha.store.memory_disk import Fault, MemoryDisk, PowerLoss
from hypha.store.objects import DirectoryObjects
from hypha.telemetry.logs import FIELDS
from tests.scheduler import test_store
from tests.scheduler.test_store import HELD, commit, digest, grant, put

ROUNDS = 3
KEEP = CheckpointConfig(every=2, keep=1)


def opened(disk, **options):
    return test_store.opened(disk, objects=DirectoryObjects(disk), **options)


class Promised:
    """What the store has acknowledged."""

    def __init__(self):
        self.rounds = 0
        self.epochs = 0
        self.grants = []
        self.held = False


def again(write, times=4):
    """Write until the store takes it, as committer and scribe do; the last failure is the caller's."""
    for left in reversed(range(times)):
        try:
            return write()
        except StoreError:
            if not left:
                raise
    raise AssertionError


def live(disk, tmp_path, promised):
    """One life of a scheduler: take over, then make what is missing up to the last round."""
    with opened(disk) as (store, remembered):
        held_to(promised, store, remembered)
        store.begin_epoch(scheduler="s", nonce=f"epoch-{disk.operations}")
        promised.epochs = epoch = store.state.job_epoch
        again(lambda: store.note(HELD))
        promised.held = True
        if not store.state.round:
            again(lambda: put(store, tmp_path, "momentum", 0))
            again(lambda: put(store, tmp_path, "model", 0))
        for number in range(store.state.round + 1, ROUNDS + 1):
            request = grant(number, 10 * (number - 1), round_made=number)
            again(lambda request=request: store.note(request))
            promised.grants.append(request.grant.interval)
            for kind in ("record", "momentum", "model"):
                if kind == "record" or number % KEEP.every == 0:
                    again(lambda kind=kind, number=number: put(store, tmp_path, kind, number))
            again(lambda number=number: commit(store, number, job_epoch=epoch))
            promised.rounds = number
            again(lambda: store.prune(KEEP))
            again(store.compact)


def held_to(promised, store, remembered):
    """What was acknowledged is there, and the job can go on from it."""
    assert store.state.round >= promised.rounds
    assert store.state.job_epoch >= promised.epochs
    assert len(remembered.leases) == 1 or not promised.held
    noted = {each.interval for each in remembered.grants} | set(store.state.used)
    covered = {(i.start + at) for i in noted for at in range(i.stop - i.start)}
    assert all(set(range(i.start, i.stop)) <= covered for i in promised.grants)
    point = store.resume_point()
    if store.state.round:
        assert point.round + len(point.records) == store.state.round


@pytest.mark.parametrize("faults", [(Fault.EIO, Fault.ENOSPC), (Fault.CRASH, Fault.CRASH_AFTER)], ids=["fails", "dies"])
def test_whatever_happens_at_each_operation_nothing_acknowledged_is_lost(faults, tmp_path, monkeypatch):
    monkeypatch.setattr("hypha.scheduler.store.JOURNAL_REWRITE_BYTES", 400)
    clean = MemoryDisk()
    live(clean, tmp_path, Promised())
    assert clean.operations > 100
    for at in range(clean.operations):
        disk, promised = MemoryDisk(seed=at), Promised()
        disk.plan = {at: faults[at % 2]}
        with contextlib.suppress(PowerLoss, StoreError):
            live(disk, tmp_path, promised)
        assert disk.faults_struck == 1
        disk.plan = {}
        disk.crash()
        live(disk, tmp_path, promised)
        with opened(disk) as (store, remembered):
            held_to(promised, store, remembered)
            assert (store.state.round, store.state.samples) == (ROUNDS, 10 * ROUNDS)


# --- decay --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    made = MemoryDisk()
    live(made, tmp_path, Promised())
    return made


def warned(caplog, message):
    (record,) = [r for r in caplog.records if r.getMessage() == message and r.levelno == logging.WARNING]
    return getattr(record, FIELDS)


def test_a_damaged_newest_entry_gives_way_to_the_one_before_and_its_workers_are_leased_anew(disk, caplog, tmp_path):
    newest = disk.listdir("chain")[-1]
    disk.corrupt(f"chain/{newest}", 40)
    with caplog.at_level(logging.WARNING), opened(disk) as (store, remembered):
        assert (store.state.round, store.state.job_epoch, remembered.leases) == (ROUNDS - 1, 1, ())
        # Whoever saw the damaged entry intact may have seen an epoch in it.
        assert store.begin_epoch(scheduler="s", nonce="after") == 3
    record = warned(caplog, "The newest chain entry is damaged, the one before is used")
    assert record["damaged"] == f"chain/{newest}"
    assert record["used"] == f"chain/{int(newest) - 1:08d}"
    assert disk.exists(record["set_aside"])
    with opened(disk) as (store, remembered):
        assert (store.state.round, store.state.job_epoch, remembered.leases) == (ROUNDS - 1, 3, ())
        assert store.begin_epoch(scheduler="s", nonce="again") == 5


def test_a_damaged_entry_with_successors_is_refused_by_name_and_left_alone(disk):
    disk.corrupt("chain/00000002", 40)
    before = {name: disk.read(f"chain/{name}") for name in disk.listdir("chain")}
    with pytest.raises(StoreError, match="chain/00000002: damaged"), opened(disk):
        pass
    assert {name: disk.read(f"chain/{name}") for name in disk.listdir("chain")} == before


def test_a_half_written_newest_entry_is_a_damaged_one(disk, caplog):
    newest = f"chain/{disk.listdir('chain')[-1]}"
    disk.truncate(newest, disk.size(newest) // 2)
    with caplog.at_level(logging.WARNING), opened(disk) as (store, _):
        assert store.state.round == ROUNDS - 1
    assert warned(caplog, "The newest chain entry is damaged, the one before is used")["damaged"] == newest


def test_a_damaged_journal_is_set_aside_and_the_chain_alone_counts(disk, caplog):
    disk.corrupt("journal", 30)
    with caplog.at_level(logging.WARNING), opened(disk, job_id="job-2") as (store, remembered):
        assert (store.opened.job_id, store.state.round) == ("job-1", ROUNDS)
        assert (remembered.grants, remembered.leases) == ((), ())
        store.note(HELD)
    record = warned(caplog, "The journal is damaged: the chain is used alone, workers are leased anew")
    assert record["set_aside"] == "journal.damaged-1"
    assert "journal: " in record["reason"]
    assert disk.exists("journal.damaged-1")
    disk.corrupt("journal", 30)
    with opened(disk) as (store, _):
        assert store.state.round == ROUNDS
    assert disk.exists("journal.damaged-2")


def test_a_damaged_model_gives_way_to_an_older_one_naming_both(tmp_path, caplog):
    disk = MemoryDisk()
    with opened(disk) as (store, _):
        store.begin_epoch(scheduler="s", nonce="n")
        for number in range(3):
            for kind in ("record", "momentum", "model"):
                put(store, tmp_path, kind, number)
            if number:
                commit(store, number)
        damaged = Artifact(kind="model", round=2, digest=digest("model", 2)).name
        disk.corrupt(damaged, 0)
        with caplog.at_level(logging.WARNING):
            assert store.resume_point().round == 1
    record = warned(caplog, "Checkpoint unusable, an older one is used")
    assert damaged in record["damaged"]
    assert record["used"] == Artifact(kind="model", round=1, digest=digest("model", 1)).name


def test_a_journal_of_another_format_is_no_damage(disk, monkeypatch):
    monkeypatch.setattr("hypha.store.journal.FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match="journal format 1 is not 2"), opened(disk):
        pass
    assert not disk.exists("journal.damaged-1")
