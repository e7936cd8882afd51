"""A training session between its executor and the scheduler, on virtual time: views, files, samples, reports."""

import pytest
import trio

from hypha.errors import JobFailed, PeerUnreachable, Refused, RemoteProtocolError
from hypha.protocol import bridge
from hypha.protocol.fragments import Streaming
from hypha.protocol.messages import (
    Ack,
    Committed,
    Done,
    Interval,
    NoMore,
    Progress,
    Ready,
    SliceGrant,
    SliceRef,
    SliceRequest,
    SyncAfter,
)
from hypha.telemetry import metrics
from hypha.worker.session import EVENTS_BUFFERED_MAX
from hypha.worker.trainer import TrainSession
from tests.worker.cast import (
    SCHEDULER,
    SERVER,
    Heard,
    digest_of,
    fields,
    job_spec,
    member,
    stage,
)
from tests.worker.training_play import BASE, MODEL, Play, Server, opened


@pytest.fixture
async def play(tmp_path):
    async with stage(tmp_path, peers=(SERVER, "serv-2")) as here:
        yield Play(here)


# --- views ------------------------------------------------------------------------------------------------------------


async def test_a_new_view_is_told_a_known_one_acknowledged_a_stale_one_refused(autojump_clock, play):
    play.see(opened(2))
    play.see(opened(2, deadline_s=5.0))
    with pytest.raises(Refused, match=r"view 1\.1 is older than 1\.2") as stale:
        play.see(opened(1))
    with pytest.raises(Refused, match="job epoch 1 belongs to sched"):
        play.session.observe(opened(3), "other")
    play.see(opened(3, members=(), followers=(member("work"),), final=True))
    await trio.sleep(1)
    assert stale.value.code == "stale"
    assert [fields(event, "view", "member", "final") for event in play.ear.heard] == [
        (2, True, False),
        (3, False, True),
    ]


async def test_events_go_on_after_stop_as_their_end_would_say_that_the_worker_is_gone(autojump_clock, play):
    play.session.stop("enough")
    play.see(opened(1))
    await trio.sleep(1)
    assert play.ear.kinds() == ["Stop", "ViewChanged"]


async def test_addresses_that_cannot_be_believed_do_not_cost_the_view(autojump_clock, play):
    play.see(opened(1, server_addresses=(b"forged" * 10,)))
    await trio.sleep(1)
    assert play.ear.kinds() == ["ViewChanged"]


async def test_a_commit_is_passed_on_from_the_scheduler_of_the_view_alone(autojump_clock, play):
    committed = Committed(job_id="job-1", job_epoch=1, round=1, digest=digest_of("model 1"))
    with pytest.raises(Refused, match="no view has come here yet") as early:
        play.session.committed(committed, SCHEDULER)
    assert early.value.code == "retry"
    play.see(opened())
    play.session.committed(committed, SCHEDULER)
    with pytest.raises(Refused):
        play.session.committed(committed, "other")
    assert (await play.ear.next(bridge.RoundCommitted)).digest == digest_of("model 1")


async def test_an_executor_that_does_not_read_its_events_has_failed(autojump_clock, tmp_path):
    async with stage(tmp_path) as here:
        session = TrainSession(here.context(job_spec()))
        for number in range(1, EVENTS_BUFFERED_MAX + 2):
            session.observe(opened(number), SCHEDULER)
        failure = pytest.RaisesExc(JobFailed, match="does not read its events: 1024 are waiting")
        with pytest.RaisesGroup(failure, flatten_subgroups=True):
            await session.run()
        assert session.failure is not None


# --- fetching ---------------------------------------------------------------------------------------------------------


async def test_the_base_comes_from_a_server_of_the_view(autojump_clock, play):
    play.see(opened())
    fetched = await play.session.fetch(bridge.FetchBase())
    assert (fetched.round, fetched.digest, fetched.files[0].digest, fetched.files[0].bytes) == (
        1,
        BASE,
        BASE,
        len(MODEL),
    )
    assert (play.session.context.directory / fetched.files[0].path).read_bytes() == MODEL


async def test_the_base_is_waited_for_until_there_is_a_view_and_retried_until_it_is_held(autojump_clock, play):
    async def later() -> None:
        await trio.sleep(100)
        play.see(opened(servers=(member("serv-2"), member("gone"))))
        await trio.sleep(20)
        Server(play.here.peers["serv-2"], play.here.runtime, play.here.directory / "held-2")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        assert (await play.session.fetch(bridge.FetchBase())).digest == BASE
    assert play.session.owed.silent_s() == 0


async def test_the_base_follows_the_newest_view_at_once(autojump_clock, play):
    play.server.silent = True
    second = Server(play.here.peers["serv-2"], play.here.runtime, play.here.directory / "held-2")
    play.see(opened(1, round=1, base_digest=digest_of("old")))
    got = []

    async def fetch() -> None:
        got.append(await play.session.fetch(bridge.FetchBase()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        await trio.sleep(2)
        moved = trio.current_time()
        play.see(opened(2, round=3, servers=(member("serv-2"),)))
    assert trio.current_time() - moved < 1  # not the patience of a server that is gone
    assert (got[0].round, got[0].digest, len(second.fetched)) == (3, BASE, 1)
    assert play.files() == [got[0].files[0].path]


async def test_samples_are_asked_for_once_the_round_is_open_and_come_as_a_verified_slice(
    autojump_clock, play, tmp_path
):
    metrics.reset()
    data = b"slice" * 10
    ref = SliceRef(name="s", samples=8, bytes=len(data), digest=digest_of(data), digest_algorithm="blake3")
    (tmp_path / "cache" / ref.digest).write_bytes(data)
    await play.here.cache.open()
    interval = Interval(epoch=0, slice=3, start=2, stop=6)
    asked = Heard(lambda message: SliceGrant(round=message.round, interval=interval, slice=ref))
    play.here.scheduler.serve(SliceRequest, asked)
    play.see(opened(1))
    got = []

    async def fetch() -> None:
        got.append(await play.session.fetch(bridge.FetchSamples(round=2, request=5, wanted=64)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        await trio.sleep(50)
        assert asked == []
        play.see(opened(2, round=2))
    assert fields(asked[0], "round", "request", "wanted", "fence", "lease_id") == (2, 5, 64, 1, "lease-work")
    assert got[0].interval == interval
    assert play.session.file(got[0].path).read_bytes() == data


@pytest.mark.parametrize("answer", [NoMore(round=1), Refused("not a member of view 1")])
async def test_no_samples_where_the_scheduler_has_none(autojump_clock, play, answer):
    play.here.scheduler.serve(SliceRequest, Heard(answer))
    play.see(opened())
    assert await play.session.fetch(bridge.FetchSamples(round=1, request=0, wanted=1)) == bridge.NoSamples(round=1)


async def test_no_samples_once_the_round_has_moved_on_even_while_the_scheduler_is_silent(autojump_clock, play):
    play.see(opened(1))
    play.here.fabric.partition(SCHEDULER, "work")
    got = []

    async def fetch() -> None:
        got.append(await play.session.fetch(bridge.FetchSamples(round=1, request=0, wanted=1)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        await trio.sleep(3)
        moved = trio.current_time()
        play.see(opened(2, round=2))
    assert (got, trio.current_time() - moved < 1) == ([bridge.NoSamples(round=1)], True)


@pytest.mark.parametrize(("overlap_steps", "asked"), [(0, [1, 2]), (1, [1, 1])])
async def test_samples_of_the_next_round_are_asked_for_where_inner_steps_run_ahead(
    autojump_clock, play, overlap_steps, asked
):
    session = play.here.train(job_id="job-2", streaming=Streaming(overlap_steps=overlap_steps))
    views = []

    def none(message):
        views.append(session.view.round)
        return NoMore(round=message.round)

    play.here.scheduler.serve(SliceRequest, Heard(none))
    session.observe(opened(1, job_id="job-2"), SCHEDULER)
    await session.fetch(bridge.FetchSamples(round=1, request=0, wanted=8))
    with trio.move_on_after(5):
        await session.fetch(bridge.FetchSamples(round=2, request=0, wanted=8))
    if not overlap_steps:
        session.observe(opened(2, job_id="job-2", round=2), SCHEDULER)
        await session.fetch(bridge.FetchSamples(round=2, request=0, wanted=8))
    assert views == asked
    with trio.move_on_after(5):
        await session.fetch(bridge.FetchSamples(round=4, request=0, wanted=8))
    assert len(views) == 2


async def test_a_slice_nobody_provides_is_worth_another_question(autojump_clock, play):
    ref = SliceRef(name="s", samples=8, bytes=5, digest="5" * 64)
    interval = Interval(epoch=0, slice=0, start=0, stop=8)
    play.here.scheduler.serve(SliceRequest, Heard(SliceGrant(round=1, interval=interval, slice=ref)))
    play.see(opened())
    with pytest.raises(PeerUnreachable, match="dataset d: nobody provides it"):
        await play.session.fetch(bridge.FetchSamples(round=1, request=0, wanted=1))


async def test_a_training_executor_has_no_resume_point(autojump_clock, play):
    with pytest.raises(RemoteProtocolError, match="fetches the base, nothing else"):
        await play.session.fetch(bridge.FetchResume())


# --- reports ----------------------------------------------------------------------------------------------------------

PROGRESS = bridge.TrainProgress(round=1, batches=3, samples=12, batch_size=4, batch_s=0.5, loss=2.5)


async def test_progress_travels_in_the_background_and_brings_the_newest_instruction(autojump_clock, play):
    heard = Heard(SyncAfter(round=1, batches=8, batch_size=3))
    play.here.scheduler.serve(Progress, heard)
    play.see(opened())
    assert await play.session.report(PROGRESS) == bridge.GoOn()
    await trio.sleep(1)
    assert fields(heard[0], "batches", "samples", "batch_size", "batch_s", "loss", "fence") == (3, 12, 4, 0.5, 2.5, 1)
    assert await play.session.report(PROGRESS) == bridge.SyncAt(round=1, batches=8, batch_size=3)
    heard.answer = Done()
    await play.session.report(PROGRESS)
    await trio.sleep(1)
    assert await play.session.report(PROGRESS) == bridge.Finish()
    assert (await play.ear.next(bridge.Stop)).reason == "the scheduler says that the job is done"


async def test_ready_names_the_model_before_the_round(autojump_clock, play):
    heard = Heard(Ack())
    play.here.scheduler.serve(Ready, heard)
    play.see(opened(1, round=4))
    await play.session.report(bridge.BaseReady(round=4, digest=BASE))
    assert fields(await heard.first(), "round", "digest", "momentum_digest") == (3, BASE, None)


@pytest.mark.parametrize("report", [PROGRESS, bridge.BaseReady(round=1, digest=BASE), bridge.Screened(ticket=1)])
async def test_a_report_out_of_turn_is_refused(autojump_clock, play, report):
    with pytest.raises(RemoteProtocolError):
        await play.session.report(report)


async def test_telemetry_of_an_unknown_kind_is_refused(autojump_clock, play):
    await play.session.telemetry("traces", b"")
    with pytest.raises(RemoteProtocolError, match="traces, metrics or logs, not 'rumours'"):
        await play.session.telemetry("rumours", b"")
