"""A scheduler leads its job: staffs it, closes its rounds, journals first, commits, and says why it waits."""

import copy

import pytest
import trio

from hypha.errors import Refused
from hypha.protocol.auction import OfferConfig
from hypha.protocol.codec import decode
from hypha.protocol.messages import Progress, SliceGrant, SliceRequest
from hypha.scheduler.records import Granted, LeaseEnded, LeaseHeld, Record
from hypha.scheduler.service import GOODBYE_S
from hypha.store.blobs import Artifact, Blobs
from hypha.store.journal import open_journal
from hypha.worker.broadcast import DELIVERY_WAIT_S
from tests.scheduler.stage import Stage
from tests.sim.machines import WorkerMachine

TTL_S = 8.0


class DearMachine(WorkerMachine):
    """Leases the whole machine, for much."""

    def config(self):
        config = super().config()
        return type(config)(
            **{
                **{name: getattr(config, name) for name in config.__struct_fields__},
                "offer": OfferConfig(strategy="whole", price=140.0),
            }
        )


def journal(stage, *, disk=None):
    """What the journal holds, read as a restarted process would."""
    copied = copy.deepcopy(disk or stage.scheduler.disk)
    copied.crash()
    with open_journal(copied, "journal", label=stage.config_name(), record_type=Record) as found:
        return list(found.records)


@pytest.fixture
def stage(tmp_path):
    """Make a stage in this test's directory."""

    def make(**options):
        made = Stage(tmp_path, **options)
        made.config_name = lambda: made.scheduler.config.scheduler.job.name
        return made

    return make


def test_a_job_runs_to_its_end_and_leaves_what_it_made(stage):
    stage = stage(rounds=3, checkpoint_every=2)

    async def script(stage):
        await stage.done()
        rounds = stage.rounds()
        assert [entry.merged.round for entry in rounds] == [1, 2, 3]
        assert stage.job.book.samples == sum(entry.samples for entry in rounds) > 0
        assert sorted(stage.job.progress.held_out) == [0, 1, 2, 3]
        blobs = Blobs(stage.scheduler.objects)
        # Two checkpoints stay, and the records that lead from the older of them to the end.
        assert [artifact.round for artifact in blobs.artifacts("record")] == [3]
        blobs.verify(Artifact(kind="record", round=3, digest=rounds[-1].merged.record_digest))
        blobs.verify(Artifact(kind="model", round=3, digest=rounds[-1].merged.model_digest))
        blobs.verify(Artifact(kind="momentum", round=3, digest=rounds[-1].merged.momentum_digest))
        assert {artifact.round for artifact in blobs.artifacts("model")} == {2, 3}
        assert all(not worker.worker.ledger.leases(worker.runtime.now()) for worker in stage.workers)

    stage.play(script)


def test_at_the_end_every_executor_exits_by_itself_and_its_worker_says_so(stage):
    stage = stage(rounds=2)

    async def script(stage):
        await stage.done()
        assert len(stage.lines("Job ended", "reason=finished")) == 3
        assert len(stage.lines("Worker done", "reason=finished")) == 3
        assert len(stage.lines("Job ended")) == 3

    stage.play(script)


def test_an_executor_that_does_not_exit_at_the_end_holds_nobody_up(stage):
    stage = stage(rounds=2, evaluate_every=0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        silent = stage.trainers()[0]
        await stage.said("Round committed", "round=2")
        for executor in stage.machines[silent].executors():
            executor.fail("stall")
        over = trio.current_time()
        await stage.said("Job finished")
        assert trio.current_time() - over < GOODBYE_S + 1.0
        await stage.done()

    stage.play(script)


def test_the_job_starts_with_min_workers_and_takes_more_when_they_come(stage):
    stage = stage(trainers=3, rounds=6, deadline_s=30.0, absent="worker-0", resources={"min_workers": 2, "find_s": 5.0})

    async def script(stage):
        await stage.said("Round committed", "round=2", "contributors=2")
        assert "1 of 3 train workers" not in stage.job.standing.words()
        assert "0 of 1 train workers" in stage.job.standing.words()
        assert "0 of 1 train workers" in (await stage.health()).detail["waiting"]
        stage.start("worker-0")
        await stage.said("Round committed", "contributors=3")
        assert stage.job.standing.words() == ""
        await stage.done()

    stage.play(script)


def test_below_min_workers_the_job_fails_with_numbers_and_nobody_stays_leased(stage):
    stage = stage(trainers=3, absent="worker-0", resources={"min_workers": 3, "find_s": 12.0})

    async def script(stage):
        assert await stage.failed() == (
            "the job failed: the job found too few workers in 12 s: 0 of 1 aggregate workers; workers connected: 3"
        )
        await trio.sleep(TTL_S)
        assert all(not w.worker.ledger.leases(w.runtime.now()) for w in stage.workers if w.is_up)
        assert stage.chain()[-1].job_epoch == 1

    stage.play(script)


def test_below_min_workers_a_running_job_waits_and_says_so(stage):
    stage = stage(trainers=3, rounds=4, deadline_s=5.0, resources={"min_workers": 3})

    async def script(stage):
        await stage.said("Round committed", "round=1")
        gone = stage.trainers()[0]
        stage.crash_now(gone)
        await stage.said("Worker lost", gone)
        await trio.sleep(20.0)
        assert len(stage.rounds()) <= 2
        reason = f"round {len(stage.rounds()) + 1}: 2 of 3 workers without which the job waits"
        assert stage.job.waiting == reason
        assert reason in (await stage.health()).detail["waiting"]
        stage.start(gone)
        await stage.done()
        assert len(stage.rounds()) == 4

    stage.play(script)


def test_a_dear_offer_is_named_as_the_reason(stage):
    stage = stage(worker=DearMachine, resources={"find_s": 6.0, "worker_price": {"bid": 100.0, "max": 120.0}})

    async def script(stage):
        assert "best refused offer 140 > max 120" in await stage.failed()

    stage.play(script)


def test_a_dataset_that_nobody_provides_is_named(stage):
    stage = stage(data_nodes=0, resources={"find_s": 60.0})

    async def script(stage):
        await stage.said("not found yet")
        assert "not found yet" in (await stage.health()).detail["waiting"]
        assert "nobody provides dataset" in await stage.failed()

    stage.play(script)


def test_a_dead_trainer_is_replaced_and_its_samples_return(stage):
    stage = stage(trainers=2, spares=1, rounds=4, ttl_s=TTL_S)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        dead = stage.trainers()[0]
        lease = next(w.member for w in stage.job.pool.live() if w.member.peer_id == dead)
        view = stage.job.view()
        assert lease in view.members
        stage.crash_now(dead)
        await stage.said("Worker lost", dead)
        assert lease not in stage.job.view().members
        assert stage.job.view().view > view.view
        assert stage.job.book.table.held(lease, stage.job.book.round) == () or stage.job.scribe._excluded
        await stage.until(lambda: len(stage.trainers()) == 2)
        stage.start(dead)
        await stage.done()
        ended = [record.member for record in journal(stage) if isinstance(record, LeaseEnded)]
        held = [record.member for record in journal(stage) if isinstance(record, LeaseHeld)]
        assert lease in ended
        assert lease in held
        assert len(held) == 4

    stage.play(script)


def test_a_round_closes_at_its_deadline_with_the_quorum(stage):
    stage = stage(trainers=2, rounds=2, quorum=1, deadline_s=10.0, ttl_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        silent = stage.trainers()[0]
        stage.crash_now(silent, silent=True)
        opened = trio.current_time()
        line = await stage.said("Round committed", "round=2")
        assert "contributors=1" in line
        # The server lets the update go out to the silent one before the record does, as long as that may take.
        assert 9.0 < trio.current_time() - opened < 12.0 + DELIVERY_WAIT_S
        assert not stage.lines("Worker lost")

    stage.play(script)


def test_a_round_stays_open_below_the_quorum_and_says_who_is_missing(stage):
    stage = stage(trainers=2, rounds=2, quorum=2, deadline_s=5.0, ttl_s=60.0)

    async def script(stage):
        await stage.said("Round committed", "round=1")
        silent = stage.trainers()[0]
        stage.crash_now(silent, silent=True)
        await trio.sleep(30.0)
        assert len(stage.rounds()) == 1
        reason = f"round 2: 1 of 2 contributions that the quorum asks; waiting for {silent}; past its deadline"
        assert stage.job.waiting == stage.job.standing.reason("round") == reason
        assert (await stage.health()).detail["waiting"] == reason
        # Said once, not once per turn of a loop.
        assert len(stage.lines(reason)) == 1
        stage.start(silent)
        await stage.done()
        assert len(stage.rounds()) == 2

    stage.play(script)


def test_executors_that_keep_failing_fail_the_job_with_their_last_words(stage):
    stage = stage(trainers=2)

    async def script(stage):
        while stage.broken is None:
            await stage.until(lambda: stage.broken is not None or any(w.executors() for w in stage.workers))
            for worker in stage.workers:
                for executor in worker.executors():
                    executor.fail("exit")
            await trio.sleep(0.2)
        assert "6 executors failed in a row" in str(stage.broken)
        assert "the executor was ended by signal 9" in str(stage.broken)

    stage.play(script)


def test_no_grant_leaves_before_it_is_in_the_journal(stage):
    stage = stage(rounds=2, samples=16)
    seen = []

    def look(asker, answerer, request, reply):
        message, answer = decode(request), decode(reply)
        if isinstance(message, SliceRequest) and isinstance(answer, SliceGrant):
            written = [record.grant.interval for record in journal(stage) if isinstance(record, Granted)]
            seen.append(answer.interval in written)

    stage.fabric.on_answer(look)
    stage.play(lambda stage: stage.done())
    assert len(seen) >= 4
    assert all(seen)


def test_a_commit_and_the_journal_wait_for_a_full_disk_and_say_so_once(stage):
    stage = stage(rounds=4, deadline_s=60.0)

    async def script(stage):
        await stage.said("Round opened", "round=2")
        disk = stage.scheduler.disk
        disk.capacity_bytes = disk.used_bytes()
        await stage.said("The job's store cannot be written")
        await stage.said("The journal cannot be written")
        await trio.sleep(20.0)
        assert stage.rounds() == []
        assert "The job's store cannot be written" in (await stage.health()).detail["waiting"]
        assert len(stage.lines("The journal cannot be written")) == 1
        assert len(stage.lines("The job's store cannot be written")) == 1
        disk.capacity_bytes = None
        await stage.said("The job's store can be written again")
        await stage.done()
        assert len(stage.rounds()) == 4
        assert stage.job.standing.words() == ""

    stage.play(script)


def test_an_outer_step_whose_record_died_with_its_server_is_made_again(stage):
    stage = stage(rounds=3, spares=1)

    async def script(stage):
        await stage.said("Round opened", "round=2")
        assert not stage.rounds()
        server = stage.server()
        stage.crash_now(server, silent=True)
        await stage.said("Outer step lost", "round=1")
        stage.start(server)
        await stage.done()
        assert [entry.merged.round for entry in stage.rounds()] == [1, 2, 3]
        assert len(stage.lines("scheduler: Round opened", "round=1")) == 2

    stage.play(script)


def test_what_an_older_epoch_says_has_no_effect(stage):
    stage = stage(rounds=3)

    async def script(stage):
        await stage.said("Round opened", "round=2")
        await stage.restart("scheduler")
        await stage.until(lambda: len(stage.lines("Worker adopted")) == 3)
        member = sorted(stage.job.book.members)[0]
        fields = {
            "job_id": stage.job.book.terms.job_id,
            "job_epoch": 1,
            "round": stage.job.book.round,
            "lease_id": member.lease_id,
            "fence": member.fence,
        }
        network = stage.network(member.peer_id)
        with pytest.raises(Refused, match="job epoch 2 has begun"):
            await network.request("scheduler", SliceRequest(**fields, request=99, wanted=1))
        progress = Progress(**fields, batches=1, samples=4, batch_size=4, batch_s=0.1, loss=1.0)
        with pytest.raises(Refused, match="job epoch 1 is over; 2 has begun"):
            await network.request("scheduler", progress)
        with pytest.raises(Refused, match="is not held here"):
            await network.request("scheduler", SliceRequest(**fields | {"fence": 1 << 40}, request=99, wanted=1))
        await stage.done()

    stage.play(script)
