"""A parameter server's session, on virtual time: what it sends out, what it serves, and where it starts from."""

from pathlib import Path

import pytest
import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.artifacts import fetch_artifact, serve_artifact
from hypha.protocol import bridge
from hypha.protocol.job import ResumePoint
from hypha.protocol.messages import (
    Accepted,
    Committed,
    FetchModel,
    OuterUpdate,
)
from hypha.worker import aggregator
from hypha.worker.aggregator import KEEP_WAIT_S
from hypha.worker.broadcast import DELIVERY_WAIT_S
from hypha.worker.resume import REFUSALS_MAX
from tests.worker.aggregating_play import BASE, A, B, Caught, Play, opened
from tests.worker.cast import (
    SCHEDULER,
    digest_of,
    fields,
    job_spec,
    member,
    stage,
)


@pytest.fixture
async def play(tmp_path):
    async with stage(tmp_path, peers=(A, B)) as here:
        made = Play(here)
        await made.state()
        yield made


# --- broadcast --------------------------------------------------------------------------------------------------------


class Trainer:
    """Takes outer updates, after as many refusals as the script has."""

    def __init__(self, network) -> None:
        self.took: list[OuterUpdate] = []
        self.script: list[Exception] = []
        self.late_s = self.slow_s = 0.0
        network.accept_streams(OuterUpdate, self._take)

    async def _take(self, stream, header) -> None:
        if self.script:
            raise self.script.pop(0)
        await trio.sleep(self.late_s)
        data = b""
        while piece := await stream.receive_some(1 << 16):
            data += piece
        await trio.sleep(self.slow_s)
        assert digest_of(data) == header.digest
        self.took.append(header)
        await stream.send_message(Accepted(digest=header.digest))


async def test_an_outer_update_reaches_everybody_once_whatever_breaks(autojump_clock, play):
    a, b = Trainer(play.here.peers[A]), Trainer(play.here.peers[B])
    b.script = [Refused("no view yet", "retry"), PeerUnreachable("broken"), RemoteProtocolError("digest")]
    play.see(opened())
    merged = await play.merged()
    await trio.sleep(30)
    assert [fields(header, "round", "close", "digest") for header in a.took] == [(1, 1, merged.update_digest)]
    assert [header.lease_id for header in (*a.took, *b.took)] == ["lease-push-a"] + ["lease-push-b"] * len(b.took)


async def test_a_follower_that_a_view_adds_gets_it_too_and_nobody_after_the_round_has_moved_on(autojump_clock, play):
    a, b = Trainer(play.here.peers[A]), Trainer(play.here.peers[B])
    b.script = [Refused("no view yet", "retry")] * 1000
    play.see(opened())
    merged = await play.merged()
    second = opened(2, round=2, base_digest=merged.model_digest, members=(member(A),))
    play.see(second)
    await trio.sleep(1)
    late = Trainer(await _join(play.here, "push-late"))
    play.see(
        opened(3, round=2, base_digest=merged.model_digest, members=(member(A),), followers=(member("push-late"),))
    )
    await trio.sleep(5)
    assert [header.view for header in late.took] == [3]
    assert len(a.took) == 1
    left = len(b.script)
    await trio.sleep(60)
    assert len(b.script) == left  # who left the view is not bothered any more


async def test_an_update_is_sent_before_the_rest_of_its_merge_is_there_and_only_once(autojump_clock, play):
    a, b = Trainer(play.here.peers[A]), Trainer(play.here.peers[B])
    play.see(opened())
    await play.pushed()
    done = play.done()
    play.session._close(play.close(), SCHEDULER)
    made = bridge.UpdateMade(round=1, close=1, model_digest=done.model.digest, update=done.update)
    await play.session.report(made)
    await trio.sleep(5)
    assert [fields(header, "close", "digest", "model_digest") for header in (*a.took, *b.took)] == [
        (1, done.update.digest, done.model.digest)
    ] * 2
    await play.session.report(done)
    await trio.sleep(5)
    assert (len(a.took), len(b.took)) == (1, 1)


async def test_the_rest_of_a_merge_does_not_disturb_who_is_being_sent_its_update(autojump_clock, play):
    a, b = Trainer(play.here.peers[A]), Trainer(play.here.peers[B])
    a.late_s = b.late_s = 2.0
    play.see(opened())
    await play.pushed()
    done = play.done()
    play.session._close(play.close(), SCHEDULER)
    await play.session.report(bridge.UpdateMade(round=1, close=1, model_digest=done.model.digest, update=done.update))
    await trio.sleep(1)
    await play.session.report(done)
    await trio.sleep(5)
    assert (len(a.took), len(b.took)) == (1, 1)


@pytest.mark.parametrize(
    ("slow_s", "moves_in_s", "answered_after_s"),
    [(0.3, 0.0, 0.3), (30.0, 0.0, KEEP_WAIT_S), (30.0, 2.0, KEEP_WAIT_S + 2.0), (30.0, 9.0, DELIVERY_WAIT_S)],
)
async def test_the_rest_of_a_merge_begins_once_its_update_is_delivered_or_after_a_while(
    slow_s, moves_in_s, answered_after_s, autojump_clock, play, monkeypatch
):
    a, b = Trainer(play.here.peers[A]), Trainer(play.here.peers[B])
    b.slow_s = slow_s
    play.see(opened())
    await play.pushed()
    done = play.done()
    if moves_in_s:
        monkeypatch.setattr(aggregator, "KEEP_BYTES_PER_S", done.update.bytes / moves_in_s)
    play.session._close(play.close(), SCHEDULER)
    began = trio.current_time()
    made = bridge.UpdateMade(round=1, close=1, model_digest=done.model.digest, update=done.update)
    assert await play.session.report(made) == bridge.GoOn()
    assert trio.current_time() - began == pytest.approx(answered_after_s, abs=0.1)
    assert len(a.took) == 1


async def test_a_session_that_is_told_to_stop_does_not_hold_its_executor_up(autojump_clock, play):
    trainers = [Trainer(play.here.peers[each]) for each in (A, B)]
    for each in trainers:
        each.slow_s = 30.0
    play.see(opened())
    await play.pushed()
    done = play.done()
    play.session._close(play.close(), SCHEDULER)
    play.session.stop("it is over")
    began = trio.current_time()
    made = bridge.UpdateMade(round=1, close=1, model_digest=done.model.digest, update=done.update)
    assert await play.session.report(made) == bridge.Finish()
    assert trio.current_time() == began


async def test_an_update_that_a_later_close_has_overtaken_is_sent_to_nobody(autojump_clock, play):
    a, made = Trainer(play.here.peers[A]), play.done()
    play.see(opened())
    await play.pushed()
    play.session._close(play.close(1), SCHEDULER)
    play.session._close(play.close(2, A), SCHEDULER)
    await play.session.report(bridge.UpdateMade(round=1, close=1, model_digest=made.model.digest, update=made.update))
    await trio.sleep(5)
    assert a.took == []
    with pytest.raises(RemoteProtocolError, match="close 3 of round 1 was not asked for"):
        await play.session.report(
            bridge.UpdateMade(round=1, close=3, model_digest=made.model.digest, update=made.update)
        )


@pytest.mark.parametrize(("slow_s", "served_after_s"), [(2.0, 2.0), (30.0, DELIVERY_WAIT_S)])
async def test_what_makes_a_step_durable_is_served_once_the_workers_have_it_or_after_a_while(
    slow_s, served_after_s, autojump_clock, play, tmp_path
):
    a, b = Trainer(play.here.peers[A]), Trainer(play.here.peers[B])
    b.slow_s = slow_s
    play.see(opened())
    began = trio.current_time()
    merged = await play.merged()
    data = await fetched(play, SCHEDULER, wanted(merged.record_digest, "record", 1), tmp_path / "record")
    assert trio.current_time() - began == pytest.approx(served_after_s, abs=0.5)
    assert (len(a.took), len(b.took)) == (1, slow_s < DELIVERY_WAIT_S)
    assert digest_of(data) == merged.record_digest
    again = trio.current_time()
    await fetched(play, SCHEDULER, wanted(merged.update_digest, "update", 1), tmp_path / "update")
    assert trio.current_time() - again < 0.5


async def _join(here, peer_id):
    from tests.worker.cast import _up

    here.peers[peer_id] = await here._nursery.start(_up, here.fabric, peer_id)
    return here.peers[peer_id]


# --- what is held, and where it starts --------------------------------------------------------------------------------


def wanted(digest: str, part: str = "model", round: int = 0) -> FetchModel:
    return FetchModel(job_id="job-1", job_epoch=1, part=part, round=round, digest=digest)


async def fetched(play, peer_id: str, header: FetchModel, path: Path) -> bytes:
    network = play.here.peers[peer_id]
    await fetch_artifact(network, "work", header, path, runtime=play.here.runtime, patience_s=5.0)
    return await play.here.runtime.run_blocking(path.read_bytes)


async def test_files_of_the_job_are_served_to_whoever_works_on_it(autojump_clock, play, tmp_path):
    play.see(opened(1, members=(member(A),)))
    assert await fetched(play, A, wanted(BASE), tmp_path / "a") == b"model 0"
    assert await fetched(play, SCHEDULER, wanted(digest_of(b"v 0"), "momentum"), tmp_path / "s") == b"v 0"
    with pytest.raises(Refused, match="push-b does not work on this job"):
        await fetched(play, B, wanted(BASE), tmp_path / "b")
    with pytest.raises(Refused, match="of round 7 is not held here"):
        await fetched(play, A, wanted(digest_of("x"), round=7), tmp_path / "x")
    (play.directory / "m-0").unlink()
    with pytest.raises(Refused, match="model of round 0 is gone"):
        await fetched(play, A, wanted(BASE), tmp_path / "gone")


async def test_a_commit_lets_go_of_what_could_undo_it(autojump_clock, play):
    play.see(opened())
    merged = await play.merged()
    assert len(play.files()) == 2
    play.session.committed(Committed(job_id="job-1", job_epoch=1, round=1, digest=merged.model_digest), SCHEDULER)
    assert play.files() == []
    assert (await play.ear.next(bridge.RoundCommitted)).digest == merged.model_digest
    with pytest.raises(Refused, match="was committed as"):
        play.session.committed(Committed(job_id="job-1", job_epoch=1, round=1, digest=digest_of("x")), SCHEDULER)


async def test_whoever_joins_after_a_commit_gets_its_model_and_not_the_one_before(autojump_clock, play, tmp_path):
    play.see(opened())
    merged = await play.merged()
    play.session.committed(Committed(job_id="job-1", job_epoch=1, round=1, digest=merged.model_digest), SCHEDULER)
    data = await fetched(play, A, wanted(merged.model_digest, round=1), tmp_path / "after")
    assert digest_of(data) == merged.model_digest
    with pytest.raises(Refused, match="of round 0 is not held here"):
        await fetched(play, A, wanted(BASE), tmp_path / "before")


async def test_a_base_that_is_not_held_fails_the_job(autojump_clock, tmp_path):
    async with stage(tmp_path, peers=(A, B)) as here:
        here._nursery = Caught(here._nursery)
        play = Play(here)
        await play.state()
        play.see(opened(1, round=5, base_digest=digest_of("model 4")))
        await trio.sleep(1)
        assert "view 1 opens round 5" in str(here._nursery.failures)


FILES = {"model": b"model 3", "momentum": b"v 3", "record": b"record 4"}
RESUME = ResumePoint(
    round=3, model_digest=digest_of(b"model 3"), momentum_digest=digest_of(b"v 3"), records=(digest_of(b"record 4"),)
)


class Store:
    """The scheduler's store, reachable after `refusals` refusals."""

    def __init__(self, here, refusals: int) -> None:
        self.asked: list[tuple[str, int]] = []
        self._refusals = refusals
        self._here = here
        here.scheduler.accept_streams(FetchModel, self._serve)

    async def _serve(self, stream, header) -> None:
        self.asked.append((header.part, header.round))
        if len(self.asked) <= self._refusals:
            raise Refused(f"{header.part} is not stored here")
        path = self._here.directory / f"stored-{header.part}"
        path.write_bytes(FILES[header.part])
        await serve_artifact(stream, header, path, size=path.stat().st_size, runtime=self._here.runtime)


async def test_a_resumed_server_fetches_state_and_records_from_the_scheduler(autojump_clock, tmp_path):
    async with stage(tmp_path) as here:
        store = Store(here, refusals=2)
        session = here.aggregate(resume=RESUME)
        resumed = await session.fetch(bridge.FetchResume())
        files = (resumed.model, resumed.momentum, *resumed.records)
        assert [session.file(file.path).read_bytes() for file in files] == [b"model 3", b"v 3", b"record 4"]
        assert (resumed.round, store.asked[2:]) == (3, [("model", 3), ("momentum", 3), ("record", 4)])


async def test_a_store_that_does_not_have_it_is_the_jobs_end(autojump_clock, tmp_path):
    async with stage(tmp_path) as here:
        store = Store(here, refusals=1000)
        with pytest.raises(Refused, match="model is not stored here"):
            await here.aggregate(resume=RESUME).fetch(bridge.FetchResume())
        assert len(store.asked) == REFUSALS_MAX


async def test_what_an_aggregate_executor_may_not_ask_is_refused(autojump_clock, play):
    with pytest.raises(RemoteProtocolError, match="there is no resume point"):
        await play.session.fetch(bridge.FetchResume())
    with pytest.raises(RemoteProtocolError, match="does not fetch FetchBase"):
        await play.session.fetch(bridge.FetchBase())
    with pytest.raises(RemoteProtocolError, match="does not report BaseReady"):
        await play.session.report(bridge.BaseReady(round=1, digest=BASE))
    assert job_spec("aggregate").resume is None
