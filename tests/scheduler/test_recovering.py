"""Whoever dies, the job goes on from its last commit; nothing committed is lost, nothing is counted twice.

The simulated cluster checks each commit against a reference model computed from the contributions: that digests agree
is part of `done`.
"""

import pytest
import trio

from hypha.protocol.manifest import JobEpochStarted
from tests.scheduler.stage import Stage

TTL_S = 8.0


@pytest.fixture
def stage(tmp_path):
    """Make a stage in this test's directory."""
    return lambda **options: Stage(tmp_path, **options)


def test_a_restarted_scheduler_adopts_its_workers_and_they_lose_no_step(stage):
    stage = stage(rounds=4)

    async def script(stage):
        await stage.said("Round committed", "round=2")
        before = stage.chain()
        executors = {executor.what.lease_id for worker in stage.workers for executor in worker.executors()}
        await stage.restart("scheduler", after_s=3.0)
        await stage.until(lambda: len(stage.lines("Worker adopted")) == 3)
        started = (await stage.said("scheduler: Job started", "job_epoch=2")).split()
        assert "round=3" in started
        assert f"model_digest={stage.rounds()[1].merged.model_digest}" in started
        assert f"samples_total={sum(entry.samples for entry in stage.rounds())}" in started
        await stage.done()
        assert stage.chain()[: len(before)] == before
        epochs = [entry.job_epoch for entry in stage.chain() if isinstance(entry, JobEpochStarted)]
        assert epochs == [1, 2]
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3, 4]
        # The same leases, the same executors, from the first round to the last.
        assert {each.lease_id for entry in stage.rounds() for each in entry.contributions} <= executors
        assert all(len(entry.contributions) == 2 for entry in stage.rounds())
        assert len(stage.lines("scheduler: Worker leased")) == 3

    stage.play(script)


@pytest.mark.parametrize("at_s", [1.0, 1.3, 2.0, 2.4, 3.1])
def test_a_scheduler_may_die_at_any_moment_of_the_first_rounds(stage, at_s):
    stage = stage(rounds=3)

    async def script(stage):
        await trio.sleep(at_s)
        await stage.restart("scheduler")
        await stage.done()
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3]

    stage.play(script)


def test_leases_that_do_not_answer_any_more_are_replaced(stage):
    stage = stage(rounds=4, spares=1)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        gone = stage.trainers()[0]
        stage.crash_now("scheduler")
        stage.crash_now(gone)
        await stage.until(lambda: not stage.scheduler.is_up)
        stage.start("scheduler")
        await stage.said("Worker not adopted", gone)
        await stage.until(lambda: len(stage.lines("Worker adopted")) == 2)
        assert all(member.peer_id != gone for member in stage.job.book.members)
        stage.start(gone)
        await stage.done()
        assert len(stage.lines("scheduler: Worker leased")) == 4

    stage.play(script)


def test_a_scheduler_that_stays_away_lets_every_lease_expire_and_begins_again(stage):
    stage = stage(rounds=3)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        stage.crash_now("scheduler")
        await trio.sleep(2 * TTL_S)
        assert all(not worker.executors() for worker in stage.workers)
        stage.start("scheduler")
        await stage.until(lambda: len(stage.lines("Worker not adopted")) == 3)
        await stage.said("restored from round 0")
        await stage.done()
        assert [entry.job_epoch for entry in stage.rounds()] == [1, 2, 2]
        assert len(stage.lines("scheduler: Worker leased")) == 6

    stage.play(script)


def test_no_round_closes_while_a_lease_is_still_being_tried(stage):
    stage = stage(rounds=3, quorum=1, ttl_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        slow = stage.trainers()[0]
        stage.crash_now("scheduler")
        stage.fabric.stop(slow)
        await stage.until(lambda: not stage.scheduler.is_up)
        stage.start("scheduler")
        await stage.until(lambda: len(stage.lines("Worker adopted")) == 2)
        await trio.sleep(5.0)
        assert stage.job.waiting == "round 2: 1 leases of the last run are still being tried"
        assert len(stage.rounds()) == 1
        stage.fabric.go(slow)
        await stage.done()
        assert len(stage.rounds()[1].contributions) == 2

    stage.play(script)


def test_a_dead_parameter_server_is_replaced_and_updates_are_sent_again(stage):
    stage = stage(rounds=3, spares=1, deadline_s=60.0, paces=(0.1, 0.1, 2.0, 2.0))

    async def script(stage):
        await stage.said("Round committed", "round=1")
        server = stage.server()
        await stage.until(lambda: len(stage.job.book.accepted()) == 1)
        await trio.sleep(0.3)  # until its sender has been answered, too
        committed = stage.rounds()
        stage.crash_now(server)
        await stage.said("Worker lost", server)
        await stage.said("restored from round")
        await stage.said("Update sent again", "round=2")
        stage.start(server)
        await stage.done()
        assert stage.rounds()[:1] == committed
        assert len(stage.rounds()[1].contributions) == 2

    stage.play(script)


def test_scheduler_and_parameter_server_may_die_together(stage):
    stage = stage(rounds=4, checkpoint_every=3)

    async def script(stage):
        await stage.said("Round committed", "round=2")
        server = stage.server()
        stage.crash_now("scheduler")
        stage.crash_now(server)
        await stage.until(lambda: not stage.scheduler.is_up and not stage.machines[server].is_up)
        stage.start("scheduler")
        stage.start(server)
        await stage.said("state of round 2 restored from round 0")
        await stage.done()
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3, 4]

    stage.play(script)


def test_a_finished_job_that_is_started_again_finishes_at_once(stage):
    stage = stage(rounds=2)

    async def script(stage):
        await stage.scheduler.finished.wait()
        chain = stage.chain()
        await stage.until(lambda: not stage.scheduler.is_up)
        stage.start("scheduler")
        await stage.until(lambda: len(stage.lines("scheduler: Job finished")) == 2)
        assert stage.chain()[: len(chain)] == chain
        assert stage.rounds()[-1].merged.round == 2
        assert len(stage.lines("scheduler: Worker leased")) == 3

    stage.play(script)
