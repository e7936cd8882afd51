"""What ends a wait for a round, and what does not: refusals, wrong answers, and members who can add nothing."""

from msgspec.structs import replace

from hypha.protocol.closing import Close, Waiting
from hypha.protocol.messages import Interval
from tests.protocol.round_book import A, B, S, T, book, contribution, merged, report, train


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
