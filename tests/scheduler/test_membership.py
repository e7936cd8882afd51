"""Workers come and go while a job runs: politely on the way out, up to `max_workers` on the way in."""

import pytest
import trio

from hypha.protocol.messages import Health
from tests.scheduler.stage import Stage
from tests.sim.machines import WorkerMachine

TTL_S = 30.0


@pytest.fixture
def stage(tmp_path):
    """Make a stage in this test's directory."""
    return lambda **options: Stage(tmp_path, **options)


def ask_to_leave(stage, name):
    """What SIGTERM does to a worker."""
    machine = stage.machines[name]
    assert isinstance(machine, WorkerMachine)
    machine.stopping.set()


def contributors(entry):
    return {contribution.peer_id: contribution.samples for contribution in entry.contributions}


def test_a_trainer_that_is_told_to_stop_contributes_what_it_has_and_is_replaced_at_once(stage):
    stage = stage(trainers=2, spares=1, rounds=4, samples=64, ttl_s=TTL_S, deadline_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        leaver = stage.trainers()[0]
        await stage.until(lambda: any(member.peer_id == leaver for member in stage.job.pace._paces))
        told = trio.current_time()
        ask_to_leave(stage, leaver)
        await stage.said("Worker left", leaver)
        await stage.until(lambda: not stage.machines[leaver].is_up)
        assert trio.current_time() - told < 5.0
        await stage.until(lambda: len(stage.trainers()) == 2)
        assert trio.current_time() - told < 8.0
        await stage.said("Round committed", "round=2")
        assert contributors(stage.rounds()[1])[leaver] > 0
        assert not stage.lines("Executor failed")
        assert not stage.lines("Lease expired")
        stage.start(leaver)
        await stage.done()

    stage.play(script)


def test_a_parameter_server_that_is_told_to_stop_is_replaced_at_once(stage):
    stage = stage(trainers=2, spares=1, rounds=4, samples=64, ttl_s=TTL_S, deadline_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        leaver = stage.server()
        told = trio.current_time()
        ask_to_leave(stage, leaver)
        await stage.said("Worker left", leaver)
        await stage.until(lambda: not stage.machines[leaver].is_up and bool(stage.working("aggregate")))
        assert trio.current_time() - told < 8.0
        assert stage.server() != leaver
        stage.start(leaver)
        await stage.done()
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3, 4]

    stage.play(script)


@pytest.mark.parametrize("at_s", [0.6, 1.1, 1.7, 2.3, 2.9, 3.4])
@pytest.mark.parametrize("work", ["train", "aggregate"])
def test_a_worker_may_leave_at_any_moment_and_come_back(stage, work, at_s):
    stage = stage(trainers=2, spares=1, rounds=4, ttl_s=TTL_S, deadline_s=60.0, seed=round(at_s * 10))

    async def script(stage):
        await trio.sleep(at_s)
        leaver = stage.working(work)[0].name if stage.working(work) else "worker-1"
        ask_to_leave(stage, leaver)
        await stage.until(lambda: not stage.machines[leaver].is_up)
        stage.start(leaver)
        await stage.done()
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3, 4]
        assert not stage.lines("Executor failed")

    stage.play(script)


def test_an_executor_that_gives_nothing_keeps_its_worker_only_for_a_moment(stage):
    stage = stage(trainers=2, rounds=3, samples=64, ttl_s=TTL_S, deadline_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        leaver = stage.trainers()[0]
        for executor in stage.machines[leaver].executors():
            executor.fail("stall")
        told = trio.current_time()
        ask_to_leave(stage, leaver)
        await stage.until(lambda: not stage.machines[leaver].is_up)
        assert trio.current_time() - told < 8.0
        stage.start(leaver)
        await stage.done()

    stage.play(script)


def test_a_running_job_takes_whoever_comes_up_to_max_workers(stage):
    stage = stage(trainers=2, spares=1, rounds=12, deadline_s=30.0, absent="worker-0", resources={"max_workers": 3})

    async def script(stage):
        await stage.said("Round committed", "contributors=2")
        stage.start("worker-0")
        await stage.said("Round committed", "contributors=3")
        joined = next(entry for entry in stage.rounds() if len(entry.contributions) == 3)
        assert joined.merged.round > 1
        assert len(stage.trainers()) == 3
        assert stage.job.standing.words() == ""
        await stage.done()
        assert max(len(entry.contributions) for entry in stage.rounds()) == 3

    stage.play(script)


def test_somebody_missing_is_not_kept_waiting_by_the_wish_for_more(stage):
    stage = stage(
        trainers=2, rounds=12, samples=64, ttl_s=5.0, deadline_s=30.0, resources={"max_workers": 8, "min_workers": 2}
    )

    async def script(stage):
        await stage.said("Round committed", "round=1")
        leaver = stage.trainers()[0]
        advertised = len(stage.lines("Advertised", "asks=6 train at"))
        await stage.until(lambda: len(stage.lines("Advertised", "asks=6 train at")) > advertised)
        told = trio.current_time()
        ask_to_leave(stage, leaver)
        await stage.said("Worker left", leaver)
        await stage.said("Advertised", "asks=1 train at")
        assert trio.current_time() - told < 3.0
        await stage.until(lambda: not stage.machines[leaver].is_up)
        stage.start(leaver)
        await stage.done()

    stage.play(script)


def test_more_than_max_workers_are_not_taken(stage):
    stage = stage(trainers=2, spares=3, rounds=8, deadline_s=30.0, resources={"max_workers": 3})

    async def script(stage):
        await stage.said("Round committed", "contributors=3")
        await stage.done()
        assert {len(entry.contributions) for entry in stage.rounds()} <= {2, 3}
        assert len(stage.lines("Worker leased", "work=train")) == 3

    stage.play(script)


@pytest.mark.parametrize("after_s", [0.9, 4.0], ids=["while the auction ends", "between two auctions"])
def test_a_worker_that_comes_while_one_is_missing_is_asked_at_once(stage, after_s):
    late = "worker-3"
    stage = stage(trainers=2, spares=1, absent=late, rounds=30, samples=64, ttl_s=6.0, deadline_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        stage.crash_now(stage.trainers()[0])
        # By now it asks every half minute only, and has just done so.
        await stage.until(lambda: len(stage.lines("Advertised")) == 8)
        await trio.sleep(after_s)
        assert len(stage.trainers()) == 1
        stage.start(late)
        await stage.until(lambda: stage.machines[late].is_up and stage.machines[late].worker is not None)
        came = trio.current_time()
        # In a real network everybody who listens to the advertisements is connected sooner or later.
        await stage.network(late).request("scheduler", Health())
        await stage.until(lambda: late in stage.trainers())
        assert trio.current_time() - came < 4.0
        await stage.done()

    stage.play(script)
