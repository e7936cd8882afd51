"""A scheduler, a parameter server and workers over random histories: L2, L5, L6, and every round closes or says why.

Messages are lost, repeated and reordered; workers, servers and the scheduler die at any step, the scheduler also
between the manifest and the journal. After every history the network heals, and two more rounds must commit.
"""

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hypha.protocol.closing import Waiting
from tests.protocol.round_checks import check_named, check_progress, check_samples, check_steps
from tests.protocol.round_cluster import CALM_TURNS, Cluster

# Of the events of a seeded history: enough to meet every pair of faults, few enough to get on.
FAULTS = 0.15


class RoundHistory(Cluster, RuleBasedStateMachine):
    """Random faults and calm moments."""

    def __init__(self):
        RuleBasedStateMachine.__init__(self)
        Cluster.__init__(self)

    @rule(rounds=st.integers(0, 2), stop=st.integers(0, CALM_TURNS), commits=st.booleans())
    def a_calm_moment(self, rounds, stop, commits):
        for turn in [*range(CALM_TURNS)] * rounds + [*range(stop)]:
            if commits or turn != CALM_TURNS - 1:
                self.calm_turn(turn)

    @rule(data=st.data(), again=st.booleans())
    def something_arrives(self, data, again):
        if self.flight:
            self.deliver(data.draw(st.integers(0, len(self.flight) - 1)), again=again)

    @rule(count=st.integers(1, 12))
    def messages_arrive_in_order(self, count):
        for _ in range(min(count, len(self.flight))):
            self.deliver(0, again=False)

    @rule(data=st.data())
    def something_is_lost(self, data):
        lossy = self.lossy()
        if lossy:
            self.flight.pop(data.draw(st.sampled_from(lossy)))

    @rule()
    def the_view_is_sent(self):
        self.send_view()

    @rule(data=st.data(), wanted=st.integers(1, 6), answered=st.booleans())
    def a_worker_asks_for_samples(self, data, wanted, answered):
        self.ask(data.draw(st.sampled_from(self.workers + self.zombies)), wanted, answered=answered)

    @rule(data=st.data(), keep=st.integers(0, 3))
    def a_worker_contributes(self, data, keep):
        self.contribute(data.draw(st.sampled_from(self.workers + self.zombies)), keep)

    @rule(seconds=st.sampled_from([0.5, 11.0]))
    def the_scheduler_decides(self, seconds):
        self.now += seconds
        decision = self.book.decide(self.now)
        assert not isinstance(decision, Waiting) or decision.reason
        self.resend()

    @rule(crash=st.booleans())
    def the_outcome_is_committed(self, crash):
        self.commit(crash=crash)

    @rule()
    def a_worker_joins(self):
        self.worker_joins()

    @rule()
    def the_outcome_is_lost(self):
        self.lose_outcome()

    @rule()
    def the_server_dies(self):
        self.server_dies()

    @rule(adopts=st.booleans())
    def the_scheduler_dies(self, adopts):
        self.scheduler_dies(adopts=adopts)

    @rule(data=st.data())
    def a_worker_dies(self, data):
        self.worker_dies(data.draw(st.sampled_from(self.workers)))

    @invariant()
    def the_chain_is_sound(self):
        check_steps(self)
        check_samples(self)

    @invariant()
    def the_excluded_are_not_named(self):
        check_named(self)

    def teardown(self):
        check_progress(self)


RoundHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRoundHistory = RoundHistory.TestCase


class SeededHistory(Cluster):
    """Mostly calm turns, one after another, with a fault in every few: long histories reach far into the job."""

    def __init__(self, seed):
        super().__init__()
        self.random = Random(seed)
        self.turn = 0

    def run(self, events):
        faults = [
            self.something_arrives, self.something_arrives, self.something_is_lost, self.something_is_lost,
            self.a_worker_contributes_a_part, self.worker_joins, self.worker_joins, self.a_worker_leaves,
            self.lose_outcome, self.server_dies, lambda: self.scheduler_dies(adopts=self.random.random() < 0.5),
            lambda: self.commit(crash=True), self.ask_again, self.time_passes,
        ]  # fmt: skip
        for _ in range(events):
            if self.random.random() < FAULTS:
                self.random.choice(faults)()
                continue
            # Now and then the next round runs on while this one is still being made durable.
            late = self.turn == CALM_TURNS - 1 and self.random.random() < FAULTS
            self.calm_turn(0 if late else self.turn)
            self.turn = (self.turn + 1) % CALM_TURNS
            check_named(self)
        check_steps(self)
        check_samples(self)

    def something_arrives(self):
        if self.flight:
            self.deliver(self.random.randrange(len(self.flight)), again=self.random.random() < 0.5)

    def something_is_lost(self):
        if self.lossy():
            self.flight.pop(self.random.choice(self.lossy()))

    def anyone(self):
        return self.random.choice(self.workers + self.zombies)

    def a_worker_contributes_a_part(self):
        worker = self.anyone()
        self.contribute(worker, self.random.randint(0, len(worker.intervals)))

    def a_worker_leaves(self):
        self.worker_dies(self.random.choice(self.workers))

    def ask_again(self):
        self.ask(self.anyone(), self.random.randint(1, 6), answered=self.random.random() < 0.5)

    def time_passes(self):
        self.now += 11.0
        self.decide()


@pytest.mark.parametrize("seed", range(100))
def test_rounds_commit_one_after_another_through_any_faults(seed):
    history = SeededHistory(seed)
    history.run(400)
    check_progress(history)
    assert history.chain.state.samples == history.book.samples > 0
