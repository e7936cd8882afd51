"""A job's store: whose it is, where it can resume, what its journal remembers."""

from contextlib import contextmanager

import pytest
import trio
from blake3 import blake3
from msgspec.structs import replace

from hypha.errors import ConfigError, StoreError
from hypha.protocol.compression import Compression
from hypha.protocol.job import ModelSpec, OuterOptimizer
from hypha.protocol.messages import Contribution, Interval, Member, Merged, SliceRef
from hypha.protocol.resources import Resources
from hypha.protocol.slices import Grant
from hypha.protocol.tally import Exclude
from hypha.scheduler.config import CheckpointConfig
from hypha.scheduler.records import Granted, LeaseHeld
from hypha.scheduler.scribe import Scribe
from hypha.scheduler.settings import AnotherJob, Settings
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import Deposed, open_store
from hypha.store.blobs import Artifact
from hypha.store.memory_disk import MemoryDisk
from hypha.store.objects import DirectoryObjects, RemoteObjects
from tests.sim.virtual import VirtualRuntime

SLICES = (SliceRef(name="s0", samples=100, bytes=1, digest="0" * 64),)
MODEL = ModelSpec(type="causal-lm", config={"model_type": "llama", "hidden_size": 64})
SETTINGS = {"manifest_digest": "d" * 64, "model": MODEL}
A = Member(peer_id="a", fence=1, lease_id="lease-a")


class Ids:
    """Names of parts, counted."""

    def __init__(self):
        self.last = 0

    def __call__(self):
        self.last += 1
        return f"id-{self.last}"


@pytest.fixture
def disk():
    return MemoryDisk()


@contextmanager
def opened(disk, *, objects=None, job_id="job-1", name="job", **settings):
    with open_store(
        disk,
        objects or DirectoryObjects(disk, new_id=Ids()),
        job_id=job_id,
        settings=Settings(name=name, **(SETTINGS | settings)),
        slices=SLICES,
    ) as store:
        yield store, store.load()


def content(kind, round_made, version=""):
    return f"{kind} {round_made} {version}".encode()


def digest(kind, round_made, version=""):
    return blake3(content(kind, round_made, version)).hexdigest()


def put(store, tmp_path, kind, round_made, version=""):
    path = tmp_path / "file"
    path.write_bytes(content(kind, round_made, version))
    store.put(kind, round_made, digest(kind, round_made, version), path)


def commit(store, round_made, *, job_epoch=1):
    """Commit a round of ten samples; returns what it was made from."""
    start = 10 * (round_made - 1)
    contribution = Contribution(
        peer_id=A.peer_id,
        fence=A.fence,
        lease_id=A.lease_id,
        round=round_made,
        base_digest=digest("model", round_made - 1),
        digest=digest("update", round_made),
        bytes=1,
        samples=10,
        intervals=(Interval(epoch=0, slice=0, start=start, stop=start + 10),),
    )
    merged = Merged(
        round=round_made,
        close=round_made,
        base_digest=digest("model", round_made - 1),
        model_digest=digest("model", round_made),
        momentum_digest=digest("momentum", round_made),
        record_digest=digest("record", round_made),
        update_digest=digest("applied", round_made),
        model_bytes=1,
        momentum_bytes=1,
        record_bytes=1,
        update_bytes=1,
    )
    store.commit(store.round_entry((merged,), (contribution,), job_epoch=job_epoch, nonce=f"n{round_made}"))


def train(store, tmp_path, rounds, *, stored=()):
    """Begin an epoch and commit so many rounds with their records; model and momentum of those in `stored`."""
    store.begin_epoch(scheduler="s", nonce="begin")
    for kind in ("momentum", "model"):
        put(store, tmp_path, kind, 0)
    for round_made in range(1, rounds + 1):
        put(store, tmp_path, "record", round_made)
        if round_made in stored:
            put(store, tmp_path, "momentum", round_made)
            put(store, tmp_path, "model", round_made)
        commit(store, round_made)


# --- whose it is -------------------------------------------------------------------------------------------------


def test_a_store_opened_again_is_the_same_job_where_it_was(disk, tmp_path):
    with opened(disk) as (store, _):
        train(store, tmp_path, 2)
        before = store.state
    with opened(disk, job_id="job-2") as (store, _):
        assert store.opened.job_id == "job-1"
        assert store.state == before
        assert (store.state.round, store.state.samples) == (2, 20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifest_digest": "e" * 64}, "scheduler.job.dataset was 'ddddd.*', is 'eeeee"),
        (
            {"model": replace(MODEL, config={"model_type": "llama", "hidden_size": 128})},
            "scheduler.job.model.config.hidden_size was 64, is 128; .*--fresh",
        ),
        (
            {"model": replace(MODEL, config={"model_type": "llama", "hidden_size": 64, "layers": 2})},
            "scheduler.job.model.config.layers was not given, is 2",
        ),
        ({"model": replace(MODEL, seed=3)}, "scheduler.job.model.seed was 0, is 3"),
        ({"outer_optimizer": OuterOptimizer(momentum=0.5)}, "scheduler.job.outer_optimizer.momentum was 0.9, is 0.5"),
        (
            {"compression": Compression(outer_updates="int8")},
            "scheduler.job.compression.outer_updates was 'none', is 'int8'",
        ),
    ],
)
@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_a_job_that_was_begun_otherwise_is_refused_by_key_and_stays_as_it_is(disk, journal, changes, said):
    objects = DirectoryObjects(disk, new_id=Ids())
    with opened(disk, objects=objects) as (store, _):
        store.begin_epoch(scheduler="s", nonce="n")
    before = objects.read("chain/00000000")
    there = disk if journal == "kept" else MemoryDisk()
    with pytest.raises(AnotherJob, match=said), opened(there, objects=objects, **changes):
        pass
    assert objects.names("chain") == ["chain/00000000"]
    assert objects.read("chain/00000000") == before
    with opened(disk, objects=objects) as (store, _):
        assert store.state.job_epoch == 1


def test_other_settings_are_refused_before_anything_was_committed(disk):
    with opened(disk):
        pass
    with pytest.raises(AnotherJob, match=r"state_dir \(job job-1\) holds .*seed was 0, is 3"):
        opened(disk, model=replace(MODEL, seed=3)).__enter__()


def test_the_chain_of_another_job_beside_the_journal_is_refused_naming_both(disk):
    theirs = DirectoryObjects(MemoryDisk(), new_id=Ids())
    with opened(MemoryDisk(), objects=theirs, job_id="theirs-1") as (store, _):
        store.begin_epoch(scheduler="s", nonce="n")
    with opened(disk, job_id="mine-1"):
        pass
    both = "journal in state_dir is of job mine-1, the chain in the checkpoint store of job theirs-1"
    with pytest.raises(ConfigError, match=both), opened(disk, objects=theirs):
        pass


def test_another_jobs_journal_is_refused(disk):
    with opened(disk, name="theirs"):
        pass
    with pytest.raises(ConfigError, match=r"state_dir: .*belongs to 'theirs', not to 'job'"), opened(disk):
        pass


def test_a_lost_journal_leaves_the_job_to_its_chain(disk, tmp_path):
    objects = DirectoryObjects(disk, new_id=Ids())
    with opened(disk, objects=objects) as (store, _):
        train(store, tmp_path, 1)
    with opened(MemoryDisk(), objects=objects, job_id="job-2") as (store, remembered):
        assert (store.opened.job_id, store.state.round, remembered.leases) == ("job-1", 1, ())


def test_two_on_one_chain_have_one_successor(disk, tmp_path):
    objects = DirectoryObjects(disk, new_id=Ids())
    with opened(disk, objects=objects) as (first, _), opened(MemoryDisk(), objects=objects) as (second, _):
        first.begin_epoch(scheduler="s1", nonce="one")
        second.load()
        assert second.begin_epoch(scheduler="s2", nonce="two") == 2
        with pytest.raises(Deposed, match="job epoch 2 is at work; this one is 1"):
            commit(first, 1)
        commit(second, 1, job_epoch=2)
        assert second.state.round == 1


# --- where it can resume -----------------------------------------------------------------------------------------


def test_a_resume_point_is_the_newest_checkpoint_and_the_records_after_it(disk, tmp_path):
    with opened(disk) as (store, _):
        assert store.resume_point() is None
        train(store, tmp_path, 5, stored=(2, 4))
        point = store.resume_point()
    assert (point.round, point.model_digest, point.momentum_digest) == (4, digest("model", 4), digest("momentum", 4))
    assert point.records == (digest("record", 5),)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(disk, tmp_path):
    with opened(disk) as (store, _):
        train(store, tmp_path, 5, stored=(2, 4))
        disk.corrupt(Artifact(kind="momentum", round=4, digest=digest("momentum", 4)).name, 0)
        point = store.resume_point()
        assert point.round == 2
        assert point.records == tuple(digest("record", n) for n in (3, 4, 5))
        disk.corrupt(Artifact(kind="record", round=5, digest=digest("record", 5)).name, 0)
        with pytest.raises(StoreError, match="no checkpoint leads to the committed round 5: round 4: momentum/"):
            store.resume_point()


def test_the_checkpoint_of_a_round_that_was_lost_is_not_resumed_from(disk, tmp_path):
    with opened(disk) as (store, _):
        train(store, tmp_path, 1)
        for version in ("lost", ""):
            put(store, tmp_path, "momentum", 2, version)
            put(store, tmp_path, "model", 2, version)
        put(store, tmp_path, "record", 2)
        assert store.resume_point().round == 0
        commit(store, 2)
        assert store.resume_point().model_digest == digest("model", 2)


def test_what_is_pruned_leaves_a_resume_point(disk, tmp_path):
    with opened(disk) as (store, _):
        train(store, tmp_path, 6, stored=(2, 4, 6))
        assert store.prune(CheckpointConfig(every=2, keep=2)) == 8  # 0 and 2 twice, records 1 to 4
        assert store.resume_point().round == 6
        disk.corrupt(Artifact(kind="model", round=6, digest=digest("model", 6)).name, 0)
        assert store.resume_point().round == 4


def test_an_artifact_in_a_remote_store_is_copied_to_be_sent(disk, tmp_path):
    import fsspec

    objects = RemoteObjects(fsspec.filesystem("memory"), f"/{tmp_path.name}")
    with opened(disk, objects=objects) as (store, _):
        put(store, tmp_path, "model", 0)
        path = store.find("model", 0, digest("model", 0), tmp_path)
        assert path.read_bytes() == content("model", 0)
        assert store.find("model", 1, digest("model", 1), tmp_path) is None


# --- what the journal remembers ----------------------------------------------------------------------------------


def grant(request, start, *, member=A, round_made=1):
    interval = Interval(epoch=0, slice=0, start=start, stop=start + 10)
    return Granted(grant=Grant(member=member, round=round_made, request=request, interval=interval))


HELD = LeaseHeld(
    member=A, work="train", executor="x", price=2.5, addresses=b"\x00\xff", resources=Resources(cpu=2.0), ttl_s=30.0
)
EXCLUDE = Exclude(peer_id="a", fence=1, lease_id="lease-a", round=1, reason="its lease is gone")


async def noted(disk, store, *, play):
    """Run a scribe while `play(scribe)` does; returns what it told of, in order."""
    told = []
    scribe = Scribe(VirtualRuntime(0, "s"), store, Standing(), noted=told.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scribe.run)
        await play(scribe)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    return told


async def test_the_journal_remembers_grants_leases_and_exclusions_in_order(disk, autojump_clock):
    with opened(disk) as (store, _):

        async def play(scribe):
            await scribe.note(HELD)
            await scribe.note(grant(1, 0))
            scribe.exclude([EXCLUDE])
            await scribe.note(grant(2, 20))

        told = await noted(disk, store, play=play)
        assert told == [EXCLUDE]
    with opened(disk) as (_, remembered):
        assert [g.request for g in remembered.grants] == [1, 2]
        assert remembered.leases == (HELD,)
        assert remembered.excluded == (EXCLUDE,)


def test_the_highest_fence_of_each_worker_is_known_from_chain_and_journal(disk, tmp_path):
    later = replace(HELD, member=Member(peer_id="a", fence=7, lease_id="later"))
    other = replace(HELD, member=Member(peer_id="b", fence=3, lease_id="other"))
    with opened(disk) as (store, _):
        assert store.fences() == {}
        train(store, tmp_path, 1)
        assert store.fences() == {"a": 1}
        store.note(other, later, HELD)
        assert store.fences() == {"a": 7, "b": 3}
    with opened(disk) as (store, _):
        assert store.fences() == {"a": 7, "b": 3}
    with opened(MemoryDisk(), objects=DirectoryObjects(disk, new_id=Ids())) as (store, _):
        assert store.fences() == {"a": 1}


async def test_a_lease_that_ended_is_not_tried_again(disk, autojump_clock):
    with opened(disk) as (store, _):

        async def play(scribe):
            await scribe.note(HELD)
            scribe.ended(A)

        await noted(disk, store, play=play)
    with opened(disk) as (_, remembered):
        assert remembered.leases == ()


async def test_an_exclusion_takes_effect_only_once_the_disk_has_taken_it(disk, autojump_clock):
    with opened(disk) as (store, _):
        disk.capacity_bytes = disk.used_bytes()

        async def play(scribe):
            scribe.exclude([EXCLUDE])
            await trio.sleep(30)
            assert scribe._excluded == [EXCLUDE]
            disk.capacity_bytes = None

        assert await noted(disk, store, play=play) == [EXCLUDE]
    with opened(disk) as (_, remembered):
        assert remembered.excluded == (EXCLUDE,)


async def test_a_note_that_the_disk_refuses_is_not_acknowledged(disk, autojump_clock):
    with opened(disk) as (store, _):
        disk.capacity_bytes = disk.used_bytes()

        async def play(scribe):
            with pytest.raises(StoreError, match="No space left"):
                await scribe.note(grant(1, 0))
            disk.capacity_bytes = None
            await scribe.note(grant(2, 0))

        await noted(disk, store, play=play)
    with opened(disk) as (_, remembered):
        assert [g.request for g in remembered.grants] == [2]


async def test_a_grown_journal_is_rewritten_with_what_still_matters(disk, tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr("hypha.scheduler.store.JOURNAL_REWRITE_BYTES", 1)
    with opened(disk) as (store, _):
        train(store, tmp_path, 1)

        async def play(scribe):
            await scribe.note(HELD)
            await scribe.note(grant(1, 0), grant(2, 20, round_made=2))
            scribe.committed()

        await noted(disk, store, play=play)
    with opened(disk) as (store, remembered):
        assert (store.opened.job_id, remembered.leases) == ("job-1", (HELD,))
        assert [g.round for g in remembered.grants] == [2]
