"""Jobs under their leases, on virtual time with scripted executors: how each ends, who is told, and what is left."""

from contextlib import aclosing, asynccontextmanager

import pytest
import trio

from hypha.errors import JobFailed, Refused, RemoteProtocolError, StoreError
from hypha.protocol.bridge import ExecutorFailed, Stop
from hypha.protocol.lease import Ledger, Sender
from hypha.protocol.messages import Ack, JobStatus
from hypha.protocol.resources import Resources
from hypha.telemetry import metrics
from hypha.worker.aggregator import AggregateSession
from hypha.worker.config import Config, ExecutorConfig
from hypha.worker.jobs import STOP_GRACE_S, Jobs
from hypha.worker.trainer import TrainSession
from tests.worker.cast import SCHEDULER, STALL_S, TRANSFERS, Heard, job_spec, stage, view

EXECUTOR = ExecutorConfig(work="train", name="x", stall_s=STALL_S)
TTL_S = 30.0
ONE = Resources(cpu=1)


class Scripted:
    """A launcher whose executors do what the test says: `main(what)` returns the exit code."""

    def __init__(self) -> None:
        self.main = self.never
        self.gone: list[str] = []
        self.linger_s = 0.0

    async def never(self, _what):
        await trio.sleep_forever()

    @asynccontextmanager
    async def launch(self, what):
        running = Running()
        async with trio.open_nursery() as nursery:

            async def live() -> None:
                running.code = await self.main(what)
                running.over.set()

            nursery.start_soon(live)
            try:
                yield running
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.sleep(self.linger_s)
                self.gone.append(what.lease_id)


class Running:
    code = None

    def __init__(self) -> None:
        self.over = trio.Event()

    async def wait(self):
        await self.over.wait()
        return self.code

    def last_lines(self):
        return ("second last", "last")


class Play:
    """A worker with one lease, and the scheduler that hears how its job ends."""

    def __init__(self, here) -> None:
        self.here = here
        self.ledger = Ledger(ONE)
        self.launcher = Scripted()
        self.statuses = Heard(Ack())
        self.told = self.statuses.first
        here.scheduler.serve(JobStatus, self.statuses)
        config = Config(
            cert_pem=here.directory, key_pem=here.directory, trust_pem=here.directory, work_dir=here.directory,
            transfers=TRANSFERS,
        )  # fmt: skip
        self.jobs = Jobs(here.network, here.runtime, self.ledger, self.launcher, config, here.cache)

    @property
    def now(self) -> float:
        return self.here.runtime.now()

    @property
    def free(self) -> Resources:
        return self.ledger.free(self.now)

    def sender(self, attempt: int) -> Sender:
        return Sender(peer=SCHEDULER, fence=1, job_epoch=1, attempt=attempt)

    def start(self, work: str = "train", main=None):
        """Grant, accept and dispatch; returns the lease."""
        if main is not None:
            self.launcher.main = main
        self.ledger.grant("lease-1", SCHEDULER, ONE, ttl_s=5, fence=1, now=self.now)
        self.ledger.renew("lease-1", self.sender(1), ttl_s=TTL_S, now=self.now)
        lease = self.ledger.dispatch("lease-1", self.sender(2), "job-1", now=self.now).lease
        self.jobs.start(lease, job_spec(work), EXECUTOR)
        return lease

    def session(self, kind=TrainSession):
        return self.jobs.session("lease-1", kind)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.here.directory.glob("hypha-*"))


@asynccontextmanager
async def play(directory):
    async with stage(directory) as here, trio.open_nursery() as nursery:
        scene = Play(here)
        await nursery.start(scene.jobs.run)
        yield scene
        nursery.cancel_scope.cancel()


async def exits(code):
    return code


async def test_an_executor_that_exits_fails_the_job_with_its_last_lines(autojump_clock, tmp_path, caplog):
    metrics.reset()
    async with play(tmp_path) as scene:

        async def main(what):
            assert (what.directory.stat().st_mode & 0o777, what.threads) == (0o700, 1)
            assert metrics.snapshot()['hypha_active_jobs{work="train"}'] == 1
            await trio.sleep(20)
            return 3

        scene.start(main=main)
        status = await scene.told()
        assert (status.finished, status.reason) == (False, "the executor exited with code 3")
        assert (status.last_lines, status.fence, status.job_epoch) == (("second last", "last"), 1, 1)
        assert (scene.left(), scene.launcher.gone) == ([], ["lease-1"])
        assert scene.ledger.live("lease-1", fence=1, now=scene.now) is not None  # the lease is the scheduler's to end
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == ["Job failed"]
    counted = metrics.snapshot()
    assert counted['hypha_active_jobs{work="train"}'] == 0
    assert counted['hypha_job_duration_count{status="failure",work="train"}'] == 1
    assert counted['hypha_job_duration_sum{status="failure",work="train"}'] == 20


@pytest.mark.parametrize(("code", "said"), [(-9, "was ended by signal 9"), (0, "exited with code 0")])
async def test_an_exit_that_nobody_asked_for_is_a_failure_whatever_its_code(autojump_clock, tmp_path, code, said):
    async with play(tmp_path) as scene:
        scene.start(main=lambda _what: exits(code))
        assert (await scene.told()).reason == f"the executor {said}"


async def test_an_exit_after_the_last_view_is_the_end(autojump_clock, tmp_path, caplog):
    async with play(tmp_path) as scene:

        async def main(what):
            what.session.observe(view(final=True), SCHEDULER)
            return 0

        scene.start(main=main)
        status = await scene.told()
        assert (status.finished, status.reason, status.last_lines) == (True, "finished", ())
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


async def test_the_executors_own_word_is_the_reason(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:

        async def main(what):
            await what.session.report(ExecutorFailed(reason="loss is nan at inner step 7"))
            await trio.sleep_forever()

        scene.start(main=main)
        assert (await scene.told()).reason == "loss is nan at inner step 7"


async def test_a_silent_executor_is_found(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.start()
        scene.ledger.renew("lease-1", scene.sender(3), ttl_s=10 * STALL_S, now=scene.now)
        status = await scene.told()
        assert status.reason == "the executor was silent for 60 s (stall_s = 60)"
        assert STALL_S <= scene.now < STALL_S + 1


async def test_what_does_not_start_fails_the_job(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:

        @asynccontextmanager
        async def launch(_what):
            raise JobFailed("executor '/x' did not start: no such file")
            yield

        scene.launcher.launch = launch
        scene.start()
        status = await scene.told()
        assert (status.reason, status.last_lines) == ("executor '/x' did not start: no such file", ())
        assert scene.left() == []


async def test_a_directory_that_cannot_be_made_fails_the_job(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        (tmp_path / "hypha-job-1-1").write_text("in the way")
        scene.start()
        assert (await scene.told()).reason.endswith("hypha-job-1-1: File exists")


async def test_a_full_disk_fails_the_job_and_the_worker_lives_on(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:

        @asynccontextmanager
        async def launch(what):
            raise StoreError(f"{what.directory}/job.json: No space left on device")
            yield

        works, scene.launcher.launch = scene.launcher.launch, launch
        scene.start()
        assert "job.json: No space left on device" in (await scene.told()).reason
        scene.launcher.launch = works
        scene.ledger.release("lease-1", scene.sender(3), reason="failed", now=scene.now)
        lease = scene.ledger.grant("lease-2", SCHEDULER, ONE, ttl_s=5, fence=2, now=scene.now)
        scene.jobs.start(lease, job_spec(), EXECUTOR)
        await trio.sleep(1)
        assert isinstance(scene.jobs.session("lease-2", TrainSession), TrainSession)


async def test_a_bug_in_a_session_ends_that_job_alone_and_is_logged_with_its_traceback(
    autojump_clock, tmp_path, caplog
):
    async with play(tmp_path) as scene:
        scene.start()
        await trio.sleep(1)

        def broken(*_arguments):
            raise KeyError("view")

        scene.session().outbox._deliver = broken
        scene.session().tell(
            "ready", JobStatus(job_id="j", job_epoch=1, lease_id="l", fence=1, finished=True, reason="")
        )
        assert (await scene.told()).reason == "internal error: KeyError: 'view'"
        assert scene.left() == []
    bug = next(record for record in caplog.records if record.message == "Job hit a bug")
    assert (bug.levelname, bug.exc_info is not None) == ("ERROR", True)


async def test_a_dead_lease_kills_its_job_and_tells_nobody(autojump_clock, tmp_path, caplog):
    async with play(tmp_path) as scene:
        scene.launcher.linger_s = 4.0
        scene.start()
        await trio.sleep(TTL_S + 1)
        (dead,) = scene.ledger.expire(scene.now)
        assert scene.jobs.kill("lease-1", dead.reason)
        await trio.sleep(3)
        assert (scene.free.cpu, scene.left()) == (0, ["hypha-job-1-1"])  # until the group is confirmed gone
        await trio.sleep(2)
        assert (scene.free, scene.left(), scene.launcher.gone) == (ONE, [], ["lease-1"])
        await trio.sleep(60)
        assert scene.statuses == []
        assert not scene.jobs.kill("lease-1", "again")
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


async def test_a_lease_past_its_deadline_has_no_effects_before_any_sweep(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.start()
        await trio.sleep(TTL_S - 0.01)
        assert scene.jobs.sessions("job-1") == [scene.session()]
        await trio.sleep(0.02)
        assert scene.jobs.sessions("job-1") == []
        with pytest.raises(Refused, match="no TrainSession runs here under lease lease-1"):
            scene.session()


async def test_a_cancelled_job_stops_politely(autojump_clock, tmp_path, caplog):
    async with play(tmp_path) as scene:

        async def main(what):
            async with aclosing(what.session.events()) as events:
                assert await anext(events) == Stop(reason="cancelled: enough")
            await trio.sleep(1)
            return 0

        scene.start(main=main)
        await trio.sleep(1)
        scene.jobs.ask_to_stop("lease-1", "cancelled: enough")
        status = await scene.told()
        assert (status.finished, scene.now < 3) == (True, True)
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


async def test_who_does_not_stop_politely_is_killed(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.start()
        await trio.sleep(1)
        scene.jobs.ask_to_stop("lease-1", "cancelled: enough")
        status = await scene.told()
        assert (status.finished, status.reason) == (False, "cancelled: enough")
        assert STOP_GRACE_S <= scene.now - 1 < STOP_GRACE_S + 1


async def test_a_worker_that_leaves_lets_an_executor_end_that_was_told_to(autojump_clock, tmp_path):
    ended = []

    async def main(what):
        async with aclosing(what.session.events()) as events:
            await anext(events)
        await trio.sleep(1)
        ended.append(what.lease_id)
        return 0

    async with play(tmp_path) as scene:
        scene.start(main=main)
        await trio.sleep(1)
        scene.jobs.ask_to_stop("lease-1", "finished")
        await scene.jobs.leave()
        assert (ended, scene.statuses[0].finished) == (["lease-1"], True)


async def test_a_report_is_repeated_while_the_lease_lives(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.here.fabric.partition(SCHEDULER, "work")
        scene.start(main=lambda _what: exits(1))
        await trio.sleep(8)
        assert scene.statuses == []
        scene.here.fabric.heal()
        assert (await scene.told()).reason == "the executor exited with code 1"


async def test_a_scheduler_that_answers_badly_harms_nobody(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.statuses.answer = RemoteProtocolError("what is that")
        scene.start(main=lambda _what: exits(1))
        await trio.sleep(5)
        assert (len(scene.statuses), scene.left()) == (1, [])


async def test_the_scheduler_hears_at_once_that_the_worker_goes(autojump_clock, tmp_path, caplog):
    async with stage(tmp_path) as here:
        scene = Play(here)
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.jobs.run)
            scene.start()
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert [status.reason for status in scene.statuses] == ["the worker is shutting down"]
        assert (scene.left(), scene.launcher.gone) == ([], ["lease-1"])
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


async def test_shutting_down_does_not_wait_for_a_scheduler_that_is_away(autojump_clock, tmp_path):
    async with stage(tmp_path) as here:
        scene = Play(here)
        here.fabric.partition(SCHEDULER, "work")
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.jobs.run)
            scene.start()
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert scene.now <= 2.5


async def test_sessions_are_found_by_lease_kind_job_and_scheduler(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.start("aggregate")
        session = scene.session(AggregateSession)
        assert scene.jobs.sessions("job-1", SCHEDULER) == scene.jobs.sessions("job-1") == [session]
        assert scene.jobs.sessions("job-1", "other") == scene.jobs.sessions("job-2") == []
        with pytest.raises(Refused, match="no TrainSession runs here"):
            scene.session()


async def test_peers_who_wait_in_a_session_are_let_go_when_it_ends(autojump_clock, tmp_path):
    async with play(tmp_path) as scene:
        scene.start()
        await trio.sleep(1)
        session, refused = scene.session(), []

        async def wait() -> None:
            try:
                await session.until(lambda: False)
            except Refused as refusal:
                refused.append((str(refusal), refusal.code))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(1)
            scene.jobs.kill("lease-1", "released")
        assert refused == [("job job-1 is over here", "retry")]
