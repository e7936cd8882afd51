"""A training session between its executor, the scheduler and the parameter servers, on virtual time."""

import msgspec
import pytest
import trio

from hypha.errors import JobFailed, PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.artifacts import serve_artifact
from hypha.protocol import bridge
from hypha.protocol.messages import (
    Accepted,
    Ack,
    Committed,
    Done,
    FetchModel,
    Interval,
    Message,
    NoMore,
    OuterUpdate,
    Progress,
    PushUpdate,
    Ready,
    Rebase,
    SliceGrant,
    SliceRef,
    SliceRequest,
    SyncAfter,
    UpdateRefused,
)
from hypha.telemetry import metrics
from hypha.worker.session import EVENTS_BUFFERED_MAX
from hypha.worker.trainer import TrainSession
from tests.worker.cast import (
    SCHEDULER,
    SERVER,
    Heard,
    Listener,
    digest_of,
    fields,
    file_ref,
    job_spec,
    member,
    stage,
    update_of,
    view,
)

MODEL = b"model 0" * 1000
BASE = digest_of(MODEL)
UPDATE = b"update 1" * 1000


def opened(number: int = 1, **changes):
    return view(number, **{"base_digest": BASE, "committed_digest": BASE} | changes)


class Server:
    """A parameter server that holds MODEL and answers pushes by its script."""

    def __init__(self, network, runtime, path) -> None:
        self.script: list[Message | Exception] = []
        self.pushed: list[PushUpdate] = []
        self.fetched: list[FetchModel] = []
        self.silent = False
        self._runtime = runtime
        self._path = path
        path.write_bytes(MODEL)
        network.accept_streams(FetchModel, self._fetch)
        network.accept_streams(PushUpdate, self._push)

    async def _fetch(self, stream, header):
        self.fetched.append(header)
        if self.silent:
            await trio.sleep_forever()
        if header.digest != BASE:
            raise Refused("not held here", "retry")
        await serve_artifact(stream, header, self._path, size=len(MODEL), runtime=self._runtime)

    async def _push(self, stream, header):
        self.pushed.append(header)
        if self.silent:
            await trio.sleep_forever()
        while await stream.receive_some(1 << 16):
            pass
        answer = self.script.pop(0) if self.script else Accepted(digest=header.contribution.digest)
        if isinstance(answer, Exception):
            raise answer
        await stream.send_message(answer)


async def send_outer(network, header: OuterUpdate, data: bytes = UPDATE) -> Message:
    stream = await network.open_stream("work", header)
    try:
        await stream.send_all(data)
        await stream.send_eof()
        return await stream.receive_message(Message)
    finally:
        await stream.aclose()


def outer(**changes) -> OuterUpdate:
    known = {
        "job_id": "job-1", "job_epoch": 1, "view": 1, "round": 1, "lease_id": "lease-work", "close": 1,
        "base_digest": BASE, "model_digest": digest_of("model 1"), "digest": digest_of(UPDATE), "bytes": len(UPDATE),
    }  # fmt: skip
    return OuterUpdate(**known | changes)


class Play:
    def __init__(self, here) -> None:
        self.here = here
        self.server = Server(here.server, here.runtime, here.directory / "held")
        self.session = here.train()
        self.ear = Listener(here, self.session)
        here.network.accept_streams(OuterUpdate, self.session.receive_update)

    def see(self, newest) -> None:
        self.session.observe(newest, SCHEDULER)

    def update(self, **changes):
        return update_of(file_ref(self.session.context.directory, "delta", b"delta"), **{"base": MODEL} | changes)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.session.context.directory.iterdir())


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


# --- fetching ---------------------------------------------------------------------------------------------------------


async def test_the_base_comes_from_a_server_of_the_view(autojump_clock, play):
    play.see(opened())
    fetched = await play.session.fetch(bridge.FetchBase())
    assert (fetched.round, fetched.file.digest, fetched.file.bytes) == (1, BASE, len(MODEL))
    assert (play.session.context.directory / fetched.file.path).read_bytes() == MODEL


async def test_the_base_is_waited_for_until_there_is_a_view_and_retried_until_it_is_held(autojump_clock, play):
    async def later() -> None:
        await trio.sleep(100)
        play.see(opened(servers=(member("serv-2"), member("gone"))))
        await trio.sleep(20)
        Server(play.here.peers["serv-2"], play.here.runtime, play.here.directory / "held-2")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        assert (await play.session.fetch(bridge.FetchBase())).file.digest == BASE
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
    assert (got[0].round, got[0].file.digest, len(second.fetched)) == (3, BASE, 1)
    assert play.files() == [got[0].file.path]


async def test_samples_are_asked_for_once_the_round_is_open_and_come_as_a_verified_slice(
    autojump_clock, play, tmp_path
):
    metrics.reset()
    data = b"slice" * 10
    ref = SliceRef(name="s", samples=8, bytes=len(data), digest=digest_of(data))
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


async def test_a_slice_nobody_provides_is_worth_another_question(autojump_clock, play):
    ref = SliceRef(name="s", samples=8, bytes=5, digest="5" * 64)
    interval = Interval(epoch=0, slice=0, start=0, stop=8)
    play.here.scheduler.serve(SliceRequest, Heard(SliceGrant(round=1, interval=interval, slice=ref)))
    play.see(opened())
    with pytest.raises(PeerUnreachable, match="dataset d: nobody provides it"):
        await play.session.fetch(bridge.FetchSamples(round=1, request=0, wanted=1))


async def test_a_training_executor_has_no_resume_point(autojump_clock, play):
    with pytest.raises(RemoteProtocolError, match="no resume point"):
        await play.session.fetch(bridge.FetchResume())


# --- pushing ----------------------------------------------------------------------------------------------------------


async def test_an_update_goes_to_every_server_with_what_describes_it(autojump_clock, play):
    metrics.reset()
    second = Server(play.here.peers["serv-2"], play.here.runtime, play.here.directory / "held-2")
    play.see(opened(4, servers=(member(SERVER), member("serv-2"))))
    assert await play.session.send(play.update(samples=3)) == bridge.SendAccepted()
    (push,), (again,) = play.server.pushed, second.pushed
    assert fields(push, "view", "round", "fence", "lease_id", "job_epoch") == (4, 1, 1, "lease-work", 1)
    described = push.contribution
    assert (described.peer_id, described.samples, described.base_digest) == ("work", 3, BASE)
    assert (described.digest, described.bytes) == (digest_of(b"delta"), 5)
    assert again.contribution == described
    assert metrics.snapshot()["hypha_gradient_transmission_time_count"] == 1
    await trio.sleep(10_000)
    assert play.session.owed.silent_s() == 0  # it waits for the others, however long


async def test_a_push_is_repeated_on_retry_on_nonsense_and_after_a_break(autojump_clock, play):
    play.server.script = [
        Refused("no view yet", "retry"),
        Ack(),
        PeerUnreachable("broken"),
        RemoteProtocolError("digest"),
    ]
    play.see(opened())
    assert await play.session.send(play.update()) == bridge.SendAccepted()
    assert len(play.server.pushed) == 5


async def test_rebase_and_refusal_reach_the_executor(autojump_clock, play, caplog):
    play.server.script = [Rebase(round=2, base_digest=digest_of("b")), UpdateRefused(reason="w: nan at 3")]
    play.see(opened())
    assert await play.session.send(play.update()) == bridge.SendRebase(round=2, base_digest=digest_of("b"))
    assert await play.session.send(play.update()) == bridge.SendRefused(reason="w: nan at 3")
    await trio.sleep(5)
    assert play.session.owed.silent_s() == 5  # now it is the executor's turn
    assert "Update refused" in [record.message for record in caplog.records]


async def test_an_update_on_another_base_than_the_views_is_not_even_sent(autojump_clock, play):
    play.see(opened(2, round=2, base_digest=digest_of("model 1")))
    answer = await play.session.send(play.update())
    assert answer == bridge.SendRebase(round=2, base_digest=digest_of("model 1"))
    assert play.server.pushed == []


async def test_a_push_to_a_server_that_is_gone_turns_to_its_replacement(autojump_clock, play):
    play.server.silent = True
    second = Server(play.here.peers["serv-2"], play.here.runtime, play.here.directory / "held-2")
    play.see(opened(1))
    got = []

    async def send() -> None:
        got.append(await play.session.send(play.update()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(3)
        play.see(opened(2, servers=(member("serv-2"),)))
    assert (got, trio.current_time() < 100, [push.view for push in second.pushed]) == (
        [bridge.SendAccepted()],
        True,
        [2],
    )


async def test_a_push_ends_with_the_job(autojump_clock, play):
    play.server.silent = True
    play.see(opened(1))
    play.here.start_soon(_stop_later, play.session)
    assert await play.session.send(play.update()) == bridge.SendRefused(reason="the job is over")


async def _stop_later(session) -> None:
    await trio.sleep(3)
    session.stop("cancelled")


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "out", "missing", "loop", "a" * 1000, "nul\x00"])
async def test_only_files_inside_the_work_directory_are_sent(autojump_clock, play, tmp_path, path):
    (tmp_path / "outside").write_text("secret")
    (play.session.context.directory / "out").symlink_to(tmp_path / "outside")
    (play.session.context.directory / "loop").symlink_to("loop")
    play.see(opened())
    update = play.update()
    bad = msgspec.structs.replace(update, file=msgspec.structs.replace(update.file, path=path))
    with pytest.raises(RemoteProtocolError, match="is not a file inside the work directory"):
        await play.session.send(bad)
    assert play.server.pushed == []


async def test_an_update_before_any_view_breaks_the_protocol(autojump_clock, play):
    with pytest.raises(RemoteProtocolError, match="before there was a view"):
        await play.session.send(play.update())


# --- reports ----------------------------------------------------------------------------------------------------------

PROGRESS = bridge.TrainProgress(round=1, batches=3, samples=12, batch_size=4, batch_s=0.5, loss=2.5)


async def test_progress_travels_in_the_background_and_brings_the_newest_instruction(autojump_clock, play):
    heard = Heard(SyncAfter(round=1, batches=8))
    play.here.scheduler.serve(Progress, heard)
    play.see(opened())
    assert await play.session.report(PROGRESS) == bridge.GoOn()
    await trio.sleep(1)
    assert fields(heard[0], "batches", "samples", "batch_size", "batch_s", "loss", "fence") == (3, 12, 4, 0.5, 2.5, 1)
    assert await play.session.report(PROGRESS) == bridge.SyncAt(round=1, batches=8)
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


# --- outer updates ----------------------------------------------------------------------------------------------------


async def test_an_outer_update_is_handed_over_once_and_acknowledged_each_time(autojump_clock, play):
    play.see(opened())
    answers = [await send_outer(play.here.server, outer()) for _ in range(2)]
    assert answers == [Accepted(digest=digest_of(UPDATE))] * 2
    arrived = await play.ear.next(bridge.UpdateArrived)
    assert fields(arrived, "round", "close", "base_digest", "model_digest") == (1, 1, BASE, digest_of("model 1"))
    assert play.session.file(arrived.file.path).read_bytes() == UPDATE
    await trio.sleep(5)
    assert play.ear.kinds() == ["ViewChanged", "UpdateArrived"]
    assert play.session.owed.silent_s() >= 5


async def test_repetitions_that_overlap_do_not_spoil_each_other(autojump_clock, play):
    play.see(opened())

    async def send() -> None:
        assert await send_outer(play.here.server, outer()) == Accepted(digest=digest_of(UPDATE))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(send)
    arrived = await play.ear.next(bridge.UpdateArrived)
    assert play.session.file(arrived.file.path).read_bytes() == UPDATE
    assert (play.files(), play.ear.kinds()) == ([arrived.file.path], ["ViewChanged", "UpdateArrived"])


async def test_a_later_close_of_the_round_is_another_update(autojump_clock, play):
    play.see(opened())
    await send_outer(play.here.server, outer())
    await send_outer(play.here.server, outer(close=2, model_digest=digest_of("model 1b")))
    assert (await play.ear.next(bridge.UpdateArrived, after=1)).close == 2


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"job_epoch": 0}, "refused", "job epoch 0 is over"),
        ({"job_epoch": 2}, "retry", "job epoch 2 is newer"),
        ({"view": 9}, "retry", "view 9 is newer than 1 here"),
        ({"base_digest": digest_of("x")}, "refused", "does not belong to view 1"),
        ({"round": 0}, "refused", "does not belong to view 1"),
        ({"job_id": "job-2"}, "refused", "this lease is for job job-1, not job-2"),
    ],
)
async def test_an_outer_update_that_does_not_match_the_view_is_refused(autojump_clock, play, changes, code, said):
    play.see(opened())
    with pytest.raises(Refused, match=said) as refusal:
        await send_outer(play.here.server, outer(**changes))
    assert (refusal.value.code, play.files()) == (code, [])


async def test_an_outer_update_from_whoever_serves_no_parameters_is_refused(autojump_clock, play):
    play.see(opened())
    with pytest.raises(Refused, match="serv-2 serves no parameters in view 1"):
        await send_outer(play.here.peers["serv-2"], outer())


async def test_a_view_that_changes_under_way_makes_the_update_stale(autojump_clock, play):
    play.see(opened(1))
    stream = await play.here.server.open_stream("work", outer())
    await stream.send_all(UPDATE[:100])
    await trio.sleep(1)
    play.see(opened(2, round=5, base_digest=digest_of("model 4")))
    await stream.send_all(UPDATE[100:])
    await stream.send_eof()
    with pytest.raises(Refused, match="outer step 1 does not belong to view 2 of round 5"):
        await stream.receive_message(Message)
    await stream.aclose()
    assert (play.files(), play.ear.kinds()) == ([], ["ViewChanged", "ViewChanged"])


async def test_wrong_bytes_leave_nothing(autojump_clock, play):
    play.see(opened())
    with pytest.raises(Refused, match="came with digest"):
        await send_outer(play.here.server, outer(), UPDATE[:-1] + b"?")
    assert play.files() == []
    assert await send_outer(play.here.server, outer()) == Accepted(digest=digest_of(UPDATE))
