"""Samples of the round after the open one: who gets them, and what becomes of them when either round ends otherwise."""

from msgspec.structs import replace

from hypha.protocol.closing import Close, Outcome
from hypha.protocol.messages import SliceRef
from hypha.protocol.slices import Grant, Later, SliceTable
from tests.protocol.round_book import SLICES, A, B, S, book, close_round, contribution, merged, report, train


def ahead(*members, samples=40, **options):
    table = SliceTable([SliceRef(name="s0", samples=samples, bytes=1, digest="0" * 64)])
    rounds = book(*members, table=table, **options)
    rounds.terms = replace(rounds.terms, ahead=True)
    return rounds


def close(rounds, model="1"):
    decided = rounds.decide(99.0)
    assert isinstance(decided, Close)
    assert isinstance(rounds.merged(S, merged(decided, model), 0.0), Outcome)


def test_only_the_next_round_is_ahead_and_only_where_the_job_says_so():
    rounds = ahead(A)
    assert [rounds.is_ahead(round) for round in (0, 1, 2, 3)] == [False, False, True, False]
    assert not book(A).is_ahead(2)


def test_a_member_with_samples_of_the_open_round_gets_some_of_the_next():
    rounds = ahead(A)
    first = rounds.grant(A, request=0, wanted=4)
    after = rounds.grant(A, request=0, wanted=4, ahead=True)
    assert (first.start, first.stop, after.start, after.stop) == (0, 4, 4, 8)
    assert (rounds.table.held(A, 1), rounds.table.held(A, 2)) == ((first,), (after,))
    assert rounds.grant(A, request=0, wanted=4, ahead=True) == after


def test_nobody_starves_in_the_open_round_for_samples_of_the_next():
    rounds = ahead(A, B)
    train(rounds, A)
    assert isinstance(rounds.grant(B, request=0, wanted=4, ahead=True), Later)
    rounds.grant(B, request=0, wanted=4)
    assert rounds.grant(B, request=0, wanted=4, ahead=True).samples == 4


def test_nothing_is_granted_beyond_the_last_round():
    rounds = ahead(A, updates=1)
    train(rounds, A)
    assert isinstance(rounds.grant(A, request=0, wanted=4, ahead=True), Later)


def test_what_was_granted_ahead_is_contributed_once_its_round_is_open():
    rounds = ahead(A)
    train(rounds, A)
    after = rounds.grant(A, request=0, wanted=8, ahead=True)
    close(rounds)
    assert rounds.committed(1) == ()
    assert rounds.grant(A, request=0, wanted=8) == after, "the same request, the same samples"
    assert report(rounds, contribution(rounds, A, after)) == ()
    close(rounds, "2")
    rounds.committed(2)
    assert rounds.table.samples_used == 12
    assert rounds.samples == 12


def test_a_round_that_closes_without_its_member_returns_that_rounds_samples_only():
    rounds = ahead(A, B)
    lost = rounds.grant(A, request=0, wanted=4)
    train(rounds, B)
    after = rounds.grant(A, request=0, wanted=4, ahead=True)
    close(rounds)
    assert rounds.committed(1) == (lost,)
    assert rounds.table.held(A, 2) == (after,)
    assert report(rounds, contribution(rounds, A, after)) == ()
    assert ("a", 1) in rounds.accepted()


def test_a_contribution_of_the_next_round_is_not_taken_for_one_of_the_open():
    rounds = ahead(A)
    train(rounds, A)
    after = rounds.grant(A, request=0, wanted=4, ahead=True)
    (exclude,) = report(rounds, contribution(rounds, B, after))
    assert "is not assigned to lease lease-b in round 1" in exclude.reason
    assert rounds.table.held(A, 2) == (after,)


def test_a_round_that_is_lost_leaves_what_was_granted_ahead_assigned_and_it_is_given_again():
    rounds = ahead(A)
    train(rounds, A)
    after = rounds.grant(A, request=0, wanted=4, ahead=True)
    close(rounds)
    assert rounds.lost(1, 0.0) == ()
    assert (rounds.round, rounds.table.held(A, 2)) == (1, (after,))
    assert rounds.grant(A, request=0, wanted=4, ahead=True) == after
    close(rounds)
    rounds.committed(1)
    assert rounds.grant(A, request=0, wanted=4) == after


def test_a_dead_lease_loses_what_it_had_of_both_rounds_but_for_what_it_contributed():
    rounds = ahead(A, B, quorum=2)
    (given,) = train(rounds, A)
    after = rounds.grant(A, request=0, wanted=4, ahead=True)
    (exclude,) = rounds.lease_died(A)
    assert (exclude.member, exclude.round) == (A, 2)
    assert rounds.table.held(A, 2) == (after,), "until that is journaled"
    assert rounds.excluded(exclude) == (after,)
    assert rounds.table.held(A, 1) == given.intervals
    train(rounds, B)
    close(rounds)


def test_a_dead_lease_without_a_contribution_is_excluded_from_both_rounds():
    rounds = ahead(A, B)
    rounds.grant(A, request=0, wanted=4)
    rounds.grant(A, request=0, wanted=4, ahead=True)
    assert [(exclude.member, exclude.round) for exclude in rounds.lease_died(A)] == [(A, 1), (A, 2)]


def test_at_the_end_of_an_epoch_the_next_begins_only_after_what_was_granted_ahead_is_used():
    rounds = ahead(A, samples=8)
    train(rounds, A)
    after = rounds.grant(A, request=0, wanted=8, ahead=True)
    assert after.samples == 4
    assert isinstance(rounds.grant(A, request=1, wanted=4, ahead=True), Later)
    close(rounds)
    rounds.committed(1)
    assert rounds.table.epoch == 0
    assert rounds.grant(A, request=1, wanted=4) is None
    report(rounds, contribution(rounds, A, after))
    close(rounds, "2")
    rounds.committed(2)
    assert rounds.table.epoch == 1


def test_a_restart_finds_what_was_granted_ahead_in_the_journal():
    rounds = ahead(A)
    close_round(rounds, A)
    rounds.committed(1)
    grants = [
        Grant(member=A, round=2, request=0, interval=rounds.grant(A, request=0, wanted=4)),
        Grant(member=A, round=3, request=0, interval=rounds.grant(A, request=0, wanted=4, ahead=True)),
    ]
    table = SliceTable.restore(SLICES, epoch=0, used=rounds.table.used(), grants=grants, committed=1)
    assert table.held(A, 3) == (grants[1].interval,)
    assert table.grant(A, round=3, request=0, wanted=4) == grants[1].interval
