"""The book of rounds by example: who counts, when a round closes, what is excluded, and the reason for every no."""

from hashlib import sha256
from itertools import pairwise

import pytest
from msgspec.structs import replace

from hypha.errors import LocalProtocolError
from hypha.protocol.closing import CLOSES_PER_EPOCH, Close, Outcome, Waiting
from hypha.protocol.messages import Interval, Progress
from hypha.protocol.slices import Later
from hypha.protocol.views import Part
from tests.protocol.round_book import (
    ZERO,
    A,
    B,
    C,
    S,
    T,
    book,
    close_round,
    contribution,
    merged,
    report,
    train,
)


def test_a_round_closes_when_every_member_has_contributed():
    rounds = book(A, B)
    train(rounds, A)
    assert rounds.decide(1.0) == Waiting(reason="round 1: 1 contributions; waiting for b; 9.0 s to the deadline")
    train(rounds, B)
    close = rounds.decide(2.0)
    assert [named[:2] for named in close.requests[0][1].contributors] == [("a", 1), ("b", 1)]
    assert rounds.decide(2.0) == Waiting(reason=f"round 1: close {close.close} is being merged by s")
    assert rounds.pending == close


def test_at_its_deadline_a_round_closes_with_whoever_has_contributed():
    rounds = book(A, B)
    train(rounds, A)
    assert isinstance(rounds.decide(9.9), Waiting)
    assert isinstance(rounds.decide(10.0), Close)


def test_below_the_quorum_a_round_stays_open_past_its_deadline_and_says_why():
    rounds = book(A, B, quorum=2)
    train(rounds, A)
    reason = "round 1: 1 of 2 contributions that the quorum asks; waiting for b; past its deadline"
    assert rounds.decide(11.0) == Waiting(reason=reason)


def test_an_accepted_contribution_counts_after_its_sender_died():
    rounds = book(A, B, quorum=2)
    train(rounds, A)
    assert rounds.lease_died(A) == ()
    train(rounds, B)
    assert isinstance(rounds.decide(0.0), Close)


def test_a_dead_lease_without_an_accepted_contribution_is_excluded_and_its_samples_return_once_that_is_journaled():
    rounds = book(A, B)
    late = contribution(rounds, A, rounds.grant(A, request=0, wanted=40))
    (exclude,) = rounds.lease_died(A)
    assert (exclude.member, exclude.round, exclude.reason) == (A, 1, "its lease is gone")
    assert rounds.grant(B, request=0, wanted=4) is None
    assert rounds.excluded(exclude) == late.intervals
    assert rounds.grant(B, request=1, wanted=4).samples == 4
    assert report(rounds, late) == (), "it is excluded already, and need not be journaled twice"
    assert rounds.accepted() == {}


def test_what_a_dead_contributor_leaves_of_its_grants_is_free_again():
    rounds = book(A, B)
    whole = rounds.grant(A, request=0, wanted=40)
    report(rounds, contribution(rounds, A, replace(whole, stop=3)))
    assert rounds.lease_died(A) == ()
    assert rounds.grant(B, request=0, wanted=40) == replace(whole, start=3)


def test_samples_of_later_rounds_return_when_a_contributor_dies():
    rounds = book(A, B)
    close_round(rounds, A, B)
    rounds.grant(A, request=0, wanted=4)
    rounds.lost(1, 0.0)
    report(rounds, contribution(rounds, A, *rounds.table.held(A, 1)))
    assert [(e.member, e.round) for e in rounds.lease_died(A)] == [(A, 2)]


def test_a_contribution_with_samples_that_are_not_its_own_is_excluded_for_good():
    rounds = book(A, B)
    stolen = contribution(rounds, A, Interval(epoch=0, slice=0, start=0, stop=4))
    (exclude,) = report(rounds, stolen)
    assert "is not assigned to lease lease-a in round 1" in exclude.reason
    assert rounds.grant(A, request=0, wanted=40) is None, "an excluded lease is given nothing in this round"
    train(rounds, B)
    assert [peer for peer, _, _ in rounds.decide(0.0).requests[0][1].contributors] == ["b"]


def test_a_close_names_only_what_is_assigned_when_it_is_made():
    rounds = book(A, B)
    train(rounds, A, B)
    rounds.table.return_member(A, 1)
    assert list(rounds.accepted()) == [("b", 1)]


def test_a_loss_that_is_not_a_number_excludes():
    rounds = book(A)
    interval = rounds.grant(A, request=0, wanted=4)
    (exclude,) = report(rounds, contribution(rounds, A, interval, loss=float("nan")))
    assert exclude.reason == "its loss is nan"


def test_empty_contributions_count_but_alone_are_not_a_step():
    rounds = book(A, B, quorum=2)
    report(rounds, contribution(rounds, A), contribution(rounds, B))
    waiting = rounds.decide(0.0)
    assert "2 contributions, all of them empty, are not a step" in waiting.reason
    assert waiting.replace == (A, B)
    train(rounds, B)
    assert isinstance(rounds.decide(0.0), Close)


def test_the_next_round_opens_at_once_but_does_not_close_before_this_one_is_committed():
    rounds = book(A)
    outcome = close_round(rounds, A)
    assert (rounds.round, rounds.base_digest, outcome.samples) == (2, "1" * 64, 4)
    train(rounds, A)
    assert rounds.decide(0.0) == Waiting(reason="round 1 is not committed yet")
    rounds.committed(1)
    assert rounds.samples == 4
    assert isinstance(rounds.decide(0.0), Close)


def test_what_a_contribution_leaves_is_granted_in_the_next_round_before_the_commit():
    rounds = book(A)
    whole = rounds.grant(A, request=0, wanted=40)
    report(rounds, contribution(rounds, A, replace(whole, stop=4)))
    rounds.merged(S, merged(rounds.decide(0.0)), 0.0)
    assert rounds.grant(A, request=0, wanted=40) == replace(whole, start=4)


def test_a_lost_step_opens_its_round_again_on_its_base_under_a_higher_close():
    rounds = book(A, B)
    outcome = close_round(rounds, A, B)
    view = rounds.view(0.0).view
    assert rounds.lost(1, 5.0) == ()
    again = rounds.view(5.0)
    assert (again.round, again.base_digest, again.view, again.deadline_s) == (1, ZERO, view + 1, 10.0)
    close = rounds.decide(5.0)
    assert close.close == outcome.close + 1
    assert close.requests[0][1].contributors == tuple((c.peer_id, c.fence, c.digest) for c in outcome.contributions)


def test_a_step_lost_with_its_server_excludes_the_dead_who_cannot_send_again():
    rounds = book(A, B)
    close_round(rounds, A, B)
    assert rounds.lease_died(A) == ()
    assert rounds.lease_died(S) == ()
    assert [e.member for e in rounds.lost(1, 0.0)] == [A]


def test_no_server_may_join_while_it_is_open_whether_a_step_is_committed():
    rounds = book(A)
    close_round(rounds, A)
    rounds.lease_died(S)
    ready = {"digest": ZERO, "momentum_digest": None, "now": 0.0}
    assert rounds.server_ready(T, b"t", round=0, **ready) == "round 1 is neither committed nor lost yet"
    rounds.committed(1)
    assert rounds.server_ready(T, b"t", round=0, **ready) == "it holds model 0; 1 is committed"
    assert rounds.server_ready(T, b"t", round=1, **ready).startswith("its model is 000000000000")
    digest = "1" * 64
    assert "momentum" in rounds.server_ready(T, b"t", round=1, digest=digest, momentum_digest=None, now=0.0)
    assert rounds.server_ready(T, b"t", round=1, digest=digest, momentum_digest=digest, now=0.0) is None
    assert rounds.view(0.0).servers == (T,)


def test_after_a_servers_death_only_what_the_new_one_holds_counts():
    rounds = book(A, B)
    made = train(rounds, A, B)
    rounds.lease_died(S)
    assert rounds.decide(0.0) == Waiting(reason="round 1: no parameter server is ready")
    rounds.server_ready(T, b"t", round=0, digest=ZERO, momentum_digest=None, now=0.0)
    assert rounds.accepted() == {}
    assert report(rounds, *made, server=T) == ()
    assert isinstance(rounds.decide(0.0), Close)


def test_a_new_server_gives_the_round_its_whole_time_again():
    rounds = book(A, B)
    made = train(rounds, A, B)
    rounds.lease_died(S)
    assert rounds.server_ready(T, b"t", round=0, digest=ZERO, momentum_digest=None, now=25.0) is None
    assert (rounds.deadline, rounds.view(25.0).deadline_s) == (35.0, 10.0)
    assert report(rounds, made[0], server=T) == ()
    assert rounds.decide(34.9).reason == "round 1: 1 contributions; waiting for b; 0.1 s to the deadline"
    assert report(rounds, *made, server=T) == ()
    assert [peer for peer, _, _ in rounds.decide(34.9).requests[0][1].contributors] == ["a", "b"]


def test_a_server_that_says_again_what_it_holds_prolongs_nothing():
    rounds = book(A)
    assert rounds.server_ready(S, b"s", round=0, digest=ZERO, momentum_digest=None, now=5.0) is None
    assert rounds.deadline == 10.0


def test_with_several_servers_the_set_to_merge_is_what_all_of_them_hold():
    rounds = book(A, B, servers=(S, T))
    made = train(rounds, A, B)
    assert rounds.accepted() == {}
    report(rounds, made[1], server=T)
    assert list(rounds.accepted()) == [("b", 1)]
    close = rounds.decide(10.0)
    assert [server for server, _ in close.requests] == [S, T]
    assert rounds.merged(S, merged(close), 10.0) is None
    assert isinstance(rounds.merged(T, merged(close), 10.0), Outcome)


def test_each_shard_has_its_own_model_and_the_whole_is_named_by_all_of_them():
    rounds = book(A, servers=(S, T))
    assert (rounds.view(0.0).servers, rounds.view(0.0).shards, rounds.view(0.0).parts) == ((S, T), (0, 1), (ZERO, ZERO))
    report(rounds, *train(rounds, A), server=T)
    close = rounds.decide(0.0)
    assert rounds.merged(T, merged(close, "2", shard=1), 0.0) is None
    outcome = rounds.merged(S, merged(close), 0.0)
    parts = ("1" * 64, "2" * 64)
    assert (tuple(m.model_digest for m in outcome.merged), outcome.servers) == (parts, (S, T))
    assert (rounds.round, rounds.view(0.0).parts) == (2, parts)
    assert rounds.view(0.0).base_digest == rounds.base_digest == sha256("\n".join(parts).encode()).hexdigest()


def test_one_shard_without_a_server_stops_rounds_and_only_its_own_state_will_do():
    rounds = book(A, B, servers=(S, T))
    made = train(rounds, A, B)
    report(rounds, *made, server=T)
    rounds.lease_died(T)
    assert rounds.accepted() == {}
    assert rounds.decide(99.0).reason == "round 1: no parameter server is ready for shard 1 of 2"
    view = rounds.view(0.0)
    assert (view.servers, view.shards, view.parts) == ((S,), (0,), (ZERO, ZERO))
    ready = {"round": 0, "digest": ZERO, "momentum_digest": None, "now": 0.0}
    assert rounds.server_ready(C, b"c", shard=0, **ready) == "shard 0 is served by another"
    assert rounds.server_ready(C, b"c", shard=2, **ready) == "there is no shard 2 of 2"
    assert rounds.server_ready(C, b"c", shard=1, **ready) is None
    assert rounds.accepted() == {}, "the new server holds nothing yet"
    report(rounds, *made, server=C)
    assert isinstance(rounds.decide(0.0), Close)


def test_after_a_commit_a_new_server_must_hold_what_its_shard_became():
    rounds = book(A, servers=(S, T))
    report(rounds, *train(rounds, A), server=T)
    close = rounds.decide(0.0)
    rounds.merged(S, merged(close), 0.0)
    rounds.merged(T, merged(close, "2", shard=1), 0.0)
    rounds.committed(1)
    rounds.lease_died(T)
    held = {"round": 1, "shard": 1, "momentum_digest": "2" * 64, "now": 0.0}
    assert rounds.server_ready(C, b"c", digest="1" * 64, **held).startswith("its model is 1111")
    assert rounds.server_ready(C, b"c", digest="2" * 64, **held) is None
    assert rounds.view(0.0).servers == (S, C)


@pytest.mark.parametrize("change", [{"round": 2}, {"close": 7}, {"base_digest": "f" * 64}])
def test_an_answer_to_another_close_is_not_taken(change):
    rounds = book(A)
    train(rounds, A)
    close = rounds.decide(0.0)
    assert "is awaited, not" in rounds.merged(S, replace(merged(close), **change), 0.0)
    assert rounds.merged(T, merged(close), 0.0) == "no Close is awaited from t"
    assert rounds.round == 1


def test_a_refused_close_is_repeated_only_when_something_has_changed():
    rounds = book(A, B)
    train(rounds, A)
    first = rounds.decide(10.0)
    rounds.close_refused(first.close, "not held")
    assert rounds.decide(10.0) == Waiting(reason=f"round 1: close {first.close} was refused: not held")
    train(rounds, B)
    assert rounds.decide(10.0).close == first.close + 1


def test_a_refusal_that_a_report_has_overtaken_changes_nothing():
    rounds = book(A, B)
    train(rounds, A)
    first = rounds.decide(10.0)
    train(rounds, B)
    rounds.close_refused(first.close, "not held")
    assert isinstance(rounds.decide(10.0), Close)


def test_closes_of_a_later_job_epoch_are_higher_than_all_before():
    rounds = book(A)
    train(rounds, A)
    assert CLOSES_PER_EPOCH < rounds.decide(0.0).close < 2 * CLOSES_PER_EPOCH


def test_joiners_are_counted_from_the_round_whose_base_they_hold():
    rounds = book(A)
    rounds.lease_added(B)
    assert rounds.view(0.0).followers == (B,)
    close_round(rounds, A)
    assert rounds.worker_ready(B, round=0, digest=ZERO) == "it holds model 0 (000000000000); round 2 needs model 1"
    assert rounds.worker_ready(B, round=1, digest="1" * 64) is None
    assert rounds.view(0.0).members == (A, B)
    assert "is not one of this job's" in rounds.worker_ready(C, round=1, digest="1" * 64)


def test_the_view_changes_its_number_with_membership_round_and_base_and_with_nothing_else():
    rounds = book(A)
    numbers = [rounds.view(0.0).view]
    for event in (
        lambda: rounds.lease_added(B),
        lambda: rounds.lease_added(B),
        lambda: rounds.lease_died(B),
        lambda: rounds.lease_died(B),
        lambda: close_round(rounds, A),
        lambda: rounds.committed(1),
    ):
        event()
        numbers.append(rounds.view(0.0).view)
    assert [after - before for before, after in pairwise(numbers)] == [1, 0, 1, 0, 1, 0]
    assert rounds.view(4.0).deadline_s == 6.0
    assert (rounds.view(0.0).committed_round, rounds.view(0.0).committed_digest) == (1, "1" * 64)


def test_after_the_last_round_is_committed_a_final_view_ends_the_job():
    rounds = book(A, updates=1)
    close_round(rounds, A)
    assert isinstance(rounds.grant(A, request=0, wanted=4), Later)
    assert not rounds.view(0.0).final
    rounds.committed(1)
    view = rounds.view(0.0)
    assert (view.final, view.round, view.base_digest, view.members) == (True, 2, "1" * 64, (A,))
    assert rounds.decide(0.0) == Waiting(reason="all 1 rounds are committed")


def test_committing_what_is_not_to_be_committed_is_a_bug_here():
    rounds = book(A)
    for step in (rounds.committed, lambda round: rounds.lost(round, 0.0)):
        with pytest.raises(LocalProtocolError):
            step(1)
    close_round(rounds, A)
    rounds.committed(1)
    assert rounds.committed(1) == ()


def test_there_is_no_view_before_a_server_says_what_the_initial_model_is():
    rounds = book(servers=())
    rounds.lease_added(A)
    progress = Progress(
        job_id="job", job_epoch=1, round=1, lease_id="lease-a", fence=1,
        batches=0, samples=0, batch_size=1, batch_s=0.0, loss=0.0,
    )  # fmt: skip
    assert rounds.view(0.0) is None
    assert rounds.check(progress, "a", (Part.MEMBER,)).retry
    rounds.server_ready(S, b"s", round=0, digest=ZERO, momentum_digest=None, now=0.0)
    rounds.worker_ready(A, round=0, digest=ZERO)
    assert rounds.check(progress, "a", (Part.MEMBER,)) is None
    assert not rounds.check(progress, "b", (Part.MEMBER,)).retry


def test_a_report_that_does_not_match_the_newest_view_is_not_taken():
    rounds = book(A)
    made = contribution(rounds, A, rounds.grant(A, request=0, wanted=4))
    assert report(rounds, made, view=99).retry
    assert report(rounds, made, round=2).retry
    assert "is no server" in report(rounds, made, server=T).reason
    assert report(rounds, replace(made, base_digest="f" * 64), replace(made, round=9)) == ()
    assert rounds.accepted() == {}


def test_the_answer_of_a_dead_server_is_not_taken():
    rounds = book(A)
    train(rounds, A)
    close = rounds.decide(0.0)
    rounds.lease_died(S)
    assert rounds.merged(S, merged(close), 0.0) == "no Close is awaited from s"
    assert (rounds.round, rounds.pending) == (1, None)
