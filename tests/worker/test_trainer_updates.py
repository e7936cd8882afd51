"""A training session and the parameter servers, on virtual time: pushes, and outer updates that come back."""

import msgspec
import pytest
import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.protocol import bridge
from hypha.protocol.messages import (
    Accepted,
    Ack,
    Message,
    Rebase,
    UpdateRefused,
)
from hypha.telemetry import metrics
from tests.worker.cast import (
    SERVER,
    digest_of,
    fields,
    member,
    stage,
)
from tests.worker.training_play import BASE, UPDATE, Play, Server, opened, outer, send_outer


@pytest.fixture
async def play(tmp_path):
    async with stage(tmp_path, peers=(SERVER, "serv-2")) as here:
        yield Play(here)


# --- pushing ----------------------------------------------------------------------------------------------------------


async def test_an_update_goes_to_the_server_with_what_describes_it(autojump_clock, play):
    metrics.reset()
    play.see(opened(4))
    assert await play.session.send(play.update(samples=3)) == bridge.SendAccepted()
    (push,) = play.server.pushed
    assert fields(push, "view", "round", "fence", "lease_id", "job_epoch") == (4, 1, 1, "lease-work", 1)
    described = push.contribution
    assert (described.peer_id, described.samples, described.base_digest) == ("work", 3, BASE)
    assert (described.digest, described.bytes, push.parts) == (digest_of(b"delta"), 5, ())
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


async def test_an_update_of_the_round_that_an_outer_update_opens_waits_for_its_view(autojump_clock, play):
    play.see(opened(1))
    assert isinstance(await send_outer(play.here.server, outer()), Accepted)
    got = []

    async def send() -> None:
        got.append(await play.session.send(play.update(round=2, base="model 1")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(3)
        assert (got, play.server.pushed) == ([], [])
        play.see(opened(1))  # the same view once more
        await trio.sleep(3)
        assert got == []
        play.see(opened(2, round=2, base_digest=digest_of("model 1")))
    assert got == [bridge.SendAccepted()]
    assert [push.round for push in play.server.pushed] == [2]


async def test_a_round_that_is_open_again_calls_back_who_waits_for_the_next(autojump_clock, play):
    play.see(opened(1))
    await send_outer(play.here.server, outer())
    got = []

    async def send() -> None:
        got.append(await play.session.send(play.update(round=2, base="model 1")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(3)
        play.see(opened(2))
    assert got == [bridge.SendRebase(round=1, base_digest=BASE)]


async def test_a_later_update_takes_the_place_of_one_that_is_under_way(autojump_clock, play):
    play.see(opened(1))
    await send_outer(play.here.server, outer())
    got = []

    async def send(update) -> None:
        got.append((update.round, await play.session.send(update)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, play.update(round=2, base="model 1"))
        await trio.sleep(3)
        nursery.start_soon(send, play.update())
    assert dict(got) == {1: bridge.SendAccepted(), 2: bridge.SendRebase(round=1, base_digest=BASE)}


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
    bad = msgspec.structs.replace(update, files=(msgspec.structs.replace(update.files[0], path=path),))
    with pytest.raises(RemoteProtocolError, match="is not a file inside the work directory"):
        await play.session.send(bad)
    assert play.server.pushed == []


async def test_an_update_before_any_view_breaks_the_protocol(autojump_clock, play):
    with pytest.raises(RemoteProtocolError, match="before there was a view"):
        await play.session.send(play.update())


# --- outer updates ----------------------------------------------------------------------------------------------------


async def test_an_outer_update_is_handed_over_once_and_acknowledged_each_time(autojump_clock, play):
    play.see(opened())
    answers = [await send_outer(play.here.server, outer()) for _ in range(2)]
    assert answers == [Accepted(digest=digest_of(UPDATE))] * 2
    arrived = await play.ear.next(bridge.UpdateArrived)
    assert fields(arrived, "round", "close", "base_digest", "model_digest") == (1, 1, BASE, digest_of("model 1"))
    assert play.session.file(arrived.files[0].path).read_bytes() == UPDATE
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
    assert play.session.file(arrived.files[0].path).read_bytes() == UPDATE
    assert (play.files(), play.ear.kinds()) == ([arrived.files[0].path], ["ViewChanged", "UpdateArrived"])


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
    with pytest.raises(Refused, match="serv-2 does not serve shard 0 in view 1"):
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
