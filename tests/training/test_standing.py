"""What a training executor does next, told by views and updates that may come in any order."""

from dataclasses import dataclass

import pytest

from hypha.protocol.bridge import FileRef, RoundCommitted, Stop, UpdateArrived, ViewChanged
from hypha.training.standing import (
    UPDATE_WAIT_PUSHES,
    UPDATE_WAIT_S,
    Apply,
    Fetch,
    Finish,
    Outlook,
    Return,
    Train,
    Wait,
    next_move,
)

FILE = FileRef(path="f", bytes=1, digest="f" * 64)


@dataclass
class Round:
    digest: str
    contributed: bool = False
    out: bool = False
    ahead: bool = False
    early: bool = False


def view(number, round_, digest, **more):
    fields = {"member": True, "committed_round": 0, **more}
    return ViewChanged(view=number, round=round_, base_digest=digest * 64, **fields)


def update(round_, base, model, *, close=1):
    parts = (model * 64,)
    return UpdateArrived(
        round=round_, close=close, base_digest=base * 64, model_digest=model * 64, files=(FILE,), parts=parts
    )


def outlook(*events, settled=False):
    seen = Outlook()
    for event in events:
        seen.take(event)
    if settled:
        seen.settle()
    return seen


def kept(**rounds):
    """r1="a" keeps round 1 on base aaa…; an upper-case letter has contributed."""
    return {int(key[1:]): Round(letter.lower() * 64, letter.isupper()) for key, letter in rounds.items()}


@pytest.mark.parametrize(
    ("seen", "have", "here", "move"),
    [
        (outlook(), kept(r1="a"), 1, Train()),
        (outlook(view(1, 1, "a")), kept(r1="a"), 1, Train()),
        (outlook(view(1, 1, "a", member=False)), kept(r1="a"), 1, Wait()),
        (outlook(view(1, 1, "a", member=False), settled=True), kept(r1="a"), 1, Wait()),
        (outlook(view(1, 1, "a")), kept(r1="A"), 1, Wait()),
        (outlook(Stop(reason="cancelled")), kept(r1="a"), 1, Finish("cancelled")),
        (outlook(view(1, 1, "a", final=True)), kept(r1="a"), 1, Finish("the last round is over")),
        (outlook(update(1, "a", "b")), kept(r1="A"), 1, Apply(update(1, "a", "b"))),
        (outlook(update(1, "a", "b")), kept(r1="a"), 1, Apply(update(1, "a", "b"))),
        (outlook(update(1, "z", "b")), kept(r1="A"), 1, Wait()),
        (outlook(update(2, "b", "c")), kept(r1="A"), 1, Wait()),
        (outlook(view(2, 2, "b"), update(1, "a", "b")), kept(r1="A"), 1, Apply(update(1, "a", "b"))),
        (outlook(view(2, 2, "b")), kept(r1="A"), 1, Wait()),
        (outlook(view(2, 1, "z")), kept(r1="a"), 1, Fetch()),
        (outlook(view(2, 1, "a")), kept(r1="A", r2="b"), 2, Return(1)),
        (outlook(view(2, 1, "a"), settled=True), kept(r1="A", r2="b"), 2, Train()),
        (outlook(view(2, 2, "b")), kept(r1="a", r2="b"), 1, Return(2)),
        (outlook(update(1, "a", "b")), kept(r1="A", r2="b"), 2, Train()),
        (outlook(update(1, "a", "c", close=2)), kept(r1="A", r2="b"), 2, Apply(update(1, "a", "c", close=2))),
    ],
)
def test_the_next_move(seen, have, here, move):
    assert next_move(seen, have, here, now=0.0) == move


def test_an_update_that_does_not_come_is_waited_for_only_so_long():
    seen = outlook(view(2, 2, "b"))
    assert next_move(seen, kept(r1="A"), 1, now=100.0) == Wait()
    assert next_move(seen, kept(r1="A"), 1, now=100.0 + UPDATE_WAIT_S - 0.1) == Wait()
    assert next_move(seen, kept(r1="A"), 1, now=100.0 + UPDATE_WAIT_S) == Fetch()


def test_behind_a_slow_link_an_update_is_waited_for_as_long_as_ours_took_twice():
    seen, wait_s = outlook(view(2, 2, "b")), UPDATE_WAIT_PUSHES * 31.0
    seen.push_s = 31.0
    assert next_move(seen, kept(r1="A"), 1, now=100.0) == Wait()
    assert next_move(seen, kept(r1="A"), 1, now=100.0 + wait_s - 0.1) == Wait()
    assert next_move(seen, kept(r1="A"), 1, now=100.0 + wait_s) == Fetch()


def test_older_views_and_lower_closes_change_nothing():
    seen = outlook(view(5, 3, "c"), view(4, 2, "b"), update(3, "c", "e", close=2), update(3, "c", "d", close=1))
    assert (seen.view.round, seen.updates[3].close) == (3, 2)


def test_views_of_a_new_job_epoch_are_newer_whatever_their_number():
    # As a follower that the restarted scheduler adopts: its new round is an earlier one, and it is a member now.
    seen = outlook(view(19, 13, "m", member=False, job_epoch=1))
    seen.settle()
    seen.take(view(2, 12, "l", job_epoch=2))
    assert next_move(seen, kept(r13="m"), 13, now=0.0) == Fetch()
    seen.settle()
    assert next_move(seen, kept(r12="l", r13="m"), 12, now=0.0) == Train()
    seen.take(view(20, 13, "m", member=False, job_epoch=1))
    assert (seen.view.job_epoch, seen.view.round) == (2, 12)


def test_what_is_committed_only_grows():
    seen = outlook(RoundCommitted(round=4, digest="d" * 64), view(9, 5, "d", committed_round=2))
    assert seen.committed == 4


def test_a_round_opened_again_forgets_the_updates_it_had():
    seen = outlook(update(1, "a", "b"), update(2, "b", "c"))
    seen.forget_updates_from(2)
    assert list(seen.updates) == [1]
