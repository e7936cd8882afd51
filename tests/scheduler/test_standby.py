"""A standby takes over when the leader's hold on the store lapses, under a higher epoch; the deposed leader stops."""

import msgspec
import pytest
import trio
from msgspec.structs import replace

from hypha.protocol.manifest import JobEpochStarted
from hypha.scheduler.hold import Beat, HeldByAnother, Hold, Seen, Watch
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import Deposed
from hypha.store.memory_disk import MemoryDisk
from hypha.store.objects import DirectoryObjects
from tests.scheduler.stage import Stage
from tests.sim.machines import SchedulerMachine, ShelvedObjects
from tests.sim.virtual import VirtualRuntime

HOLD_S = 10.0


class StandbyMachine(SchedulerMachine):
    """`hypha-scheduler run --standby`: a journal and an identity of its own, the leader's store."""

    async def main(self, network, runtime):
        table = self.config.scheduler
        await Hold(self.objects, runtime, scheduler=network.peer_id, hold_s=table.hold_s).lapsed()
        await super().main(network, runtime)


class TwoSchedulers(Stage):
    """A stage with a standby; `leader` names whose job is looked at."""

    leader = "scheduler"

    def _build(self):
        super()._build()
        first = self.scheduler
        second = self._add(StandbyMachine, "standby")
        second.objects = ShelvedObjects(first.disk, new_id=lambda: second.runtime.new_id())
        second.objects.shelf = second.directory / "shelf"
        second.config = self._config()

    def _config(self):
        config = super()._config()
        return replace(config, scheduler=replace(config.scheduler, hold_s=HOLD_S))

    @property
    def scheduler(self):
        return self.machines[self.leader]

    def _break(self, invariant, how):
        # That is what a deposed leader ends with, and whoever has lost the hold before it leads.
        if "leads the job under epoch" not in how and "the hold on the job's store: " not in how:
            super()._break(invariant, how)

    def epochs(self):
        return [(entry.scheduler, entry.job_epoch) for entry in self.chain() if isinstance(entry, JobEpochStarted)]


@pytest.fixture
def stage(tmp_path):
    return lambda **options: TwoSchedulers(tmp_path, **options)


def test_a_standby_goes_on_from_the_last_commit_when_the_leader_dies(stage):
    stage = stage(rounds=4, ttl_s=8.0)

    async def script(stage):
        await stage.said("Round committed", "round=2")
        before = stage.chain()
        stage.leader = "standby"
        stage.crash_now("scheduler")
        died = trio.current_time()
        line = await stage.said("standby INFO scheduler: Job started", "job_epoch=2")
        assert HOLD_S * 0.8 < trio.current_time() - died < HOLD_S + 3.0
        assert f"model_digest={stage.rounds()[1].merged.model_digest}" in line.split()
        await stage.done()
        assert stage.epochs() == [("scheduler", 1), ("standby", 2)]
        assert stage.chain()[: len(before)] == before
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3, 4]

    stage.play(script)


def test_a_leader_that_stood_still_is_deposed_and_stops_when_it_wakes(stage):
    stage = stage(rounds=6, ttl_s=8.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        stage.leader = "standby"
        stage.fabric.stop("scheduler")
        await stage.said("Job started", "job_epoch=2")
        stage.fabric.go("scheduler")
        await stage.said("role ended", "leads the job under epoch 2")
        assert not stage.machines["scheduler"].is_up
        await stage.done()
        assert stage.epochs() == [("scheduler", 1), ("standby", 2)]
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3, 4, 5, 6]

    stage.play(script)


@pytest.mark.parametrize("words", ["has lapsed", "job_epoch=2"])
def test_a_leader_that_is_started_again_leaves_the_job_to_whoever_has_taken_over(stage, words):
    stage = stage(rounds=4, ttl_s=8.0)

    async def script(stage):
        await stage.said("Round committed", "round=2")
        stage.leader = "standby"
        stage.crash_now("scheduler")
        await stage.said("standby", words)
        stage.start("scheduler")
        await stage.said("scheduler INFO scheduler.hold: Standing by", "leader=standby")
        await stage.said("standby INFO scheduler: Job finished")
        assert stage.epochs() == [("scheduler", 1), ("standby", 2)]
        assert not stage.lines("role ended")
        # Each worker was leased twice: once under each job epoch.
        assert len(stage.lines("Worker leased")) == 2 * 3
        await stage.done()

    stage.play(script)


def test_a_standby_stays_out_of_it_while_the_leader_lives(stage):
    stage = stage(rounds=8, samples=96)

    async def script(stage):
        await stage.said("Standing by", "leader=scheduler")
        await stage.scheduler.finished.wait()
        assert stage.epochs() == [("scheduler", 1)]
        assert not stage.lines("lapsed")

    stage.play(script)


def test_a_hold_lapses_only_when_its_number_stands_still_for_its_own_duration():
    def seen(number: int, hold_s: float = 20.0) -> Seen:
        return Seen(f"hold/{number:012d}", Beat(scheduler="a", hold_s=hold_s))

    watch = Watch(10.0, now=100.0)
    assert watch.see(Seen("", None), 100.0) == 10.0
    assert watch.see(seen(1), 109.0) == 20.0
    assert watch.see(seen(2), 128.0) == 20.0
    assert watch.see(seen(2), 147.0) == 1.0
    assert watch.see(seen(2), 148.0) == 0.0
    # A lower number is another hold, begun anew: it is alive as well.
    assert watch.see(seen(1), 149.0) == 20.0


async def test_a_hold_is_renewed_under_one_name_at_a_time_until_another_leads(autojump_clock):
    objects = DirectoryObjects(MemoryDisk(seed=1), new_id=iter(map(str, range(1000))).__next__)
    runtime = VirtualRuntime(1, "a")
    hold = Hold(objects, runtime, scheduler="a", hold_s=HOLD_S)
    found = []

    def deposed():
        found.append(objects.names("hold"))
        return "b leads" if len(found) == 4 else None

    with pytest.raises(Deposed, match="b leads"):
        await hold.keep(deposed, Standing())
    assert [len(names) for names in found] == [1, 1, 1, 1]
    assert len({names[0] for names in found}) == 4
    assert trio.current_time() == pytest.approx(3 * HOLD_S / 5)
    assert hold.look().beat == Beat(scheduler="a", hold_s=HOLD_S)


async def test_a_store_that_cannot_be_written_is_said_and_the_leader_leads_on(autojump_clock):
    objects = DirectoryObjects(MemoryDisk(seed=1, capacity_bytes=10), new_id=iter(map(str, range(1000))).__next__)
    hold, standing = Hold(objects, VirtualRuntime(1, "a"), scheduler="a", hold_s=HOLD_S), Standing()
    with trio.move_on_after(HOLD_S) as leading:
        await hold.keep(lambda: None, standing)
    assert leading.cancelled_caught
    assert "The hold on the job's store cannot be renewed" in standing.words()


async def test_of_two_standbys_that_see_the_hold_lapse_at_once_one_takes_over_and_the_other_waits(autojump_clock):
    disk = MemoryDisk(seed=1)
    objects = DirectoryObjects(disk, new_id=iter(map(str, range(1000))).__next__)
    took = []

    async def wait(name):
        hold = Hold(objects, VirtualRuntime(1, name), scheduler=name, hold_s=HOLD_S)
        await hold.lapsed()
        took.append((name, trio.current_time()))
        if len(took) == 1:
            with trio.move_on_after(5 * HOLD_S):
                await hold.keep(lambda: None, Standing())

    async with trio.open_nursery() as nursery:
        for name in ("b", "c", "d"):
            nursery.start_soon(wait, name)
        await trio.sleep(4 * HOLD_S)
        assert len(took) == 1
        assert objects.read(objects.names("hold")[0]) == msgspec.json.encode(Beat(scheduler=took[0][0], hold_s=HOLD_S))
        await trio.sleep(20 * HOLD_S)
    assert sorted(name for name, _ in took) == ["b", "c", "d"]
    assert took[1][1] >= took[0][1] + 5 * HOLD_S
    assert took[2][1] >= took[1][1] + HOLD_S


async def test_a_beat_that_cannot_be_read_lapses_like_any_other(autojump_clock):
    disk = MemoryDisk(seed=1)
    objects = DirectoryObjects(disk, new_id=iter(map(str, range(1000))).__next__)
    theirs, mine = (Hold(objects, VirtualRuntime(1, name), scheduler=name, hold_s=HOLD_S) for name in "ab")
    with trio.move_on_after(1.0):
        await theirs.keep(lambda: None, Standing())
    disk.corrupt(objects.names("hold")[0], 0)
    began = trio.current_time()
    await mine.lapsed()
    assert trio.current_time() == pytest.approx(began + HOLD_S, abs=0.1)


class Contended(DirectoryObjects):
    """Objects of which somebody else makes one at the very moment; `meanwhile` is called once."""

    meanwhile = staticmethod(lambda: None)

    def create(self, name, chunks):
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        super().create(name, chunks)


@pytest.fixture
def store():
    return Contended(MemoryDisk(seed=1), new_id=iter(map(str, range(10000))).__next__)


def hold_of(name, objects):
    return Hold(objects, VirtualRuntime(1, name), scheduler=name, hold_s=HOLD_S)


def holder(objects):
    assert len(objects.names("hold")) == 1
    return hold_of("anybody", objects).look().beat.scheduler


async def test_whoever_starts_has_at_once_what_is_nobodys_or_its_own_and_never_anothers(autojump_clock, store):
    for _ in range(3):
        hold_of("a", store).take()
    assert [store.names("hold"), holder(store)] == [["hold/000000000003"], "a"]
    with pytest.raises(HeldByAnother, match=r"a has it, and loses it once it was silent for 10 s"):
        hold_of("b", store).take()
    await hold_of("b", store).lapsed()
    hold_of("b", store).take()
    with pytest.raises(HeldByAnother, match="b has it"):
        hold_of("a", store).take()


async def test_a_leader_that_starts_again_as_its_hold_lapses_either_has_it_or_stands_by(autojump_clock, store):
    mine, theirs = hold_of("a", store), hold_of("b", store)
    mine.take()
    seen = theirs.look()
    store.meanwhile = lambda: theirs._follow(seen)
    with pytest.raises(HeldByAnother, match="b has it"):
        mine.take()
    assert holder(store) == "b"
    # The other way round: the standby, about to claim it, finds it claimed, and waits for as long as it has to.
    seen = theirs.look()
    store.meanwhile = lambda: hold_of("b", store).take()
    assert not mine._follow(seen)
    assert holder(store) == "b"


async def test_a_claim_that_comes_too_late_counts_for_nothing_although_its_number_is_free_again(autojump_clock, store):
    leader, standby = hold_of("a", store), hold_of("b", store)
    leader.take()
    seen = standby.look()
    for _ in range(2):
        leader.take()
    assert not standby._follow(seen)
    assert [store.names("hold"), holder(store)] == [["hold/000000000003"], "a"]


async def test_a_leader_that_lost_its_hold_watches_it_and_has_it_back_if_nothing_comes_of_the_other(
    autojump_clock, store
):
    leader, other, standing = hold_of("a", store), hold_of("b", store), Standing()
    leader.take()
    await other.lapsed()
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(3 * HOLD_S):
            nursery.start_soon(leader.keep, lambda: None, standing)
            await other.keep(lambda: None, Standing())
        assert holder(store) == "b"
        assert "is another scheduler's" in standing.words()
        await trio.sleep(0.7 * HOLD_S)
        assert holder(store) == "b"
        await trio.sleep(0.8 * HOLD_S)
        assert holder(store) == "a"
        assert standing.words() == ""
        nursery.cancel_scope.cancel()


def test_a_scheduler_that_loses_its_hold_before_its_job_epoch_begins_none(stage):
    stage = stage(rounds=2, data_nodes=1, absent="data-0")

    async def script(stage):
        stage.leader = "standby"
        await stage.said("scheduler: Dataset", "not found yet")
        stage.fabric.stop("scheduler")
        await stage.said("has lapsed")
        stage.start("data-0")
        stage.fabric.go("scheduler")
        await stage.said("role ended", "standby has it")
        await stage.said("standby INFO scheduler: Job finished")
        assert stage.epochs() == [("standby", 1)]

    stage.play(script)
