"""No worker is left that could serve parameters but one that trains: it is let go, once a spare has taken its place."""

import pytest
from msgspec.structs import replace

from hypha.worker.config import Config
from tests.scheduler.stage import Stage
from tests.sim.machines import WorkerMachine

# What each can do; the first two are leased when the job begins, so that the second trains.
ABLE = {"worker-0": ("aggregate",), "worker-1": ("train", "aggregate"), "worker-2": ("train",)}


class Specialised(WorkerMachine):
    """A worker with the executors that its name says."""

    def config(self) -> Config:
        config = super().config()
        return replace(config, executors=tuple(each for each in config.executors if each.work in ABLE[self.name]))


@pytest.fixture
def stage(tmp_path):
    """A job of one trainer whose server is to die for good, with a worker that comes when a test starts it."""
    return Stage(tmp_path, worker=Specialised, absent="worker-2", trainers=1, spares=1, rounds=4, quorum=1)


def test_a_trainer_that_could_serve_does_so_once_a_spare_trains_in_its_place(stage):
    async def script(stage):
        await stage.said("Round committed", "round=1")
        assert (stage.trainers(), stage.server()) == (["worker-1"], "worker-0")
        stage.start("worker-2")
        stage.crash_now("worker-0")
        await stage.said("A trainer goes, to be the parameter server", "worker-1")
        await stage.done()
        assert (stage.lines("Worker leased", "worker-2")[0], len(stage.rounds())) == (
            stage.lines("Worker leased", "work=train")[1],
            4,
        )
        assert stage.lines("Worker leased", "worker-1", "work=aggregate")

    stage.play(script)


def test_without_a_spare_the_trainer_stays_and_the_job_waits_for_a_server(stage):
    async def script(stage):
        await stage.said("Round committed", "round=1")
        stage.crash_now("worker-0")
        await stage.until(lambda: len(stage.lines("Advertised", "1 train at", "scheduler")) >= 3)
        assert stage.trainers() == ["worker-1"], stage.lines("Advertised")
        stage.start("worker-0")
        await stage.done()
        assert stage.lines("A trainer goes") == []

    stage.play(script)


async def restarted_without_its_server(stage):
    """The scheduler is another incarnation, which adopts who trains; the server is gone, a further trainer is there."""
    await stage.said("Round committed", "round=1")
    for name in ("scheduler", "worker-0"):
        stage.crash_now(name)
    await stage.until(lambda: not stage.scheduler.is_up and not stage.machines["worker-0"].is_up)
    stage.start("scheduler")
    stage.start("worker-2")


def test_a_restarted_scheduler_that_only_adopted_lets_a_trainer_go_that_may_be_able(stage):
    async def script(stage):
        await restarted_without_its_server(stage)
        # Its offers were heard by the scheduler that is gone.
        await stage.said("Worker adopted", "worker-1")
        await stage.said("A trainer goes, to be the parameter server", "worker-1")
        await stage.done()
        assert stage.lines("Worker leased", "worker-1", "work=aggregate")
        assert len(stage.rounds()) == 4

    stage.play(script)


def test_a_trainer_let_go_for_nothing_is_not_let_go_again(stage, monkeypatch):
    monkeypatch.setitem(ABLE, "worker-1", ("train",))

    async def script(stage):
        await restarted_without_its_server(stage)
        await stage.said("A trainer goes, to be the parameter server", "worker-1")
        before = len(stage.lines("Advertised", "scheduler"))
        await stage.until(lambda: len(stage.lines("Advertised", "scheduler")) > before + 8)
        assert len(stage.lines("A trainer goes")) == 1
        stage.start("worker-0")
        await stage.done()

    stage.play(script)
