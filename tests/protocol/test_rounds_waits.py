"""What ends a wait for a round, and what does not: refusals, wrong answers, and members who can add nothing."""

from hashlib import sha256

from msgspec.structs import replace

from hypha.protocol.closing import Close, Waiting
from hypha.protocol.manifest import ChainState
from hypha.protocol.messages import Interval, Ready
from hypha.protocol.rounds import RoundBook, Terms
from hypha.protocol.slices import SliceTable
from hypha.protocol.views import Part
from tests.protocol.round_book import SLICES, ZERO, A, B, S, T, book, contribution, merged, report, train


def test_a_new_view_lets_a_refused_close_be_tried_again():
    rounds = book(A, B)
    train(rounds, A)
    refused = rounds.decide(10.0)
    rounds.close_refused(refused.close, "not held")
    assert isinstance(rounds.decide(10.0), Waiting)
    rounds.lease_died(B)
    again = rounds.decide(10.0)
    assert isinstance(again, Close)
    assert again.close == refused.close + 1


def test_only_a_member_that_adds_nothing_is_to_be_replaced():
    rounds = book(A, B, quorum=2)
    train(rounds, A)
    (excluded,) = report(rounds, contribution(rounds, B, Interval(epoch=0, slice=0, start=30, stop=34)))
    assert excluded.member == B
    assert rounds.decide(0.0).replace == (B,)


def test_a_wrong_answer_of_one_server_does_not_refuse_a_close_that_another_is_merging():
    rounds = book(A, servers=(S, T))
    made = train(rounds, A)
    report(rounds, *made, server=T)
    close = rounds.decide(0.0)
    assert "is awaited, not" in rounds.merged(S, replace(merged(close), base_digest="e" * 64, round=9), 0.0)
    assert rounds.pending is close


def test_one_sample_is_enough_not_to_be_replaced():
    rounds = book(A, B, quorum=3)
    train(rounds, A)
    train(rounds, B, samples=1)
    waiting = rounds.decide(0.0)
    assert waiting.reason.startswith("round 1: 2 of 3 contributions")
    assert waiting.replace == ()


def test_as_many_workers_as_the_job_cannot_do_without_are_enough():
    rounds = book(A, B)
    rounds.terms = replace(rounds.terms, fewest=2)
    train(rounds, A, B)
    assert isinstance(rounds.decide(0.0), Close)
    rounds.terms = replace(rounds.terms, fewest=3)
    assert rounds.decide(0.0).reason == "round 1: 2 of 3 workers without which the job waits"


def test_exclusions_are_forgotten_with_their_round():
    rounds = book(A, B)
    rounds.grant(B, request=0, wanted=4)
    (excluded,) = rounds.lease_died(B)
    rounds.excluded(excluded)
    train(rounds, A)
    assert list(rounds._excluded) == [("b", 1, 1)]
    rounds.merged(S, merged(rounds.decide(0.0)), 0.0)
    rounds.committed(1)
    assert not rounds._excluded, "else a job keeps one for every worker that ever died"


def test_before_there_is_a_view_every_message_is_to_come_again():
    terms = Terms(job_id="job", updates=3, quorum=1, deadline_s=10.0)
    rounds = RoundBook(
        terms, job_epoch=1, chain=ChainState(job_id="job"), table=SliceTable(SLICES), now=0.0, sha256=sha256
    )
    message = Ready(job_id="job", job_epoch=1, round=0, lease_id="lease-a", fence=1, digest=ZERO)
    assert rounds.view(0.0) is None
    assert rounds.check(message, "a", (Part.FOLLOWER,)).retry
    assert rounds.check_lease(message, "a", (Part.FOLLOWER,)).retry


def test_before_the_first_commit_a_view_names_the_initial_model():
    assert book(A).view(0.0).committed_digest == ZERO
