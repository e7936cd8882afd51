"""The parameter server's rules by example: what it takes, what it keeps, what it merges, and how it goes back."""

import pytest
from msgspec.structs import replace

from hypha.protocol.collect import Collector, MergePlan, Screening, Take
from hypha.protocol.messages import (
    Accepted,
    CloseRound,
    Committed,
    Contribution,
    Interval,
    Member,
    Merged,
    Merging,
    PushUpdate,
    Rebase,
    RoundView,
)
from hypha.protocol.views import Verdict

A, B, C = (Member(peer_id=p, fence=f, lease_id=f"lease-{p}") for p, f in (("a", 5), ("b", 1), ("c", 2)))
ME = Member(peer_id="s", fence=1, lease_id="lease-s")
BASE, ONE, OTHER = "0" * 64, "1" * 64, "f" * 64


def view(number=1, round=1, base=BASE, members=(A, B), epoch=1):
    return RoundView(
        job_id="job", job_epoch=epoch, view=number, round=round, base_digest=base, members=members, servers=(ME,),
        server_addresses=(b"",), deadline_s=9.0, committed_round=0, committed_digest=BASE,
    )  # fmt: skip


def push(member=A, round=1, base=BASE, samples=4, digest="d", seen=1, epoch=1, **changes):
    intervals = (Interval(epoch=0, slice=0, start=0, stop=samples),) if samples else ()
    contribution = Contribution(
        peer_id=member.peer_id, fence=member.fence, lease_id=member.lease_id, round=round, base_digest=base,
        digest=digest * 64, bytes=samples, samples=samples, intervals=intervals,
    )  # fmt: skip
    return PushUpdate(
        job_id="job", job_epoch=epoch, round=round, lease_id=member.lease_id, fence=member.fence, view=seen,
        contribution=replace(contribution, **changes),
    )  # fmt: skip


def close(*contributors, number=1, round=1, base=BASE, seen=1, epoch=1):
    named = tuple((m.peer_id, m.fence, d * 64) for m, d in contributors)
    return CloseRound(
        job_id="job", job_epoch=epoch, round=round, lease_id=ME.lease_id, fence=ME.fence, view=seen, close=number,
        base_digest=base, contributors=named,
    )  # fmt: skip


def outcome(plan, model=ONE):
    return Merged(
        round=plan.round, close=plan.close, base_digest=plan.base_digest, model_digest=model, momentum_digest=model,
        record_digest=model, update_digest=model, model_bytes=1, momentum_bytes=1, record_bytes=1, update_bytes=1,
    )  # fmt: skip


def server(*pushes):
    made = Collector("job", ME, round=0, model_digest=BASE)
    assert made.observe(view(), "sched").changed
    for message in pushes:
        hold(made, message)
    return made


def hold(made, message):
    ticket = take(made, message)
    landed = made.landed(ticket)
    return made.screened(ticket, None) if isinstance(landed, Screening) else landed


def merged_server():
    made = server(push(), push(B, digest="e"))
    plan = made.close(close((A, "d"), (B, "e")), "sched")
    assert made.merge_done(outcome(plan))
    return made


def take(made, message):
    taken = made.offer(message, message.contribution.peer_id)
    assert isinstance(taken, Take)
    return taken.ticket


def held(made):
    return [(c.peer_id, c.samples) for c in made.collected().contributions]


def test_a_contribution_is_held_once_it_is_here_and_screened():
    made = server()
    taken = made.offer(push(), "a")
    assert held(made) == []
    assert made.landed(taken.ticket) == Screening(ticket=taken.ticket, contribution=push().contribution)
    assert held(made) == []
    assert made.screened(taken.ticket, None) == Accepted(digest="d" * 64)
    assert held(made) == [("a", 4)]


def test_the_same_again_is_accepted_at_once_and_another_is_refused():
    made = server(push())
    assert made.offer(push(), "a") == Accepted(digest="d" * 64)
    assert "of this lease already" in made.offer(push(digest="e"), "a").reason
    assert "of this lease already" in made.offer(push(samples=3), "a").reason, "other samples make another update"


def test_an_empty_contribution_needs_no_screening_and_may_be_replaced_by_a_full_one():
    made = server()
    taken = made.offer(push(samples=0), "a")
    assert made.landed(taken.ticket) == Accepted(digest="d" * 64)
    assert held(made) == [("a", 0)]
    hold(made, push(digest="e"))
    assert held(made) == [("a", 4)]


def test_a_refusal_by_the_screening_is_passed_on_and_nothing_is_held():
    made = server()
    taken = made.offer(push(), "a")
    made.landed(taken.ticket)
    assert made.screened(taken.ticket, "w.weight is not finite") == Verdict(reason="w.weight is not finite")
    assert held(made) == []
    assert isinstance(made.offer(push(), "a"), Take)


def test_a_later_transfer_supersedes_an_earlier_one_of_the_same_lease():
    made = server()
    first, second = made.offer(push(), "a"), made.offer(push(), "a")
    assert made.landed(first.ticket).retry
    assert isinstance(made.landed(second.ticket), Screening)


def test_a_broken_transfer_leaves_nothing_behind():
    made = server()
    taken = made.offer(push(), "a")
    made.lost(taken.ticket)
    assert made.landed(taken.ticket).retry
    assert held(made) == []


@pytest.mark.parametrize(
    ("message", "peer", "reason"),
    [
        (push(), "b", "not the sender's"),
        (push(fence=4), "a", "not the sender's"),
        (push(lease_id="x"), "a", "not the sender's"),
        (replace(push(), round=2), "a", "not the sender's"),
        (push(samples=4, intervals=()), "a", "contradict"),
        (push(loss=float("nan")), "a", "contradict"),
        (push(bytes=0), "a", "without a pseudo-gradient"),
        (push(Member(peer_id="a", fence=4, lease_id="lease-a")), "a", "is no member of view 1"),
        (push(Member(peer_id="c", fence=1, lease_id="lease-c")), "c", "is no member of view 1"),
        (push(epoch=0), "a", "job epoch 0 is over"),
        (push(round=0), "a", "round 0 is over; round 1 is open"),
    ],
)
def test_what_does_not_match_the_newest_view_is_refused_before_its_bytes(message, peer, reason):
    verdict = server().offer(message, peer)
    assert reason in verdict.reason
    assert not verdict.retry


@pytest.mark.parametrize("message", [push(seen=2), push(epoch=2), push(seen=2, round=2)])
def test_what_is_newer_is_to_come_again(message):
    assert server().offer(message, "a").retry


@pytest.mark.parametrize("message", [push(base=OTHER), push(round=2), push(round=2, base=OTHER)])
def test_another_base_is_told_the_open_one(message):
    assert server().offer(message, "a") == Rebase(round=1, base_digest=BASE)


def test_without_a_view_everything_is_to_come_again():
    made = Collector("job", ME, round=0, model_digest=BASE)
    assert made.offer(push(), "a").retry
    assert made.close(close((A, "d")), "sched").retry
    assert made.collected() is None


def test_what_is_held_outlives_its_senders_lease_but_what_is_only_arriving_does_not():
    made = server(push())
    arriving = made.offer(push(B, digest="e"), "b")
    made.observe(view(2, members=()), "sched")
    assert held(made) == [("a", 4)]
    assert isinstance(made.landed(arriving.ticket), Verdict)
    assert made.collected().view == 2


def test_a_lease_that_ends_while_its_update_is_screened_is_refused():
    made = server()
    taken = made.offer(push(), "a")
    made.landed(taken.ticket)
    made.observe(view(2, members=(Member(peer_id="a", fence=5, lease_id="another"), B)), "sched")
    assert "is no member of view 2" in made.screened(taken.ticket, None).reason
    assert held(made) == []


def test_an_update_whose_round_ends_while_it_is_screened_is_to_come_again():
    made = merged_server()
    made.observe(view(2, members=(A, B, C)), "sched")
    taken = made.offer(push(C, digest="c", seen=2), "c")
    made.landed(taken.ticket)
    made.committed(Committed(job_id="job", job_epoch=1, round=1, digest=ONE), "sched")
    assert made.screened(taken.ticket, None) == Verdict(reason="the open round's base is not here yet", retry=True)


def test_a_close_merges_the_named_in_peer_and_fence_order_and_no_empty_ones():
    made = server(push(B, digest="e"), push())
    plan = made.close(close((B, "e"), (A, "d")), "sched")
    assert [c.peer_id for c in plan.inputs] == ["a", "b"]
    mixed = server(push(B, digest="e"), push(samples=0))
    assert [c.peer_id for c in mixed.close(close((A, "d"), (B, "e")), "sched").inputs] == ["b"]


def test_the_same_close_gets_the_same_answer_and_a_higher_one_starts_anew():
    made = server(push(), push(B, digest="e"))
    first = close((A, "d"))
    plan = made.close(first, "sched")
    assert made.close(first, "sched") == Merging(round=1, close=1)
    assert made.merge_done(outcome(plan))
    assert made.close(first, "sched") == outcome(plan)
    assert "named other contributors before" in made.close(close((B, "e")), "sched").reason
    again = made.close(close((A, "d"), (B, "e"), number=2), "sched")
    assert isinstance(again, MergePlan)
    assert again.base_digest == BASE
    assert made.collected().merged is None
    assert "close 1 is older than 2" in made.close(first, "sched").reason
    assert not made.merge_done(outcome(plan)), "a merge that was overtaken means nothing"
    assert made.merge_done(outcome(again))
    assert made.collected().merged == outcome(again)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (close((A, "e")), "is not held here"),
        (close((Member(peer_id="a", fence=4, lease_id="lease-a"), "d")), "is not held here"),
        (close((A, "d"), (A, "d")), "names a lease twice"),
        (close(), "not a step"),
        (close((B, "e")), "not a step"),
        (close((A, "d"), base=OTHER), "is not open here"),
        (close((A, "d"), round=2), "is not open here"),
        (replace(close((A, "d")), fence=2), "is not this server's"),
        (replace(close((A, "d")), lease_id="x"), "is not this server's"),
        (close((A, "d"), epoch=0), "job epoch 0 is over"),
    ],
)
def test_a_close_that_cannot_be_is_refused_with_the_reason(request_, reason):
    made = server(push(), push(B, digest="e", samples=0))
    verdict = made.close(request_, "sched")
    assert reason in verdict.reason
    assert not verdict.retry
    assert isinstance(made.close(close((A, "d")), "sched"), MergePlan)


def test_only_the_epochs_scheduler_may_close():
    made = server(push())
    assert "belongs to sched" in made.close(close((A, "d")), "imposter").reason
    assert made.close(close((A, "d"), seen=2), "sched").retry


def test_a_merge_that_fails_refuses_its_close_but_not_the_next():
    made = server(push())
    made.close(close((A, "d")), "sched")
    assert made.merge_failed(1, 1, "the result is not finite")
    assert not made.merge_failed(1, 1, "again")
    assert made.close(close((A, "d")), "sched").reason == "close 1 cannot be merged: the result is not finite"
    assert isinstance(made.close(close((A, "d"), number=2), "sched"), MergePlan)


def test_the_next_round_opens_on_the_merged_model_while_the_old_one_is_kept():
    made = merged_server()
    assert made.observe(view(2, round=2, base=ONE), "sched").unservable is None
    hold(made, push(round=2, base=ONE, seen=2))
    assert "round 1 is over" in made.offer(push(), "a").reason
    assert held(made) == [("a", 4)]
    back = made.observe(view(3, round=1), "sched")
    assert back.drop == ()
    assert held(made) == [("a", 4), ("b", 4)]
    assert made.collected().merged.model_digest == ONE


def test_going_forward_again_on_the_same_model_keeps_what_was_collected_on_it():
    made = merged_server()
    made.observe(view(2, round=2, base=ONE), "sched")
    hold(made, push(round=2, base=ONE, seen=2))
    made.observe(view(3, round=1), "sched")
    made.observe(view(4, round=2, base=ONE), "sched")
    assert held(made) == [("a", 4)]


def test_closing_again_voids_what_was_collected_on_the_model_it_made():
    made = merged_server()
    made.observe(view(2, round=2, base=ONE), "sched")
    hold(made, push(round=2, base=ONE, seen=2))
    made.observe(view(3, round=1), "sched")
    plan = made.close(close((A, "d"), number=2, seen=3), "sched")
    assert [(c.round, c.peer_id) for c in plan.drop] == [(2, "a")]
    made.merge_done(outcome(plan, OTHER))
    assert made.observe(view(4, round=2, base=OTHER), "sched").unservable is None
    assert held(made) == []


def test_an_open_round_is_not_closed_from_behind():
    made = merged_server()
    made.observe(view(2, round=2, base=ONE), "sched")
    assert "is not the open one" in made.close(close((A, "d"), number=2, seen=2), "sched").reason
    assert made.close(close((A, "d"), (B, "e"), seen=2), "sched").model_digest == ONE


def test_a_commit_lets_go_of_what_could_undo_it():
    made = merged_server()
    made.observe(view(2, round=2, base=ONE), "sched")
    committed = Committed(job_id="job", job_epoch=1, round=1, digest=ONE)
    assert [c.peer_id for c in made.committed(committed, "sched")] == ["a", "b"]
    assert made.committed(committed, "sched") == ()
    assert (made.round, made.model_digest, made.momentum_digest) == (1, ONE, ONE)
    unservable = made.observe(view(3, round=1), "sched").unservable
    assert unservable == "view 3 opens round 1 on 000000000000; this server holds model 1 (111111111111)"
    assert made.offer(push(seen=3), "a").retry


def test_a_commit_of_something_else_is_refused():
    made = merged_server()
    assert (
        "not as merged here"
        in made.committed(Committed(job_id="job", job_epoch=1, round=1, digest=OTHER), "sched").reason
    )
    assert (
        "belongs to sched"
        in made.committed(Committed(job_id="job", job_epoch=1, round=1, digest=ONE), "imposter").reason
    )
    assert made.committed(Committed(job_id="job", job_epoch=1, round=0, digest=BASE), "sched") == ()
    assert made.round == 0


def test_after_a_commit_nothing_is_open_until_the_next_view():
    made = merged_server()
    made.committed(Committed(job_id="job", job_epoch=1, round=1, digest=ONE), "sched")
    assert made.collected() is None
    assert made.offer(push(), "a").retry
    made.observe(view(2, round=2, base=ONE), "sched")
    assert isinstance(made.offer(push(round=2, base=ONE, seen=2), "a"), Take)


def test_a_view_on_a_model_that_is_not_here_cannot_be_served():
    made = server(push())
    taken = made.observe(view(2, round=1, base=OTHER), "sched")
    assert taken.unservable is not None
    assert made.offer(push(seen=2), "a").retry
    assert made.observe(view(1), "sched").stale is not None


def test_a_new_incarnation_of_the_scheduler_finds_what_was_collected_and_merged():
    made = merged_server()
    assert made.observe(view(1, epoch=2), "standby").changed
    message = made.collected()
    assert (message.job_epoch, len(message.contributions), message.merged.close) == (2, 2, 1)
    assert "job epoch 1 is over" in made.close(close((A, "d"), number=9), "sched").reason
    assert isinstance(made.close(close((A, "d"), number=2, epoch=2), "standby"), MergePlan)


def test_what_will_be_merged_is_foreseen_once_every_member_has_begun_to_send():
    collector = server()
    assert collector.foreseen() is None
    ticket = take(collector, push(B, digest="b"))
    assert collector.foreseen() is None
    other = take(collector, push(A, digest="a"))
    foreseen = collector.foreseen()
    assert foreseen is not None
    assert (foreseen.round, foreseen.base_digest, foreseen.tickets) == (1, BASE, (other, ticket))
    assert [each.peer_id for each in foreseen.inputs] == ["a", "b"]
    collector.landed(other)
    collector.screened(other, None)
    assert collector.foreseen() == replace(foreseen, tickets=(None, ticket))
    collector.lost(ticket)
    assert collector.foreseen() is None


def test_nobody_waits_for_an_empty_contribution_and_nothing_is_foreseen_after_a_close():
    collector = server()
    hold(collector, push(A, samples=0, digest="0"))
    hold(collector, push(B, digest="b"))
    foreseen = collector.foreseen()
    assert foreseen is not None
    assert [each.peer_id for each in foreseen.inputs] == ["b"]
    assert isinstance(collector.close(close((A, "0"), (B, "b")), "sched"), MergePlan)
    assert collector.foreseen() is None


def test_a_later_transfer_of_the_same_lease_is_the_one_that_is_foreseen():
    collector = server()
    hold(collector, push(B, digest="e"))
    take(collector, push(A, digest="a"))
    later = take(collector, push(A, digest="a"))
    foreseen = collector.foreseen()
    assert foreseen is not None
    assert foreseen.tickets == (later, None)
