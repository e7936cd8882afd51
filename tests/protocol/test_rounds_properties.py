"""A scheduler, a parameter server and workers over random histories: L2, L5, L6, and every round closes or says why.

Messages are lost, repeated and reordered; workers, servers and the scheduler die at any step, the scheduler also
between the manifest and the journal. After every history the network heals, and two more rounds must commit.
"""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hypha.protocol.manifest import from_bytes, replay
from hypha.protocol.rounds import Waiting
from hypha.protocol.tally import Exclude
from tests.protocol.round_cluster import CALM_TURNS, SLICES, TOTAL, Cluster, digest_of, model_after


class RoundHistory(Cluster, RuleBasedStateMachine):
    """Random faults and calm moments."""

    def __init__(self):
        RuleBasedStateMachine.__init__(self)
        Cluster.__init__(self)

    @rule(turns=st.lists(st.integers(0, CALM_TURNS - 1), min_size=1, max_size=4), rounds=st.integers(0, 2))
    def a_calm_moment(self, turns, rounds):
        for turn in [*range(CALM_TURNS)] * rounds + sorted(turns):
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

    def lossy(self):
        """What crosses the network; a merge ends inside its server."""
        return [at for at, message in enumerate(self.flight) if message[0] != "merge_done"]

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
        if len(self.workers) > 1:
            worker = data.draw(st.sampled_from(self.workers))
            self.workers.remove(worker)
            self.zombies = [*self.zombies[-1:], worker]
            self.write(self.book.lease_died(worker.member))

    @invariant()
    def each_outer_step_has_one_committed_successor_made_from_its_contributions(self):
        rounds = [entry for entry in map(from_bytes, self.entries) if hasattr(entry, "merged")]
        assert [entry.merged.round for entry in rounds] == list(range(1, len(rounds) + 1))
        model = digest_of("model 0")
        for entry in rounds:
            assert entry.merged.base_digest == model
            model = model_after(model, entry.contributions)
            assert entry.merged.model_digest == model

    @invariant()
    def each_sample_is_in_at_most_one_committed_contribution_and_in_one_by_the_end_of_its_epoch(self):
        rounds = [entry for entry in map(from_bytes, self.entries) if hasattr(entry, "merged")]
        uses = Counter(
            (i.epoch, i.slice, at)
            for entry in rounds for c in entry.contributions for i in c.intervals for at in range(i.start, i.stop)
        )  # fmt: skip
        assert all(count == 1 for count in uses.values())
        per_epoch = Counter(epoch for epoch, _, _ in uses)
        assert all(per_epoch[epoch] == TOTAL for epoch in range(max(per_epoch, default=0)))

    @invariant()
    def no_excluded_contribution_is_named_again(self):
        excluded = {(e.peer_id, e.fence, e.round) for e in self.journal if isinstance(e, Exclude)}
        if self.book.pending is not None:
            named = {(p, f, self.book.round) for p, f, _ in self.book.pending.requests[0][1].contributors}
            assert not named & excluded

    def teardown(self):
        """The network heals: nothing is lost any more, so two more rounds must commit within a bounded time."""
        replayed = replay("job", SLICES, [(digest_of(data), from_bytes(data)) for data in self.entries])
        assert replayed == self.chain.state
        wanted = self.book.committed_round + 2
        for at in reversed(self.lossy()):
            self.flight.pop(at)
        self.zombies.clear()
        for _ in range(60):
            if self.book.committed_round >= wanted:
                return
            self.heal()
        raise AssertionError(f"no progress in round {self.book.round}: {self.book.decide(self.now)} {self.book!r}")


RoundHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRoundHistory = RoundHistory.TestCase
