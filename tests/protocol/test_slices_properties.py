"""L6 over random histories: each sample in at most one committed contribution per epoch, in exactly one by its end."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hypha.errors import LocalProtocolError
from hypha.protocol.intervals import Spans
from hypha.protocol.messages import Contribution, Interval, Member, SliceRef
from hypha.protocol.slices import Grant, SliceTable

SLICES = [SliceRef(name=f"s{n}", samples=s, bytes=1, digest="0" * 64) for n, s in enumerate((7, 0, 5, 11))]
MEMBERS = [Member(peer_id=p, fence=f, lease_id=f"{p}{f}") for p in "abc" for f in (1, 2)]
TOTAL = sum(ref.samples for ref in SLICES)


def samples_of(intervals):
    return [(i.epoch, i.slice, at) for i in intervals for at in range(i.start, i.stop)]


def contribute(member, round, intervals):
    return Contribution(
        peer_id=member.peer_id,
        fence=member.fence,
        lease_id=member.lease_id,
        round=round,
        base_digest="b" * 64,
        digest="d" * 64,
        bytes=1,
        samples=sum(i.samples for i in intervals),
        intervals=tuple(intervals),
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 6)), max_size=60))
def test_spans_behave_like_a_set_and_stay_canonical(steps):
    spans, model = Spans(), set()
    for add, start, length in steps:
        wanted = set(range(start, start + length))
        allowed = not wanted & model if add else wanted <= model
        operation = spans.add if add else spans.remove
        if allowed:
            operation(start, start + length)
            model = model | wanted if add else model - wanted
        else:
            with pytest.raises(LocalProtocolError):
                operation(start, start + length)
    pairs = list(spans)
    assert {n for a, b in pairs for n in range(a, b)} == model
    assert spans.samples == len(model)
    assert all(left[1] < right[0] for left, right in pairwise(pairs))
    assert {n for a, b in spans.within(5, 15) for n in range(a, b)} == model & set(range(5, 15))


class SliceHistory(RuleBasedStateMachine):
    """A naive model (a dict from sample to state) beside the table; rounds close, die, repeat and restart."""

    def __init__(self):
        super().__init__()
        self.table = SliceTable(SLICES)
        self.open = 1
        self.committed = 0
        self.state = {}  # sample -> ("used",) or (member, round); absent: available
        self.answers = {}  # (member, round, request) -> interval
        self.journal = []
        self.uses = Counter()

    @rule(member=st.sampled_from(MEMBERS), request=st.integers(0, 3), wanted=st.integers(1, 6))
    def grant(self, member, request, wanted):
        granted = self.table.grant(member, round=self.open, request=request, wanted=wanted)
        before = self.answers.get((member, self.open, request))
        mine = (member, self.open)
        if before is not None and all(self.state.get(s) == mine for s in samples_of([before])):
            assert granted == before
        elif isinstance(granted, Interval):
            assert 1 <= granted.samples <= wanted
            assert all(s not in self.state for s in samples_of([granted]))
            self.state.update(dict.fromkeys(samples_of([granted]), mine))
            self.answers[member, self.open, request] = granted
            self.journal.append(Grant(member=member, round=self.open, request=request, interval=granted))
        else:
            assert len(self.state) == TOTAL, "starved although samples are available"

    def held(self, member, round):
        return [s for s, owner in self.state.items() if owner == (member, round)]

    def some_of(self, data, member, round):
        held = self.table.held(member, round)
        return [
            Interval(epoch=i.epoch, slice=i.slice, start=i.start, stop=data.draw(st.integers(i.start + 1, i.stop)))
            for i in held
            if data.draw(st.booleans())
        ]

    @rule(data=st.data(), member=st.sampled_from(MEMBERS))
    def settle(self, data, member):
        kept = self.some_of(data, member, self.open)
        returned = self.table.settle(contribute(member, self.open, kept))
        left = set(self.held(member, self.open)) - set(samples_of(kept))
        assert set(samples_of(returned)) == left
        for sample in left:
            del self.state[sample]
        if not kept:
            self.forget_answers(member)

    @rule(data=st.data())
    def commit(self, data):
        round = self.committed + 1
        named = [contribute(m, round, self.some_of(data, m, round)) for m in MEMBERS if data.draw(st.booleans())]
        self.table.commit(round, named)
        for sample in (s for c in named for s in samples_of(c.intervals)):
            self.state[sample] = ("used",)
            self.uses[sample] += 1
        self.state = {s: o for s, o in self.state.items() if o == ("used",) or o[1] > round}
        self.committed = round
        self.open = max(self.open, round + 1)
        if len(self.state) == TOTAL and set(self.state.values()) == {("used",)}:
            self.state.clear()

    @precondition(lambda self: self.open == self.committed + 1)
    @rule()
    def run_ahead(self):
        self.open += 1

    @precondition(lambda self: self.open == self.committed + 2)
    @rule()
    def reopen(self):
        self.open -= 1

    @rule(member=st.sampled_from(MEMBERS))
    def lose(self, member):
        self.table.return_member(member, self.open)
        self.table.forget(member)
        for sample in self.held(member, self.open):
            del self.state[sample]
        self.forget_answers(member)

    def forget_answers(self, member):
        self.answers = {key: i for key, i in self.answers.items() if key[:2] != (member, self.open)}

    @rule()
    def restart_from_snapshot(self):
        state = self.table.snapshot()
        self.table = SliceTable.from_snapshot(SLICES, state)
        assert self.table.snapshot() == state

    @rule()
    def a_restart_from_chain_and_journal_still_accepts_what_is_assigned(self):
        other = SliceTable.restore(
            SLICES, epoch=self.table.epoch, used=self.table.used(), grants=self.journal, committed=self.committed
        )
        assert (other.epoch, other.used()) == (self.table.epoch, self.table.used())
        for member, round in self.table.holders():
            assert other.check(contribute(member, round, self.table.held(member, round))) is None

    @invariant()
    def the_table_says_what_the_model_says(self):
        assert set(samples_of(self.table.used())) == {s for s, o in self.state.items() if o == ("used",)}
        for member, round in self.table.holders():
            assert set(samples_of(self.table.held(member, round))) == set(self.held(member, round))
        assigned = [o for o in self.state.values() if o != ("used",)]
        assert self.table.samples_assigned == len(assigned)

    @invariant()
    def each_sample_is_used_at_most_once_in_an_epoch_and_once_by_its_end(self):
        assert all(count == 1 for count in self.uses.values())
        per_epoch = Counter(epoch for epoch, _, _ in self.uses)
        assert all(per_epoch[epoch] == TOTAL for epoch in range(self.table.epoch))


SliceHistory.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestSliceHistory = SliceHistory.TestCase
