"""The grantor's ledger: its transition table exhaustively, and each rule of leases.md that a grantor keeps."""

import itertools

import pytest

from hypha.errors import LocalProtocolError
from hypha.protocol import lease as rules
from hypha.protocol.lease import (
    TRANSITIONS,
    Already,
    Ended,
    Event,
    Gone,
    Kept,
    Lease,
    Ledger,
    NoRoom,
    Sender,
    Stale,
    Start,
    State,
    Stop,
)
from hypha.protocol.resources import NOTHING, Resources

CAPACITY = Resources(cpu=4, memory=16, gpu=2)
ONE_GPU = Resources(cpu=1, gpu=1)
PATHS = {
    State.TEMPORARY: [],
    State.RENEWABLE: [Event.RENEW],
    State.RUNNING: [Event.RENEW, Event.DISPATCH],
    State.SPENT: [Event.RENEW, Event.DISPATCH, Event.GONE],
    State.ENDING: [Event.RENEW, Event.DISPATCH, Event.DIE],
    State.DEAD: [Event.DIE],
}


@pytest.fixture
def ledger():
    return Ledger(CAPACITY)


def said(attempt, *, fence=1, epoch=1, peer="sched-1"):
    return Sender(peer=peer, fence=fence, job_epoch=epoch, attempt=attempt)


def granted(ledger, lease_id="a", *, fence=1, now=0.0, resources=ONE_GPU, holder="sched-1"):
    lease = ledger.grant(lease_id, holder, resources, ttl_s=5, fence=fence, now=now, job_epoch=1)
    assert isinstance(lease, Lease)
    return lease


def apply(ledger, event, attempt):
    match event:
        case Event.RENEW:
            return ledger.renew("a", said(attempt), ttl_s=30, now=0)
        case Event.DISPATCH:
            return ledger.dispatch("a", said(attempt), "job", now=0)
        case Event.CANCEL:
            return ledger.cancel("a", said(attempt), "job", now=0)
        case Event.DIE:
            return ledger.release("a", said(attempt), reason="test", now=0)
        case Event.GONE:
            return ledger.confirm_gone("a", now=0)


def state_of(ledger):
    return next((lease.state for lease in ledger.leases(0) if lease.lease_id == "a"), State.DEAD)


@pytest.mark.parametrize(
    ("state", "event"), [*itertools.product(PATHS, [event for event in Event if event is not Event.GRANT])]
)
def test_every_event_in_every_state_does_what_the_table_says_or_nothing(ledger, state, event):
    granted(ledger)
    for attempt, step in enumerate(PATHS[state], start=1):
        apply(ledger, step, attempt)
    assert state_of(ledger) is state
    before = ledger.leases(0)
    answer = apply(ledger, event, 10)
    if (state, event) in TRANSITIONS:
        assert state_of(ledger) is TRANSITIONS[state, event]
        assert isinstance(answer, Kept | Start | Stop | Already | Ended) or answer is True
    else:
        assert isinstance(answer, Gone | Stale | Already) or answer is False
        assert [lease.state for lease in ledger.leases(0)] == [lease.state for lease in before]


def test_the_table_has_one_way_in_and_no_way_out_of_death():
    assert [key for key in TRANSITIONS if key[0] is State.FREE] == [(State.FREE, Event.GRANT)]
    assert [key for key in TRANSITIONS if key[0] is State.DEAD] == []
    assert {state for state in State if (state, Event.DIE) in TRANSITIONS} == set(rules.LIVING)
    assert set(TRANSITIONS.values()) == set(State) - {State.FREE}


def test_capacity_is_granted_once_and_the_refusal_says_what_is_short(ledger):
    granted(ledger, "a", fence=1)
    granted(ledger, "b", fence=2)
    refusal = ledger.grant("c", "sched-1", ONE_GPU, ttl_s=5, fence=3, now=0)
    assert refusal == NoRoom("not free now: gpu 1 wanted, 0 there")
    never = ledger.grant("c", "sched-1", Resources(cpu=9, gpu=3), ttl_s=5, fence=3, now=0)
    assert never == NoRoom("this worker has too little: cpu 9 wanted, 4 there; gpu 3 wanted, 2 there", ever=False)
    assert ledger.free(0) == Resources(cpu=2, memory=16)


def test_a_grant_needs_a_new_id_a_higher_fence_and_something_to_lease(ledger):
    granted(ledger, "a", fence=5)
    for lease_id, fence, resources in [("a", 6, ONE_GPU), ("b", 5, ONE_GPU), ("b", 4, ONE_GPU), ("b", 6, NOTHING)]:
        with pytest.raises(LocalProtocolError):
            ledger.grant(lease_id, "sched-1", resources, ttl_s=5, fence=fence, now=0)
    ledger.release("a", said(1, fence=5), reason="test", now=0)
    with pytest.raises(LocalProtocolError):
        ledger.grant("a", "sched-1", ONE_GPU, ttl_s=5, fence=6, now=0)


def test_leases_of_tiny_amounts_are_bounded(monkeypatch):
    monkeypatch.setattr(rules, "LEASES_MAX", 2)
    ledger = Ledger(CAPACITY)
    granted(ledger, "a", fence=1, resources=Resources(cpu=0.001))
    granted(ledger, "b", fence=2, resources=Resources(cpu=0.001))
    refusal = ledger.grant("c", "sched-1", Resources(cpu=0.001), ttl_s=5, fence=3, now=0)
    assert refusal == NoRoom("2 leases are the most this worker keeps")


def test_the_first_renewal_accepts_and_counts_from_now_not_from_the_old_deadline(ledger):
    granted(ledger, now=0)
    first = ledger.renew("a", said(1), ttl_s=30, now=4)
    assert (first.remaining_s, first.extended, first.accepted) == (30, True, True)
    assert first.lease.state is State.RENEWABLE
    second = ledger.renew("a", said(2), ttl_s=30, now=20)
    assert (second.remaining_s, second.extended, second.accepted) == (30, True, False)


def test_a_repeated_or_overtaken_renewal_extends_nothing_and_is_told_what_remains(ledger):
    granted(ledger)
    ledger.renew("a", said(2), ttl_s=30, now=1)
    for attempt in (2, 1):
        again = ledger.renew("a", said(attempt), ttl_s=30, now=11)
        assert (again.remaining_s, again.extended, again.accepted) == (20, False, False)


def test_a_renewal_never_shortens(ledger):
    granted(ledger)
    ledger.renew("a", said(1), ttl_s=30, now=0)
    kept = ledger.renew("a", said(2), ttl_s=1, now=1)
    assert kept.remaining_s == 29


def test_an_older_epoch_is_refused_by_every_message_and_changes_nothing(ledger):
    granted(ledger)
    adopted = ledger.renew("a", said(1, epoch=3), ttl_s=30, now=1)
    assert adopted.extended
    before = ledger.leases(1)
    old = said(99, epoch=2)
    answers = [
        ledger.renew("a", old, ttl_s=30, now=1),
        ledger.dispatch("a", old, "job", now=1),
        ledger.cancel("a", old, "job", now=1),
        ledger.release("a", old, reason="late", now=1),
    ]
    assert answers == [Stale("job epoch 2 is over: lease a is held in 3")] * 4
    assert ledger.leases(1) == before


def test_a_newer_epoch_may_start_counting_attempts_again(ledger):
    granted(ledger)
    ledger.renew("a", said(40), ttl_s=30, now=1)
    kept = ledger.renew("a", said(1, epoch=2), ttl_s=30, now=2)
    assert (kept.remaining_s, kept.extended) == (30, True)


@pytest.mark.parametrize(
    ("sender", "reason"),
    [
        (said(1, peer="sched-2"), "lease a is not held by sched-2"),
        (said(1, fence=2), "lease a has fence 1, not 2"),
    ],
)
def test_another_holder_or_fence_finds_no_lease(ledger, sender, reason):
    granted(ledger)
    before = ledger.leases(0)
    assert ledger.renew("a", sender, ttl_s=30, now=0) == Gone(reason)
    assert ledger.dispatch("a", sender, "job", now=0) == Gone(reason)
    assert ledger.cancel("a", sender, "job", now=0) == Gone(reason)
    assert ledger.release("a", sender, reason="mine", now=0) == Gone(reason)
    assert ledger.leases(0) == before
    assert ledger.renew("unknown", sender, ttl_s=30, now=0) == Gone("no lease unknown")


def test_a_lease_is_dead_at_its_deadline_though_nothing_swept(ledger):
    granted(ledger, now=0)
    assert ledger.live("a", fence=1, now=4.999) is not None
    assert ledger.live("a", fence=1, now=5.0) is None
    assert ledger.free(5.0) == CAPACITY
    assert ledger.renew("a", said(1), ttl_s=30, now=5.0) == Gone("expired: not renewed before its deadline")
    assert ledger.release("a", said(2), reason="late", now=5.0) == Gone("expired: not renewed before its deadline")


def test_a_clock_that_steps_back_revives_nothing(ledger):
    granted(ledger, now=0)
    ledger.expire(5)
    assert isinstance(ledger.renew("a", said(1), ttl_s=30, now=1), Gone)
    assert ledger.free(1) == CAPACITY


def test_time_at_the_grantor_only_goes_forward(ledger):
    granted(ledger, now=0)
    ledger.renew("a", said(1), ttl_s=30, now=4)
    assert ledger.renew("a", said(1), ttl_s=30, now=1).remaining_s == 30


def test_an_overtaken_dispatch_does_not_reopen_the_door_to_old_renewals(ledger):
    granted(ledger)
    ledger.renew("a", said(1), ttl_s=30, now=0)
    ledger.renew("a", said(5), ttl_s=30, now=0)
    assert isinstance(ledger.dispatch("a", said(2), "job", now=0), Start)
    assert not ledger.renew("a", said(5), ttl_s=30, now=1).extended


def test_expiry_is_told_once_even_when_another_call_noticed_it(ledger):
    granted(ledger, "a", fence=1, now=0)
    granted(ledger, "b", fence=2, now=1)
    assert ledger.next_deadline() == 5
    assert ledger.free(5) == Resources(cpu=3, memory=16, gpu=1)
    assert ledger.next_deadline() == 5
    assert [lease.lease_id for lease in ledger.expire(5)] == ["a"]
    assert ledger.expire(5) == ()
    assert ledger.next_deadline() == 6
    assert [(lease.lease_id, lease.state) for lease in ledger.expire(60)] == [("b", State.DEAD)]
    assert ledger.next_deadline() is None


def test_resources_of_a_running_job_return_only_when_its_processes_are_gone(ledger):
    granted(ledger)
    ledger.renew("a", said(1), ttl_s=30, now=0)
    ledger.dispatch("a", said(2), "job", now=0)
    (dead,) = ledger.expire(30)
    assert (dead.state, dead.has_process, dead.job_id) == (State.ENDING, True, "job")
    assert ledger.live("a", fence=1, now=30) is None
    assert ledger.free(30) == Resources(cpu=3, memory=16, gpu=1)
    assert ledger.confirm_gone("a", now=31) is True
    assert ledger.free(31) == CAPACITY
    assert ledger.confirm_gone("a", now=31) is False


def test_an_expired_lease_whose_processes_went_before_the_sweep_has_none_to_kill(ledger):
    granted(ledger)
    ledger.renew("a", said(1), ttl_s=30, now=0)
    ledger.dispatch("a", said(2), "job", now=0)
    assert ledger.confirm_gone("a", now=30) is True
    (dead,) = ledger.expire(30)
    assert (dead.state, dead.has_process) == (State.DEAD, False)


def test_one_lease_runs_one_job_and_saying_it_twice_starts_it_once(ledger):
    granted(ledger)
    assert ledger.dispatch("a", said(1), "job", now=0) == Stale("lease a is temporary: renew it first")
    ledger.renew("a", said(1), ttl_s=30, now=0)
    assert isinstance(ledger.dispatch("a", said(2), "job", now=0), Start)
    assert isinstance(ledger.dispatch("a", said(2), "job", now=0), Already)
    assert ledger.dispatch("a", said(3), "other", now=0) == Stale("lease a is for job job: one lease, one job")
    ledger.confirm_gone("a", now=1)
    assert isinstance(ledger.dispatch("a", said(4), "job", now=1), Already)
    assert isinstance(ledger.dispatch("a", said(5), "other", now=1), Stale)


def test_a_cancel_that_overtakes_its_dispatch_wins(ledger):
    granted(ledger)
    ledger.renew("a", said(1), ttl_s=30, now=0)
    assert isinstance(ledger.cancel("a", said(3), "job", now=0), Already)
    assert isinstance(ledger.dispatch("a", said(2), "job", now=0), Already)
    assert ledger.confirm_gone("a", now=0) is False
    assert ledger.live("a", fence=1, now=0).state is State.SPENT


def test_cancel_stops_only_its_own_job_and_leaves_the_lease(ledger):
    granted(ledger)
    ledger.renew("a", said(1), ttl_s=30, now=0)
    ledger.dispatch("a", said(2), "job", now=0)
    assert ledger.cancel("a", said(3), "other", now=0) == Stale("lease a is for job job, not other")
    assert isinstance(ledger.cancel("a", said(4), "job", now=0), Stop)
    assert ledger.live("a", fence=1, now=0).state is State.RUNNING
    assert ledger.confirm_gone("a", now=0) is True
    assert ledger.live("a", fence=1, now=0).state is State.SPENT


def test_dispatch_shrinks_the_lease_to_what_the_job_needs_but_never_grows_it(ledger):
    granted(ledger, resources=Resources(cpu=4, gpu=2))
    ledger.renew("a", said(1), ttl_s=30, now=0)
    too_much = ledger.dispatch("a", said(2), "job", now=0, resources=Resources(memory=1))
    assert too_much == Stale("lease a holds cpu 4, gpu 2; job job needs memory 1")
    assert isinstance(ledger.dispatch("a", said(2), "job", now=0, resources=NOTHING), Stale)
    assert isinstance(ledger.dispatch("a", said(3), "job", now=0, resources=ONE_GPU), Start)
    assert ledger.free(0) == Resources(cpu=3, memory=16, gpu=1)


def test_release_and_revoke_end_it_for_good_with_the_reason(ledger):
    granted(ledger, "a", fence=1)
    granted(ledger, "b", fence=2)
    ended = ledger.release("a", said(1), reason="auction lost", now=0)
    assert (ended.lease.state, ended.lease.has_process) == (State.DEAD, False)
    assert ledger.renew("a", said(9), ttl_s=30, now=0) == Gone("released: auction lost")
    assert isinstance(ledger.revoke("b", reason="shutting down", now=0), Ended)
    assert ledger.revoke("b", reason="again", now=0) == Gone("revoked: shutting down")
    assert ledger.expire(0) == ()
    assert ledger.free(0) == CAPACITY


def test_forgotten_tombstones_do_not_revive(monkeypatch):
    monkeypatch.setattr(rules, "TOMBSTONES_MAX", 2)
    ledger = Ledger(CAPACITY)
    for fence, lease_id in enumerate("abc", start=1):
        granted(ledger, lease_id, fence=fence)
        ledger.release(lease_id, said(1, fence=fence), reason=lease_id, now=0)
    assert ledger.renew("a", said(2), ttl_s=30, now=0) == Gone("no lease a")
    assert ledger.renew("b", said(2, fence=2), ttl_s=30, now=0) == Gone("released: b")
