"""Sync points: everybody finishes together, with enough samples and not one batch more than needed."""

from hypothesis import given
from hypothesis import strategies as st

from hypha.protocol.forecast import Forecast, Pace, batch_sizes, grant_size, sync_points
from hypha.protocol.messages import Member

A, B, C = (Member(peer_id=p, fence=1, lease_id=p) for p in "abc")


def pace(batches, batch_size, batch_s, at=0.0):
    return Pace(batches=batches, samples=batches * batch_size, batch_size=batch_size, batch_s=batch_s, at=at)


def test_equal_members_share_equally():
    plan = sync_points(320, {A: pace(1, 16, 1.0), B: pace(1, 16, 1.0)}, now=0.0)
    assert plan.batches == {A: 10, B: 10}
    assert plan.full_in_s == 9.0


def test_a_four_times_slower_member_does_a_quarter_and_all_end_together():
    paces = {A: pace(0, 32, 1.0), B: pace(0, 32, 2.0), C: pace(0, 32, 4.0)}
    plan = sync_points(32 * 70, paces, now=0.0)
    assert plan.batches == {A: 40, B: 20, C: 10}
    assert plan.full_in_s == 40.0


def test_time_since_the_report_counts():
    plan = sync_points(320, {A: pace(9, 16, 1.0, at=5.0), B: pace(4, 16, 1.0, at=0.5)}, now=6.0)
    assert plan.batches == {A: 10, B: 10}
    assert plan.full_in_s == 0.5


def test_what_is_done_already_is_enough():
    assert sync_points(100, {A: pace(7, 16, 1.0)}, now=0.0).batches == {A: 7}


def test_everybody_does_at_least_one_batch():
    plan = sync_points(64, {A: pace(3, 16, 1.0), B: pace(0, 16, 0.0)}, now=0.0)
    assert plan.batches == {A: 3, B: 1}


def test_without_any_measurement_there_is_no_forecast():
    assert sync_points(64, {A: pace(0, 16, 0.0)}, now=0.0).full_in_s is None
    assert Forecast(64).sync_after(A, 0.0) is None


@given(
    st.integers(1, 5000),
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 64), st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0]), st.floats(-3, 0)),
        min_size=1,
        max_size=8,
    ),
)
def test_a_plan_holds_the_target_and_no_batch_more(target, measured):
    members = [Member(peer_id=f"p{n}", fence=1, lease_id="x") for n in range(len(measured))]
    paces = {m: pace(done, size, batch_s, at) for m, (done, size, batch_s, at) in zip(members, measured, strict=True)}
    plan = sync_points(target, paces, now=0.0)
    total = sum(plan.batches[m] * p.batch_size for m, p in paces.items())
    assert all(plan.batches[m] >= max(1, p.batches) for m, p in paces.items())
    more = {m: p for m, p in paces.items() if plan.batches[m] > max(1, p.batches)}
    if any(p.batch_s for p in paces.values()):
        assert total >= target
    if not more:
        return
    ends = {m: p.at + (plan.batches[m] - p.batches) * p.batch_s for m, p in paces.items() if p.batch_s}
    last = max(more, key=lambda m: ends[m])
    smallest_last = min(p.batch_size for m, p in more.items() if ends[m] > ends[last] - 1e-6)
    assert total - max(p.batch_size for p in more.values()) < target or total - smallest_last < target
    # Everybody else's next batch would end no sooner than the round does: nobody waits for longer than one batch.
    assert all(end + paces[m].batch_s >= ends[last] - 1e-6 for m, end in ends.items())


def test_a_told_sync_point_moves_only_by_more_than_one_batch():
    forecast = Forecast(320)
    forecast.measure(A, pace(1, 16, 1.0))
    forecast.measure(B, pace(1, 16, 1.0))
    assert forecast.sync_after(A, 0.0) == 10
    forecast.measure(A, pace(2, 16, 0.8, at=0.8))
    assert sync_points(320, {A: pace(2, 16, 0.8, at=0.8), B: pace(1, 16, 1.0)}, now=0.0).batches[A] == 11
    assert forecast.sync_after(A, 1.0) == 10
    forecast.measure(A, pace(3, 16, 0.25, at=2.0))
    assert forecast.sync_after(A, 2.0) > 11


def test_a_sync_point_that_was_reached_is_not_moved():
    forecast = Forecast(320)
    forecast.measure(A, pace(1, 16, 1.0))
    forecast.measure(B, pace(1, 16, 1.0))
    assert forecast.sync_after(A, 0.0) == 10
    forecast.measure(A, pace(10, 16, 0.1, at=9.0))
    forecast.gone(B)
    assert forecast.sync_after(A, 9.0) == 10


def test_a_member_that_is_gone_leaves_its_share_to_the_others():
    forecast = Forecast(320)
    forecast.measure(A, pace(1, 16, 1.0))
    forecast.measure(B, pace(1, 16, 1.0))
    forecast.gone(B)
    assert forecast.sync_after(A, 0.0) == 20


def test_what_was_contributed_counts_once_even_from_the_dead():
    forecast = Forecast(320)
    forecast.measure(A, pace(1, 16, 1.0))
    forecast.measure(B, pace(1, 16, 1.0))
    forecast.contributed(B, 96)
    forecast.contributed(B, 96)
    forecast.gone(B)
    forecast.measure(B, pace(2, 16, 1.0))
    assert forecast.sync_after(A, 0.0) == 14


def test_an_older_report_is_ignored():
    forecast = Forecast(160)
    forecast.measure(A, pace(5, 16, 1.0))
    forecast.measure(A, pace(4, 16, 9.0))
    assert forecast.plan(0.0).full_in_s == 5.0


def test_batches_are_in_proportion_to_speed():
    sizes = batch_sizes({A: 64.0, B: 16.0, C: 0.0}, batch_size_max=32)
    assert sizes == {A: 32, B: 8, C: 32}
    assert batch_sizes({A: 1000.0, B: 0.5}, batch_size_max=32) == {A: 32, B: 1}
    assert batch_sizes({A: 0.0}, batch_size_max=32) == {A: 32}


def test_a_grant_is_a_part_of_the_remaining_share_in_whole_batches():
    assert grant_size(40, pace(0, 8, 1.0), batch_size=8) == 80
    assert grant_size(40, pace(38, 8, 1.0), batch_size=8) == 8
    assert grant_size(40, pace(45, 8, 1.0), batch_size=8) == 8
    assert grant_size(None, None, batch_size=8) == 8
