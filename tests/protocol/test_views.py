"""Everything that does not match the newest view is refused, or told to come again (L2)."""

from itertools import product

import pytest
from msgspec.structs import replace

from hypha.protocol.messages import CloseRound, Contribution, Member, Progress, PushUpdate, RoundView
from hypha.protocol.views import (
    NAMES_SHOWN_MAX,
    Observed,
    Part,
    ViewGuard,
    judge,
    judge_epoch,
    judge_lease,
    refusal,
    same_world,
    say_members,
    server_of,
)

A = Member(peer_id="a", fence=3, lease_id="lease-a")
F = Member(peer_id="f", fence=1, lease_id="lease-f")
S = Member(peer_id="s", fence=1, lease_id="lease-s")
VIEW = RoundView(
    job_id="job",
    job_epoch=2,
    view=5,
    round=4,
    base_digest="b" * 64,
    members=(A,),
    followers=(F,),
    servers=(S,),
    server_addresses=(b"address",),
    deadline_s=9.0,
    committed_round=3,
    committed_digest="b" * 64,
)
PROGRESS = Progress(
    job_id="job",
    job_epoch=2,
    round=4,
    lease_id="lease-a",
    fence=3,
    batches=1,
    samples=8,
    batch_size=8,
    batch_s=0.1,
    loss=1.0,
)


def push(**changes):
    contribution = Contribution(
        peer_id="a",
        fence=3,
        lease_id="lease-a",
        round=4,
        base_digest="b" * 64,
        digest="d" * 64,
        bytes=0,
        samples=0,
        intervals=(),
    )
    message = PushUpdate(
        job_id="job", job_epoch=2, round=4, lease_id="lease-a", fence=3, view=5, contribution=contribution
    )
    return replace(message, **changes)


def test_what_matches_the_newest_view_is_accepted():
    assert judge(VIEW, PROGRESS, "a", (Part.MEMBER,)) is None


@pytest.mark.parametrize(
    ("change", "peer", "retry", "reason"),
    [
        ({"job_id": "other"}, "a", False, "this is job job, not other"),
        ({"job_epoch": 1}, "a", False, "job epoch 1 is over; 2 has begun"),
        ({"job_epoch": 3}, "a", True, "job epoch 3 is newer than 2 here"),
        ({"round": 3}, "a", False, "round 3 is over; view 5 has round 4 open"),
        ({"round": 5}, "a", True, "round 5 is newer than 4 here"),
        ({"fence": 2}, "a", False, "lease lease-a (fence 2) of a is no member of view 5"),
        ({"fence": 4}, "a", False, "is no member of view 5"),
        ({"lease_id": "lease-f"}, "a", False, "is no member of view 5"),
        ({}, "b", False, "lease lease-a (fence 3) of b is no member of view 5"),
        ({"lease_id": "lease-f", "fence": 1}, "f", False, "of f is no member of view 5"),
    ],
)
def test_each_thing_that_differs_from_the_view_is_named(change, peer, retry, reason):
    verdict = judge(VIEW, replace(PROGRESS, **change), peer, (Part.MEMBER,))
    assert reason in verdict.reason
    assert verdict.retry is retry


def test_only_what_its_round_left_behind_is_no_news():
    assert [judge(VIEW, replace(PROGRESS, round=r), "a", (Part.MEMBER,)).over for r in (3, 5)] == [True, False]
    assert refusal(judge(VIEW, replace(PROGRESS, round=3), "a", (Part.MEMBER,))).code == "stale"
    assert refusal(judge(VIEW, replace(PROGRESS, fence=2), "a", (Part.MEMBER,))).code == "refused"
    assert refusal(judge(VIEW, replace(PROGRESS, round=5), "a", (Part.MEMBER,))).code == "retry"


def test_an_epoch_is_judged_before_everything_else():
    late = replace(PROGRESS, job_epoch=3, round=1, fence=9)
    assert judge(VIEW, late, "a", (Part.MEMBER,)).retry


def test_a_message_under_a_newer_view_is_to_come_again_even_from_a_stranger():
    stranger = push(view=6, fence=9)
    assert judge_lease(VIEW, stranger, "a", (Part.MEMBER,)).retry
    assert not judge_lease(VIEW, push(view=4, fence=9), "a", (Part.MEMBER,)).retry


def test_an_older_view_number_alone_is_no_reason_to_refuse():
    assert judge(VIEW, push(view=1), "a", (Part.MEMBER,)) is None


def test_every_part_admits_its_own_leases_only():
    for (lease, own), part in product([(A, Part.MEMBER), (F, Part.FOLLOWER), (S, Part.SERVER)], Part):
        message = replace(PROGRESS, lease_id=lease.lease_id, fence=lease.fence)
        assert (judge_lease(VIEW, message, lease.peer_id, (part,)) is None) == (own is part)
        assert judge_lease(VIEW, message, lease.peer_id, tuple(Part)) is None


def test_views_only_go_forward():
    guard = ViewGuard("job")
    assert guard.observe(VIEW, "sched") == Observed(changed=True)
    assert guard.observe(VIEW, "sched") == Observed(changed=False)
    assert guard.observe(replace(VIEW, view=4), "sched").stale == "view 2.4 is older than 2.5"
    assert guard.observe(replace(VIEW, view=6), "sched") == Observed(changed=True)
    assert guard.observe(replace(VIEW, job_epoch=1, view=9), "other").stale == "view 1.9 is older than 2.6"
    assert guard.observe(replace(VIEW, job_epoch=3, view=1), "other") == Observed(changed=True)
    assert guard.scheduler == "other"
    assert guard.view.view == 1


def test_a_job_epoch_belongs_to_one_scheduler():
    guard = ViewGuard("job")
    guard.observe(VIEW, "sched")
    assert guard.observe(replace(VIEW, view=9), "imposter").stale == "job epoch 2 belongs to sched"
    assert guard.check_scheduler(2, "imposter").reason == "job epoch 2 belongs to sched, not to imposter"
    assert guard.check_scheduler(2, "sched") is None
    assert guard.check_scheduler(3, "imposter").retry
    assert guard.view == VIEW


def test_a_view_number_says_one_thing():
    guard = ViewGuard("job")
    guard.observe(VIEW, "sched")
    assert guard.observe(replace(VIEW, round=5), "sched").stale == "view 2.5 was something else before"
    later = replace(VIEW, deadline_s=1.0, committed_round=4, committed_digest="c" * 64)
    assert same_world(VIEW, later)
    assert guard.observe(later, "sched") == Observed(changed=False)
    assert guard.view.deadline_s == 1.0


def test_a_view_of_another_job_is_stale():
    assert ViewGuard("other").observe(VIEW, "sched").stale == "this is job other, not job"
    assert judge_epoch(VIEW, "other", 2).reason == "this is job job, not other"


def test_before_the_first_view_everything_is_to_come_again():
    guard = ViewGuard("job")
    assert guard.check(PROGRESS, "a", Part.MEMBER).retry
    assert guard.check_scheduler(1, "sched").retry
    assert guard.check_server(job_epoch=1, view=1, peer_id="s").retry


def test_outer_updates_come_from_a_server_of_the_view():
    guard = ViewGuard("job")
    guard.observe(VIEW, "sched")
    assert guard.check_server(job_epoch=2, view=5, peer_id="s") is None
    assert guard.check_server(job_epoch=2, view=4, peer_id="s") is None
    assert guard.check_server(job_epoch=2, view=6, peer_id="s").retry
    assert guard.check_server(job_epoch=1, view=9, peer_id="s").reason == "job epoch 1 is over; 2 has begun"
    assert guard.check_server(job_epoch=2, view=5, peer_id="a").reason == "a does not serve shard 0 in view 5"


def test_a_close_under_a_view_that_has_not_come_is_to_come_again():
    close = CloseRound(
        job_id="job",
        job_epoch=2,
        round=4,
        lease_id="lease-s",
        fence=1,
        view=6,
        close=1,
        base_digest="b" * 64,
        contributors=(),
    )
    assert judge_lease(VIEW, close, "s", (Part.SERVER,)).retry


def test_a_view_without_servers_has_none_for_any_shard():
    assert server_of(VIEW, 0) == S
    assert server_of(replace(VIEW, servers=(), server_addresses=()), 0) is None


def test_a_few_leases_are_named_and_the_rest_counted():
    leases = [Member(peer_id=letter, fence=1, lease_id=letter) for letter in "abcdef"]
    assert say_members(leases[:NAMES_SHOWN_MAX]) == "a, b, c, d"
    assert say_members(leases) == "a, b, c, d and 2 more"
