"""The slice table by example: who gets what, what comes back, and every transition of a sample."""

import pytest

from hypha.errors import ConfigError, LocalProtocolError
from hypha.protocol.messages import INTERVALS_PER_CONTRIBUTION_MAX, Contribution, Interval, Member, SliceRef
from hypha.protocol.slices import Grant, Later, SliceTable

A = Member(peer_id="a", fence=1, lease_id="lease-a")
B = Member(peer_id="b", fence=1, lease_id="lease-b")


def refs(*samples):
    return [SliceRef(name=f"s{n}", samples=count, bytes=1, digest="0" * 64) for n, count in enumerate(samples)]


def piece(number, start, stop, epoch=0):
    return Interval(epoch=epoch, slice=number, start=start, stop=stop)


def contribution(member, *intervals, round=1, samples=None):
    return Contribution(
        peer_id=member.peer_id,
        fence=member.fence,
        lease_id=member.lease_id,
        round=round,
        base_digest="b" * 64,
        digest="d" * 64,
        bytes=1,
        samples=sum(i.samples for i in intervals) if samples is None else samples,
        intervals=intervals,
    )


def test_a_member_reads_its_slice_to_the_end_before_it_goes_on_to_the_next():
    table = SliceTable(refs(10, 10))
    granted = [table.grant(A, round=1, request=n, wanted=4) for n in range(4)]
    assert granted == [piece(0, 0, 4), piece(0, 4, 8), piece(0, 8, 10), piece(1, 0, 4)]


def test_members_read_different_slices_while_there_are_enough():
    table = SliceTable(refs(10, 10, 10))
    assert [table.grant(m, round=1, request=n, wanted=4).slice for n in range(2) for m in (A, B)] == [0, 1, 0, 1]


def test_members_share_the_slice_with_most_left_when_there_are_too_few():
    table = SliceTable(refs(10))
    table.grant(A, round=1, request=0, wanted=4)
    assert table.grant(B, round=1, request=0, wanted=4) == piece(0, 4, 8)
    assert table.grant(A, round=1, request=1, wanted=4) == piece(0, 8, 10)


def test_a_repeated_request_gets_the_same_grant_whatever_it_wants():
    table = SliceTable(refs(10))
    first = table.grant(A, round=1, request=0, wanted=4)
    table.grant(A, round=1, request=1, wanted=4)
    assert table.grant(A, round=1, request=0, wanted=9) == first
    assert table.samples_assigned == 8


def test_a_repeated_request_in_a_later_round_is_a_new_one():
    table = SliceTable(refs(10))
    assert table.grant(A, round=1, request=0, wanted=4) == piece(0, 0, 4)
    assert table.grant(A, round=2, request=0, wanted=4) == piece(0, 4, 8)


def test_no_more_means_all_samples_are_used_or_assigned_in_this_round():
    table = SliceTable(refs(4))
    table.grant(A, round=1, request=0, wanted=4)
    assert table.grant(B, round=1, request=0, wanted=1) is None


def test_a_starved_round_after_an_uncommitted_one_is_told_to_ask_later():
    table = SliceTable(refs(4))
    granted = table.grant(A, round=1, request=0, wanted=4)
    assert table.grant(A, round=2, request=0, wanted=1) == Later(
        reason="the rest of epoch 0 is in round 1, which is not committed yet"
    )
    table.commit(1, [contribution(A, granted)])
    assert table.grant(A, round=2, request=0, wanted=1) == piece(0, 0, 1, epoch=1)


def test_the_next_epoch_begins_only_when_every_sample_is_used():
    table = SliceTable(refs(4))
    first = table.grant(A, round=1, request=0, wanted=3)
    table.commit(1, [contribution(A, first)])
    assert table.epoch == 0
    last = table.grant(A, round=2, request=0, wanted=3)
    assert last == piece(0, 3, 4)
    table.commit(2, [contribution(A, last, round=2)])
    assert (table.epoch, table.samples_used, table.used()) == (1, 0, ())


def test_what_a_contribution_leaves_of_its_grant_returns_when_it_is_settled():
    table = SliceTable(refs(10))
    table.grant(A, round=1, request=0, wanted=8)
    done = contribution(A, piece(0, 0, 3))
    assert table.settle(done) == (piece(0, 3, 8),)
    assert table.held(A, 1) == (piece(0, 0, 3),)
    assert table.settle(done) == ()
    assert table.grant(B, round=1, request=0, wanted=9) == piece(0, 3, 10)


def test_a_commit_returns_all_grants_of_its_round_that_nobody_named():
    table = SliceTable(refs(10))
    used = table.grant(A, round=1, request=0, wanted=4)
    table.grant(B, round=1, request=0, wanted=4)
    ahead = table.grant(A, round=2, request=0, wanted=1)
    assert table.commit(1, [contribution(A, used)]) == (piece(0, 4, 8),)
    assert table.used() == (used,)
    assert table.held(A, 2) == (ahead,)


def test_returned_samples_are_granted_before_untouched_slices():
    table = SliceTable(refs(10, 10, 10))
    table.grant(A, round=1, request=0, wanted=5)
    table.forget(A)
    assert table.return_member(A, 1) == (piece(0, 0, 5),)
    assert table.grant(B, round=1, request=0, wanted=20) == piece(0, 0, 10)


def test_the_rest_of_a_slice_whose_reader_left_is_granted_to_others():
    table = SliceTable(refs(10))
    table.grant(A, round=1, request=0, wanted=5)
    table.forget(A)
    assert table.grant(B, round=1, request=0, wanted=20) == piece(0, 5, 10)


def test_a_contribution_of_another_round_cannot_be_committed():
    table = SliceTable(refs(10))
    ahead = table.grant(A, round=2, request=0, wanted=5)
    with pytest.raises(LocalProtocolError):
        table.commit(1, [contribution(A, ahead, round=2)])
    assert table.held(A, 2) == (ahead,)


def test_an_empty_contribution_needs_no_grant():
    table = SliceTable(refs(10))
    assert table.check(contribution(A)) is None
    assert table.settle(contribution(A)) == ()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (contribution(A, piece(0, 0, 4), samples=5), "it says 5 samples, its intervals hold 4"),
        (contribution(A, piece(0, 0, 3), piece(0, 2, 4)), "overlap"),
        (contribution(A, piece(0, 0, 4, epoch=1)), "is not of epoch 0"),
        (contribution(A, piece(0, 0, 5)), "[0, 5) of slice 0 in epoch 0 is not assigned to lease lease-a in round 1"),
        (contribution(A, piece(7, 0, 4)), "is not assigned"),
        (contribution(A, piece(0, 0, 4), round=2), "is not assigned to lease lease-a in round 2"),
        (contribution(B, piece(0, 0, 4)), "is not assigned to lease lease-b"),
        (
            contribution(Member(peer_id="a", fence=2, lease_id="lease-a"), piece(0, 0, 4)),
            "is not assigned to lease lease-a",
        ),
    ],
)
def test_a_contribution_is_refused_unless_every_interval_is_assigned_to_its_lease_and_round(bad, reason):
    table = SliceTable(refs(10))
    table.grant(A, round=1, request=0, wanted=4)
    before = table.snapshot()
    assert reason in table.check(bad)
    with pytest.raises(LocalProtocolError):
        table.commit(bad.round, [bad])
    with pytest.raises(LocalProtocolError):
        table.settle(bad)
    assert table.snapshot() == before


def test_two_contributions_of_one_lease_cannot_be_committed_together():
    table = SliceTable(refs(10))
    table.grant(A, round=1, request=0, wanted=4)
    with pytest.raises(LocalProtocolError):
        table.commit(1, [contribution(A, piece(0, 0, 2)), contribution(A, piece(0, 2, 4))])
    assert table.used() == ()


def test_a_grant_may_not_make_a_contribution_longer_than_a_message_can_list():
    table = SliceTable(refs(4 * INTERVALS_PER_CONTRIBUTION_MAX))
    for request in range(INTERVALS_PER_CONTRIBUTION_MAX):
        table.grant(A, round=1, request=request, wanted=1)
        table.grant(B, round=1, request=request, wanted=1)
    assert len(table.held(A, 1)) == INTERVALS_PER_CONTRIBUTION_MAX
    assert table.grant(A, round=1, request=INTERVALS_PER_CONTRIBUTION_MAX, wanted=1) is None


def test_a_dataset_without_samples_is_refused():
    with pytest.raises(ConfigError, match="no training samples"):
        SliceTable(refs(0, 0))


def test_empty_slices_are_passed_over():
    table = SliceTable(refs(0, 3, 0, 2))
    taken = [table.grant(A, round=1, request=n, wanted=9) for n in range(3)]
    assert taken == [piece(1, 0, 3), piece(3, 0, 2), None]


def test_a_later_grant_in_the_journal_takes_from_an_earlier_one():
    grants = [
        Grant(member=A, round=1, request=0, interval=piece(0, 0, 8)),
        Grant(member=B, round=1, request=0, interval=piece(0, 5, 9)),
    ]
    table = SliceTable.restore(refs(10), epoch=0, used=[piece(0, 0, 2)], grants=grants)
    assert table.held(A, 1) == (piece(0, 2, 5),)
    assert table.held(B, 1) == (piece(0, 5, 9),)
    assert table.grant(B, round=1, request=0, wanted=1) == piece(0, 5, 9)
    assert table.grant(B, round=1, request=1, wanted=4) == piece(0, 9, 10)


def test_grants_of_committed_rounds_and_other_epochs_are_void_after_a_restart():
    grants = [
        Grant(member=A, round=1, request=0, interval=piece(0, 0, 8)),
        Grant(member=B, round=2, request=0, interval=piece(0, 0, 4, epoch=1)),
    ]
    table = SliceTable.restore(refs(10), epoch=0, used=[piece(0, 0, 2)], grants=grants, committed=1)
    assert table.holders() == []


def test_a_finished_epoch_is_restored_as_the_start_of_the_next():
    table = SliceTable.restore(refs(4, 4), epoch=3, used=[piece(0, 0, 4, epoch=3), piece(1, 0, 4, epoch=3)])
    assert table.grant(A, round=9, request=0, wanted=1) == piece(0, 0, 1, epoch=4)


@pytest.mark.parametrize("used", [piece(0, 0, 5), piece(9, 0, 1), piece(0, 0, 1, epoch=1)])
def test_used_samples_that_the_dataset_does_not_have_are_refused(used):
    with pytest.raises(LocalProtocolError):
        SliceTable.restore(refs(4), epoch=0, used=[used])


# One sample, one member: what each event makes of each state. Absent: the event is refused and changes nothing.
TRANSITIONS = {
    ("available", "grant"): "assigned",
    ("available", "settle empty"): "available",
    ("available", "commit without"): "available",
    ("available", "return"): "available",
    ("assigned", "grant"): "assigned",
    ("assigned", "settle named"): "assigned",
    ("assigned", "settle empty"): "available",
    ("assigned", "commit named"): "used",
    ("assigned", "commit without"): "available",
    ("assigned", "return"): "available",
    ("used", "grant"): "used",
    ("used", "settle empty"): "used",
    ("used", "commit without"): "used",
    ("used", "return"): "used",
}
EVENTS = {
    "grant": lambda table: table.grant(A, round=1, request=0, wanted=1),
    "settle named": lambda table: table.settle(contribution(A, piece(0, 0, 1))),
    "settle empty": lambda table: table.settle(contribution(A)),
    "commit named": lambda table: table.commit(1, [contribution(A, piece(0, 0, 1))]),
    "commit without": lambda table: table.commit(1, []),
    "return": lambda table: table.return_member(A, 1),
}


def table_in(state):
    """A two-sample table whose first sample is in `state`; the second is B's, so that the epoch does not end."""
    used = [piece(0, 0, 1)] if state == "used" else []
    grants = [Grant(member=B, round=2, request=0, interval=piece(0, 1, 2))]
    if state == "assigned":
        grants.append(Grant(member=A, round=1, request=0, interval=piece(0, 0, 1)))
    return SliceTable.restore(refs(2), epoch=0, used=used, grants=grants)


def state_of(table):
    if piece(0, 0, 1) in table.used():
        return "used"
    return "assigned" if piece(0, 0, 1) in table.held(A, 1) else "available"


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", ["available", "assigned", "used"])
def test_every_event_in_every_state(state, event):
    table = table_in(state)
    assert state_of(table) == state
    if (state, event) in TRANSITIONS:
        EVENTS[event](table)
        assert state_of(table) == TRANSITIONS[state, event]
    else:
        with pytest.raises(LocalProtocolError):
            EVENTS[event](table)
        assert state_of(table) == state
