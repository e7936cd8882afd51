"""Batch sizes: in proportion to speed, told as rounds open, steady while they are."""

from hypha.protocol.messages import Contribution, Member, Progress
from hypha.scheduler.pace import Pacing

FAST, MIDDLE, SLOW = (Member(peer_id=p, fence=1, lease_id=p) for p in ("fast", "middle", "slow"))
SAMPLE_S = {FAST: 0.01, MIDDLE: 0.02, SLOW: 0.04}
MOST = 32


def pacing(*, proportional=True):
    return Pacing(target_samples=32 * 70, batch_size=MOST, proportional=proportional)


class Clock:
    """Members that take batches of the size they are told, each sample at its own speed."""

    def __init__(self, pace, sample_s=None):
        self.pace, self.sample_s = pace, dict(sample_s or SAMPLE_S)
        self.sizes = dict.fromkeys(self.sample_s, MOST)

    def round(self, number):
        """Let every member train to its sync point; returns batches, and seconds, of each."""
        done, spent = {}, {}
        at = dict.fromkeys(self.sample_s, 0.0)
        samples, sync = dict.fromkeys(at, 0), {}
        while waiting := [m for m in at if done.setdefault(m, 0) < sync.get(m, 1 << 30)]:
            member = min(waiting, key=lambda m: at[m] + self.sizes[m] * self.sample_s[m])
            size = self.sizes[member]
            batch_s = size * self.sample_s[member]
            at[member] += batch_s
            done[member] += 1
            samples[member] += size
            told = self.pace.observe(member, report(number, done[member], samples[member], size, batch_s), at[member])
            if told is not None:
                sync[member] = told
                self.sizes[member] = self.pace.batch_size(member) or size
            spent[member] = at[member]
            if done[member] >= sync.get(member, 1 << 30):
                self.pace.contributed(contribution(member, number, samples[member]))
        return done, spent


def report(number, batches, samples, size, batch_s):
    return Progress(
        job_id="j", job_epoch=1, round=number, lease_id="l", fence=1,
        batches=batches, samples=samples, batch_size=size, batch_s=batch_s, loss=1.0,
    )  # fmt: skip


def contribution(member, number, samples):
    return Contribution(
        peer_id=member.peer_id, fence=1, lease_id=member.lease_id, round=number, base_digest="0" * 64,
        digest="0" * 64, bytes=1, samples=samples, intervals=(), loss=1.0,
    )  # fmt: skip


def test_the_first_round_has_equal_batches_and_the_next_ones_fit_the_speeds():
    clock = Clock(pacing())
    done, _ = clock.round(1)
    assert clock.sizes == {FAST: 32, MIDDLE: 32, SLOW: 32}
    assert done[FAST] > 3 * done[SLOW]
    clock.round(2)
    assert clock.sizes == {FAST: 32, MIDDLE: 16, SLOW: 8}


def test_with_fitting_batches_all_take_as_many_steps_and_end_together():
    clock = Clock(pacing())
    for number in range(1, 4):
        done, spent = clock.round(number)
    assert max(done.values()) - min(done.values()) <= 1
    assert max(spent.values()) - min(spent.values()) < 0.05 * max(spent.values())


def test_equal_is_equal():
    clock = Clock(pacing(proportional=False))
    for number in range(1, 4):
        clock.round(number)
    assert clock.sizes == {FAST: 32, MIDDLE: 32, SLOW: 32}
    assert clock.pace.batch_size(SLOW) is None


def test_a_small_difference_changes_nothing_a_larger_one_does():
    clock = Clock(pacing(), {FAST: 0.0100, SLOW: 0.0110})
    clock.round(1)
    clock.round(2)
    assert clock.sizes == {FAST: 32, SLOW: 32}
    clock.sample_s[SLOW] = 0.0125
    clock.round(3)
    clock.round(4)
    assert clock.sizes == {FAST: 32, SLOW: 26}


def test_sizes_do_not_change_while_a_round_is_open():
    clock = Clock(pacing())
    clock.round(1)
    clock.round(2)
    told = dict(clock.sizes)
    clock.sample_s[FAST] = 0.04
    clock.round(3)
    assert clock.sizes == told


def test_who_comes_later_takes_full_batches_until_it_is_measured():
    clock = Clock(pacing())
    clock.round(1)
    late = Member(peer_id="late", fence=1, lease_id="late")
    clock.pace.observe(late, report(2, 1, MOST, MOST, 0.64), 1.0)
    assert clock.pace.batch_size(late) is None
    clock.pace.observe(late, report(3, 1, MOST, MOST, 0.64), 1.0)
    assert clock.pace.batch_size(late) == 16


def test_who_has_left_sets_no_pace():
    clock = Clock(pacing())
    clock.round(1)
    clock.pace.forget(FAST)
    del clock.sample_s[FAST]
    clock.round(2)
    assert clock.sizes[MIDDLE] == 32
    assert clock.sizes[SLOW] == 16


def test_grants_are_counted_in_batches_of_the_members_size():
    clock = Clock(pacing())
    for number in (1, 2, 3):
        clock.round(number)
    pace = clock.pace
    for member in (FAST, SLOW):
        pace.observe(member, report(4, 1, clock.sizes[member], clock.sizes[member], 0.32), 0.0)
    assert pace.grant_size(FAST, 4, 0.0) == 4 * pace.grant_size(SLOW, 4, 0.0)


def test_ahead_a_part_of_what_was_done_is_granted_at_once_and_the_open_rounds_forecast_stays():
    pace = pacing()
    assert pace.size_ahead(FAST) == MOST
    pace.observe(FAST, report(1, 10, 10 * MOST, MOST, 0.3), 3.0)
    told = pace.observe(FAST, report(1, 11, 11 * MOST, MOST, 0.3), 3.3)
    assert pace.size_ahead(FAST) == 3 * MOST
    assert pace.observe(FAST, report(1, 12, 12 * MOST, MOST, 0.3), 3.6) == told
