"""A parameter server's session, on virtual time: what is pushed, screened, held, closed and told."""

import pytest
import trio

from hypha.errors import Refused, RemoteProtocolError
from hypha.protocol import bridge
from hypha.protocol.messages import (
    Accepted,
    Merging,
    Message,
    Rebase,
    UpdateRefused,
)
from tests.worker.aggregating_play import BASE, A, B, Caught, Play, opened, push, sent
from tests.worker.cast import (
    SCHEDULER,
    STALL_S,
    digest_of,
    fields,
    member,
    stage,
)


@pytest.fixture
async def play(tmp_path):
    async with stage(tmp_path, peers=(A, B)) as here:
        made = Play(here)
        await made.state()
        yield made


async def test_what_it_holds_is_told_with_its_digests(autojump_clock, play):
    ready = await play.ready.first()
    assert fields(ready, "round", "digest", "momentum_digest", "fence") == (0, BASE, digest_of(b"v 0"), 1)
    with pytest.raises(RemoteProtocolError, match="was ready before"):
        await play.state()


async def test_before_the_state_is_there_views_wait_and_pushes_are_told_to_retry(autojump_clock, tmp_path):
    async with stage(tmp_path, peers=(A, B)) as here:
        play = Play(here)
        play.see(opened(2))
        with pytest.raises(Refused, match="view 1 is older than 2"):
            play.see(opened(1))
        with pytest.raises(Refused, match="the initial state is not here yet") as refusal:
            await sent(here.peers[A], push())
        assert (refusal.value.code, play.ear.kinds()) == ("retry", [])
        await play.state()
        assert (await play.ear.next(bridge.ViewChanged)).view == 2
        assert isinstance(await sent(here.peers[A], push(number=2)), Accepted)


async def test_an_update_is_spooled_screened_held_and_told(autojump_clock, play):
    play.see(opened())
    assert await sent(play.here.peers[A], push()) == Accepted(digest=digest_of(b"delta"))
    await trio.sleep(1)
    assert [len(message.contributions) for message in play.collected] == [0, 1]
    assert fields(play.collected[-1].contributions[0], "peer_id", "samples") == (A, 2)
    assert len(play.files()) == 1
    assert await sent(play.here.peers[A], push()) == Accepted(digest=digest_of(b"delta"))
    await trio.sleep(1)
    assert (len(play.collected), len(play.files())) == (2, 1)  # a repetition is acknowledged, not taken again


async def test_every_change_and_every_view_is_told_again(autojump_clock, play):
    play.see(opened(1))
    await sent(play.here.peers[A], push())
    play.see(opened(2, members=(member(A),)))
    await trio.sleep(1)
    await sent(play.here.peers[A], push())
    assert fields(play.collected[-1], "view", "round") == (2, 1)
    assert len(play.collected[-1].contributions) == 1


async def test_what_is_not_sound_is_refused_by_name_on_both_sides_and_forgotten(autojump_clock, play, caplog):
    play.see(opened())
    play.refusals[1] = "tensor w: not finite at 3 of 10 places"
    answer = await sent(play.here.peers[A], push())
    assert answer == UpdateRefused(reason="tensor w: not finite at 3 of 10 places")
    (refused,) = [record for record in caplog.records if record.message == "Update refused"]
    assert refused.levelname == "WARNING"
    assert vars(refused)["hypha_fields"]["worker"] == A if "hypha_fields" in vars(refused) else A in str(vars(refused))
    assert (play.files(), len(play.collected[-1].contributions)) == ([], 0)


async def test_wrong_bytes_and_broken_streams_leave_nothing_and_may_come_again(autojump_clock, play):
    play.see(opened())
    with pytest.raises(Refused, match="came with digest"):
        await sent(play.here.peers[A], push(), b"delts")
    stream = await play.here.peers[A].open_stream("work", push())
    await stream.send_all(b"del")
    await stream.aclose()
    await trio.sleep(1)
    assert play.files() == []
    assert isinstance(await sent(play.here.peers[A], push()), Accepted)


async def test_another_base_is_told_the_right_one(autojump_clock, play):
    play.see(opened())
    wrong = push(base=digest_of("x"))
    assert await sent(play.here.peers[A], wrong) == Rebase(round=1, base_digest=BASE)


@pytest.mark.parametrize(
    ("header", "said"),
    [(push(round=0), "round 0 is over"), (push("push-a", b"delta"), None), (push("push-c"), "is no member of view 1")],
)
async def test_who_is_no_member_or_too_late_is_refused(autojump_clock, play, header, said):
    play.see(opened())
    peer_id = header.contribution.peer_id
    if peer_id not in play.here.peers:
        header = push(A)
        play.see(opened(2, members=(member(B),)))
        said = "is no member of view 2"
    answer = await sent(play.here.peers[A], header)
    assert answer == Accepted(digest=digest_of(b"delta")) if said is None else said in answer.reason


async def test_a_newer_view_than_ours_means_retry(autojump_clock, play):
    play.see(opened(1))
    with pytest.raises(Refused, match="view 7 is newer than 1 here") as refusal:
        await sent(play.here.peers[A], push(number=7))
    assert refusal.value.code == "retry"


async def test_a_full_disk_fails_the_job_with_the_path(autojump_clock, tmp_path):
    async with stage(tmp_path, peers=(A, B)) as here:
        here._nursery = Caught(here._nursery)
        play = Play(here)
        await play.state()
        play.see(opened())
        await trio.sleep(1)
        (play.directory / "spool" / "1.safetensors.part").symlink_to("/dev/full")
        with pytest.raises(Refused, match=r"the update cannot be stored: .*No space left on device") as refusal:
            await sent(here.peers[A], push())
        await trio.sleep(1)
        assert refusal.value.code == "retry"
        assert "1.safetensors.part: No space left on device" in str(here._nursery.failures)


# --- closing ----------------------------------------------------------------------------------------------------------


async def test_a_close_is_merged_once_and_answered_the_same_again(autojump_clock, play):
    play.see(opened())
    merged = await play.merged()
    assert fields(merged, "round", "close", "base_digest") == (1, 1, BASE)
    assert merged.model_digest == digest_of(b"model 1 1")
    assert await play.session.close_round(play.close(), SCHEDULER) == merged
    (plan,) = [event for event in play.ear.heard if isinstance(event, bridge.Merge)]
    assert [entry.peer_id for entry in plan.inputs] == [A, B]
    await trio.sleep(1)
    assert play.collected[-1].merged == merged


async def test_a_long_merge_is_answered_with_patience(autojump_clock, play):
    play.see(opened())
    for peer_id in (A, B):
        await sent(play.here.peers[peer_id], push(peer_id))
    assert await play.session.close_round(play.close(), SCHEDULER) == Merging(round=1, close=1)
    await play.session.report(bridge.MergeFailed(round=1, close=1, reason="momentum is not finite"))
    with pytest.raises(Refused, match="close 1 cannot be merged: momentum is not finite"):
        await play.session.close_round(play.close(), SCHEDULER)


async def test_a_close_that_names_what_is_not_held_is_refused(autojump_clock, play):
    play.see(opened())
    await sent(play.here.peers[A], push())
    with pytest.raises(Refused, match=r"of push-b \(fence 1\) is not held here"):
        await play.session.close_round(play.close(), SCHEDULER)
    with pytest.raises(Refused, match="job epoch 1 belongs to sched"):
        await play.session.close_round(play.close(1, A), "other")


async def test_an_executor_that_owes_a_merge_is_not_excused_by_other_answers(autojump_clock, play):
    play.see(opened())
    for peer_id in (A, B):
        await sent(play.here.peers[peer_id], push(peer_id))
    await play.session.close_round(play.close(), SCHEDULER)
    await trio.sleep(STALL_S - 10)
    assert play.session.owed.silent_s() >= STALL_S - 10
    await play.session.report(play.done())
    await trio.sleep(10 * STALL_S)
    assert play.session.owed.silent_s() == 0


async def test_a_merge_nobody_asked_for_is_refused(autojump_clock, play):
    play.see(opened())
    with pytest.raises(RemoteProtocolError, match="close 1 of round 1 was not asked for"):
        await play.session.report(play.done())


async def test_evaluations_are_told(autojump_clock, play):
    play.see(opened())
    await play.session.report(bridge.EvaluationDone(round=0, digest=BASE, loss=5.5, samples=64))
    assert fields(await play.evaluated.first(), "round", "loss", "samples") == (0, 5.5, 64)


async def begun(play, peer_id, data=b"delta"):
    """A push whose last byte has not come."""
    stream = await play.here.peers[peer_id].open_stream("work", push(peer_id, data))
    await stream.send_all(data[:-1])
    return stream


async def test_the_executor_may_begin_once_the_last_member_has_begun_to_push(autojump_clock, play):
    play.see(opened())
    assert isinstance(await sent(play.here.peers[A], push(A)), Accepted)
    assert bridge.Prepare not in play.ear.kinds()
    stream = await begun(play, B)
    prepare = await play.ear.next(bridge.Prepare)
    assert fields(prepare, "round", "base_digest") == (1, BASE)
    assert [(one.peer_id, one.samples, one.file.path) for one in prepare.inputs] == [
        (A, 2, "spool/1.safetensors"),
        (B, 2, "spool/2.safetensors"),
    ]
    await trio.sleep(1)
    assert play.files() == ["1.safetensors", "2.safetensors.part"]
    await stream.send_all(b"a")
    await stream.send_eof()
    assert isinstance(await stream.receive_message(Message), Accepted)
    await stream.aclose()
    play.here.start_soon(play.session.close_round, play.close(), SCHEDULER)
    merge = await play.ear.next(bridge.Merge)
    assert merge.inputs == prepare.inputs
    await play.session.report(play.done())


async def test_a_push_that_begins_again_is_foreseen_again(autojump_clock, play):
    play.see(opened())
    assert isinstance(await sent(play.here.peers[A], push(A)), Accepted)
    stream = await begun(play, B)
    await play.ear.next(bridge.Prepare)
    await stream.aclose()
    await trio.sleep(1)
    assert isinstance(await sent(play.here.peers[B], push(B)), Accepted)
    again = await play.ear.next(bridge.Prepare, after=1)
    assert [one.file.path for one in again.inputs] == ["spool/1.safetensors", "spool/3.safetensors"]
