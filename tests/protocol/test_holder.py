"""The holder's side of a lease: its transition table, its timing, and what it must never assume."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import LocalProtocolError
from hypha.protocol.holder import (
    ACCEPT_ATTEMPTS_MAX,
    ATTEMPTS_REMEMBERED_MAX,
    HOLDER_TRANSITIONS,
    HeldLease,
    HolderEvent,
    HolderState,
)
from hypha.protocol.lease import Kept, Ledger, Sender
from hypha.protocol.resources import Resources

ONE_GPU = Resources(gpu=1)
PATHS = {
    HolderState.OFFERED: [],
    HolderState.ACCEPTING: [HolderEvent.BEGIN],
    HolderState.HELD: [HolderEvent.BEGIN, HolderEvent.ANSWERED],
    HolderState.ENDED: [HolderEvent.END],
}


def offered(*, offer_ttl_s=5.0, received_at=0.0):
    return HeldLease(
        lease_id="a",
        worker="worker-1",
        fence=7,
        resources=ONE_GPU,
        job_epoch=1,
        offer_ttl_s=offer_ttl_s,
        received_at=received_at,
    )


def held(remaining_s=30.0, sent_at=0.0):
    lease = offered(received_at=sent_at)
    assert lease.answered(lease.begin_attempt(sent_at), remaining_s, sent_at)
    return lease


def apply(lease, event):
    match event:
        case HolderEvent.BEGIN:
            lease.begin_attempt(0)
        case HolderEvent.ANSWERED:
            lease.answered(1, 30, 0)
        case HolderEvent.END:
            lease.release("test")


@pytest.mark.parametrize(("state", "event"), [*itertools.product(PATHS, HolderEvent)])
def test_every_event_in_every_state_does_what_the_table_says_or_nothing(state, event):
    lease = offered()
    for step in PATHS[state]:
        apply(lease, step)
    assert lease.state is state
    if event is HolderEvent.BEGIN and (state, event) not in HOLDER_TRANSITIONS:
        with pytest.raises(LocalProtocolError):
            apply(lease, event)
    else:
        apply(lease, event)
    assert lease.state is HOLDER_TRANSITIONS.get((state, event), state)


def test_an_offer_is_not_held_until_its_renewal_is_answered():
    lease = offered()
    assert not lease.is_live(0)
    attempt = lease.begin_attempt(1)
    assert not lease.is_live(1)
    assert lease.answered(attempt, 30, 1.4)
    assert lease.is_live(1.4)
    assert lease.deadline == 1 + 0.9 * 30
    assert lease.renew_at == 1 + 0.6 * 30


def test_an_offer_that_nobody_tried_to_accept_needs_no_release():
    assert not offered().must_release


def test_an_offer_whose_acceptance_stays_unanswered_is_released_never_assumed():
    lease = offered()
    for _ in range(ACCEPT_ATTEMPTS_MAX):
        assert lease.state is not HolderState.ENDED
        now = lease.renew_at
        attempt = lease.begin_attempt(now)
        lease.unanswered(attempt, now + lease.attempt_timeout_s(now), 0.5)
    assert lease.must_release
    assert lease.reason == "no answer to 2 attempts to accept the offer"
    assert lease.next_event() is None
    assert not lease.answered(attempt, 30, now + 0.6)
    assert not lease.is_live(now + 0.6)
    assert lease.next_attempt() == attempt + 1
    lease.released()
    assert not lease.must_release


def test_a_second_attempt_may_still_accept_the_offer():
    lease = offered()
    lease.unanswered(lease.begin_attempt(0), 0.5, 0.5)
    assert lease.renew_at == 0.5 + 0.5 * 0.025 * 5
    assert lease.answered(lease.begin_attempt(0.6), 30, 0.7)
    assert lease.deadline == 0.6 + 27


def test_the_answer_to_an_earlier_attempt_counts_from_its_own_sending():
    lease = held(sent_at=0)
    early, late = lease.begin_attempt(18), lease.begin_attempt(21)
    assert lease.answered(late, 30, 21.5)
    assert lease.deadline == 21 + 27
    assert lease.answered(early, 27.5, 22)
    assert (lease.deadline, lease.renew_at) == (21 + 27, 21 + 18)
    assert lease.answered(early, 30, 22)
    assert lease.deadline == 21 + 27


def test_an_answer_after_the_deadline_or_to_nothing_revives_nothing():
    lease = held()
    attempt = lease.begin_attempt(18)
    assert not lease.answered(attempt, 30, 27)
    assert lease.state is HolderState.ENDED
    assert lease.must_release
    with pytest.raises(LocalProtocolError):
        lease.begin_attempt(28)
    other = held()
    assert other.answered(99, 1000, 1)
    assert other.deadline == 27


def test_attempts_that_are_long_forgotten_are_not_believed():
    lease = held()
    first = lease.begin_attempt(18)
    for _ in range(ATTEMPTS_REMEMBERED_MAX):
        lease.begin_attempt(18)
    lease.answered(first, 300, 18)
    assert lease.deadline == 27


def test_retries_come_until_the_deadline_and_wait_never_past_it():
    lease = held(remaining_s=30)
    now, starts = lease.renew_at, []
    while lease.next_event() is not None and now < lease.deadline:
        starts.append(now)
        attempt = lease.begin_attempt(now)
        now += lease.attempt_timeout_s(now)
        assert now <= lease.deadline
        lease.unanswered(attempt, now, 0.999)
        now = max(now, lease.renew_at)
    assert len(starts) == 3
    assert starts[0] == 18
    lease.lapse(lease.deadline)
    assert (lease.state, lease.must_release) == (HolderState.ENDED, True)


def test_only_the_newest_attempt_counts_as_unanswered():
    lease = held()
    early = lease.begin_attempt(18)
    lease.begin_attempt(20)
    renew_at = lease.renew_at
    lease.unanswered(early, 21, 0.5)
    assert lease.renew_at == renew_at


def test_gone_is_final_and_needs_no_release():
    lease = held()
    lease.gone("expired: not renewed before its deadline")
    assert not lease.is_live(1)
    assert not lease.must_release
    assert repr(lease) == "<lease a fence 7 of worker-1: ended, expired: not renewed before its deadline>"
    released = held()
    released.release("auction lost")
    released.gone("no lease a")
    assert not released.must_release
    assert released.reason == "auction lost"


def test_a_holder_that_slept_past_the_deadline_finds_it_dead():
    lease = held()
    assert lease.is_live(26.9)
    assert not lease.is_live(27)
    assert lease.lapse(60)
    assert not lease.lapse(60)


RATES = st.floats(0.95, 1.05)
TRANSIT = st.floats(0, 10)


@given(RATES, RATES, TRANSIT, TRANSIT, st.floats(0.1, 3600), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_the_holder_stops_first_whatever_the_clocks_and_the_transit(
    holder_rate, grantor_rate, there, back, ttl_s, holder_zero, grantor_zero
):
    def at_holder(t):
        return holder_zero + holder_rate * t

    def at_grantor(t):
        return grantor_zero + grantor_rate * t

    ledger = Ledger(ONE_GPU)
    ledger.grant("a", "sched-1", ONE_GPU, ttl_s=100, fence=7, now=at_grantor(0))
    lease = offered(offer_ttl_s=100, received_at=at_holder(0))
    attempt = lease.begin_attempt(at_holder(0))
    kept = ledger.renew(
        "a", Sender(peer="sched-1", fence=7, job_epoch=1, attempt=attempt), ttl_s=ttl_s, now=at_grantor(there)
    )
    assert isinstance(kept, Kept)
    lease.answered(attempt, kept.remaining_s, at_holder(there + back))
    holder_stops = (lease.deadline - holder_zero) / holder_rate
    grantor_stops = (kept.lease.deadline - grantor_zero) / grantor_rate
    assert holder_stops < grantor_stops
