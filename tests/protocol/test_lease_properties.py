"""L1–L4 over random histories: one worker, three schedulers, clocks off by 5 %, a network that does its worst.

Everything said between holder and grantor is put into a bag. What is in the bag is delivered in any order, any number
of times, or never; old incarnations of a scheduler go on sending; process groups take their time to die.
"""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Struct

from hypha.protocol.holder import HeldLease, HolderState
from hypha.protocol.lease import Ended, Gone, Kept, Lease, Ledger, Sender, Stale, Start, State
from hypha.protocol.resources import NOTHING, Resources

CAPACITY = Resources(cpu=4, gpu=2)
OFFER_TTL_S, TTL_S = 5.0, 30.0
FORGED = 10_000
SCHEDULERS = ("sched-1", "sched-2", "sched-3")
RATES = st.floats(0.95, 1.05)
PICK = st.integers(0, 99)
TRANSIT = st.sampled_from([0.0, 0.01, 0.5, 4.0])


class Said(Struct, frozen=True):
    """A request on its way to the worker; `by` is the holder's object it was said by."""

    kind: str
    lease_id: str
    sender: Sender
    by: int


class Reply(Struct, frozen=True):
    """An answer on its way to the holder's object `to`."""

    to: int
    attempt: int
    answer: Kept | Gone | Stale


class LeaseHistory(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ledger = Ledger(CAPACITY)
        self.time = 0.0
        self.fence = 0
        self.bag: list[Said | Reply] = []
        self.delivered: list[Said] = []
        self.held: list[HeldLease] = []
        self.owner: list[str] = []
        self.epoch = dict.fromkeys(SCHEDULERS, 1)
        self.running: dict[str, Resources] = {}
        self.cancelled: set[str] = set()
        self.extended_at: dict[str, float] = {}

    @initialize(grantor=RATES, holders=st.tuples(RATES, RATES, RATES))
    def start(self, grantor, holders):
        self.grantor_rate = grantor
        self.holder_rates = dict(zip(SCHEDULERS, holders, strict=True))

    def at_grantor(self):
        return 1000 + self.grantor_rate * self.time

    def at(self, scheduler):
        return -50 + self.holder_rates[scheduler] * self.time

    def current(self, index):
        """Whether that object belongs to the living incarnation of its scheduler."""
        return self.held[index].job_epoch == self.epoch[self.owner[index]]

    def usable(self):
        """Return the places of holders' objects that have not ended: old incarnations' too."""
        for index, lease in enumerate(self.held):
            lease.lapse(self.at(self.owner[index]))
        return [index for index, lease in enumerate(self.held) if lease.state is not HolderState.ENDED]

    def picked(self, pick):
        usable = self.usable()
        return usable[pick % len(usable)]

    def begin_renewal(self, index):
        self.say("renew", index, self.held[index].begin_attempt(self.at(self.owner[index])))

    def exchange(self, index, *, there, back, keep):
        self.begin_renewal(index)
        self.time += there
        self.worker_hears(self.bag[-1] if keep else self.bag.pop())
        self.time += back
        self.holder_hears(self.bag[-1] if keep else self.bag.pop())

    def say(self, kind, index, attempt):
        lease = self.held[index]
        sender = Sender(peer=self.owner[index], fence=lease.fence, job_epoch=lease.job_epoch, attempt=attempt)
        self.bag.append(Said(kind, lease.lease_id, sender, index))

    def hold(self, lease_id, scheduler, fence, resources):
        self.held.append(
            HeldLease(
                lease_id=lease_id,
                worker="worker",
                fence=fence,
                resources=resources,
                job_epoch=self.epoch[scheduler],
                offer_ttl_s=OFFER_TTL_S,
                received_at=self.at(scheduler),
            )
        )
        self.owner.append(scheduler)

    # --- what can happen ---------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.0, 3.0, 5.0, 10.0, 18.0, 27.5, 28.5, 31.0]))
    def time_passes(self, seconds):
        self.time += seconds

    @precondition(lambda self: self.usable())
    @rule(pick=PICK, later=st.sampled_from([-1e-3, 1e-3]))
    def the_clock_nears_a_holders_deadline(self, pick, later):
        index = self.picked(pick)
        deadline = (self.held[index].deadline + 50) / self.holder_rates[self.owner[index]]
        self.time = max(self.time, deadline + later)

    @rule(scheduler=st.sampled_from(SCHEDULERS), cpu=st.integers(1, 4), gpu=st.integers(0, 2), accept=st.booleans())
    def offer(self, scheduler, cpu, gpu, accept):
        self.fence += 1
        lease_id, wanted = f"lease-{self.fence}", Resources(cpu=cpu, gpu=gpu)
        room = self.ledger.free(self.at_grantor())
        granted = self.ledger.grant(
            lease_id, scheduler, wanted, ttl_s=OFFER_TTL_S, fence=self.fence, now=self.at_grantor(), job_epoch=1
        )
        assert isinstance(granted, Lease) == wanted.fits_in(room)
        if isinstance(granted, Lease):
            self.extended_at[lease_id] = self.time
            self.hold(lease_id, scheduler, self.fence, wanted)
            if accept:
                self.exchange(len(self.held) - 1, there=0.0, back=0.0, keep=False)

    @precondition(lambda self: self.usable())
    @rule(pick=PICK)
    def renew(self, pick):
        self.begin_renewal(self.picked(pick))

    @precondition(lambda self: self.usable())
    @rule(pick=PICK, there=TRANSIT, back=TRANSIT, keep=st.booleans())
    def renew_and_be_answered(self, pick, there, back, keep):
        self.exchange(self.picked(pick), there=there, back=back, keep=keep)

    @precondition(lambda self: self.usable())
    @rule(pick=PICK, jitter=st.floats(0, 0.99))
    def give_up_waiting(self, pick, jitter):
        index = self.picked(pick)
        lease, now = self.held[index], self.at(self.owner[index])
        lease.unanswered(max(lease._sent_at, default=0), now, jitter)
        assert lease.must_release or lease.state is not HolderState.ENDED

    @precondition(lambda self: self.usable())
    @rule(
        pick=PICK, kind=st.sampled_from(["dispatch", "dispatch", "cancel"]), keep=st.booleans(), at_once=st.booleans()
    )
    def ask(self, pick, kind, keep, at_once):
        index = self.picked(pick)
        if self.held[index].is_live(self.at(self.owner[index])):
            self.say(kind, index, self.held[index].next_attempt())
            if at_once:
                self.worker_hears(self.bag[-1] if keep else self.bag.pop())

    @precondition(lambda self: self.usable())
    @rule(pick=PICK, often=st.integers(0, 3))
    def release(self, pick, often):
        if often == 0:
            index = self.picked(pick)
            self.held[index].release("test")
            self.say("release", index, self.held[index].next_attempt())

    @rule(scheduler=st.sampled_from(SCHEDULERS))
    def scheduler_restarts(self, scheduler):
        """A new epoch tries every lease it finds in its journal; the old incarnation's objects can still send."""
        mine = [lease for lease, owner in zip(self.held, self.owner, strict=True) if owner == scheduler]
        known = {lease.lease_id: lease for lease in mine}
        self.epoch[scheduler] += 1
        for lease in known.values():
            if lease.state is not HolderState.ENDED:
                self.hold(lease.lease_id, scheduler, lease.fence, lease.resources)

    @precondition(lambda self: self.bag)
    @rule(pick=PICK, keep=st.booleans())
    def deliver(self, pick, keep):
        index = pick % len(self.bag)
        message = self.bag[index] if keep else self.bag.pop(index)
        if isinstance(message, Reply):
            self.holder_hears(message)
        else:
            self.worker_hears(message)

    @precondition(lambda self: self.delivered)
    @rule(pick=PICK)
    def deliver_again(self, pick):
        self.worker_hears(self.delivered[-1 - pick % min(8, len(self.delivered))])

    @precondition(lambda self: self.usable())
    @rule(pick=PICK, kind=st.sampled_from(["renew", "dispatch", "cancel", "release"]), off=st.sampled_from([-1, 1]))
    def another_fence_is_named(self, pick, kind, off):
        lease, owner = self.held[self.picked(pick)], self.owner[self.picked(pick)]
        sender = Sender(peer=owner, fence=lease.fence + off, job_epoch=self.epoch[owner], attempt=FORGED)
        self.worker_hears(Said(kind, lease.lease_id, sender, 0))

    @precondition(lambda self: self.bag)
    @rule(pick=PICK)
    def lose(self, pick):
        self.bag.pop(pick % len(self.bag))

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def process_group_ends(self, pick):
        lease_id = sorted(self.running)[pick % len(self.running)]
        del self.running[lease_id]
        assert self.ledger.confirm_gone(lease_id, now=self.at_grantor())

    @rule()
    def sweep(self):
        for lease in self.ledger.expire(self.at_grantor()):
            assert lease.deadline <= self.at_grantor()
            assert lease.has_process == (lease.lease_id in self.running)

    # --- the rules under test, driven --------------------------------------------------------------------------------

    def worker_hears(self, said):
        now = self.at_grantor()
        before = self.ledger.leases(now)
        seen = {lease.lease_id: lease for lease in before if lease.state is not State.ENDING}
        answer = self.answer_of(said, now)
        if said in self.delivered and not isinstance(answer, Start):
            assert self.ledger.leases(now) == before, "L4: a duplicate changed something"
        assert not (said in self.delivered and isinstance(answer, Start)), "L4: a duplicate started a job"
        self.delivered.append(said)
        lease = seen.get(said.lease_id)
        if lease is None or said.sender.fence != lease.fence or said.sender.job_epoch < lease.job_epoch:
            assert isinstance(answer, Gone | Stale), "L2: what is stale was accepted"
        if isinstance(answer, Kept):
            newer = (said.sender.job_epoch, said.sender.attempt) > (lease.job_epoch, lease.attempt)
            assert answer.extended == newer, "L2: an attempt that is not the newest extended"
            if newer:
                self.extended_at[said.lease_id] = self.time
        if said.kind == "cancel" and not isinstance(answer, Gone | Stale):
            self.cancelled.add(said.lease_id)
        if isinstance(answer, Start):
            assert said.lease_id not in self.cancelled, "L4: a dispatch that its cancel overtook started a job"
            self.running[said.lease_id] = answer.lease.resources
        if said.kind == "renew" and said.sender.attempt < FORGED:
            self.bag.append(Reply(said.by, said.sender.attempt, answer))

    def answer_of(self, said, now):
        match said.kind:
            case "renew":
                return self.ledger.renew(said.lease_id, said.sender, ttl_s=TTL_S, now=now)
            case "dispatch":
                return self.ledger.dispatch(said.lease_id, said.sender, "job", now=now)
            case "cancel":
                return self.ledger.cancel(said.lease_id, said.sender, "job", now=now)
            case "release":
                return self.ledger.release(said.lease_id, said.sender, reason="test", now=now)

    def holder_hears(self, reply):
        lease, now = self.held[reply.to], self.at(self.owner[reply.to])
        over = lease.state is HolderState.ENDED or (lease.state is HolderState.HELD and not lease.is_live(now))
        if isinstance(reply.answer, Kept):
            lease.answered(reply.attempt, reply.answer.remaining_s, now)
        else:
            lease.gone(reply.answer.reason)
        assert not (over and lease.is_live(now)), "a lease revived"

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def holders_never_rely_on_the_same_resource(self):
        """L1: every live view has its own living lease at the grantor, and all of it fits in what exists."""
        relied_on = {}
        for index, lease in enumerate(self.held):
            if self.current(index) and lease.is_live(self.at(self.owner[index])):
                mine = self.ledger.live(lease.lease_id, fence=lease.fence, now=self.at_grantor())
                assert mine is not None, f"{lease!r} outlived its grant"
                assert mine.holder == self.owner[index]
                relied_on[lease.lease_id] = lease.resources
        total = NOTHING
        for resources in (relied_on | self.running).values():
            total = total.plus(resources)
        assert total.fits_in(CAPACITY)

    @invariant()
    def capacity_is_what_is_free_and_what_is_held(self):
        total = self.ledger.free(self.at_grantor())
        for lease in self.ledger.leases(self.at_grantor()):
            total = total.plus(lease.resources)
        assert total == CAPACITY
        assert self.running.keys() <= {lease.lease_id for lease in self.ledger.leases(self.at_grantor())}

    @invariant()
    def silence_frees(self):
        """L3: a lease lives no longer than one ttl of the grantor's clock after its last extension."""
        for lease in self.ledger.leases(self.at_grantor()):
            if lease.state is not State.ENDING:
                assert (self.time - self.extended_at[lease.lease_id]) * self.grantor_rate < TTL_S + 1e-6
            else:
                assert lease.lease_id in self.running

    def teardown(self):
        if not hasattr(self, "grantor_rate"):
            return
        self.time += TTL_S / 0.95
        self.ledger.expire(self.at_grantor())
        for lease_id in sorted(self.running):
            self.ledger.confirm_gone(lease_id, now=self.at_grantor())
        assert self.ledger.free(self.at_grantor()) == CAPACITY
        for said in self.delivered:
            answer = self.answer_of(said, self.at_grantor())
            assert isinstance(answer, Gone), "a dead lease revived"
            assert not isinstance(answer, Ended)


TestLeaseHistory = LeaseHistory.TestCase
TestLeaseHistory.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)


STEPS = 300
# How often each thing happens in a long history, so that jobs run, overlap with other epochs, and die in every way.
OFTEN = {
    "offer": 6,
    "renew_and_be_answered": 12,
    "renew": 6,
    "deliver": 14,
    "deliver_again": 4,
    "lose": 2,
    "ask": 10,
    "release": 2,
    "give_up_waiting": 1,
    "another_fence_is_named": 1,
    "scheduler_restarts": 2,
    "process_group_ends": 3,
    "sweep": 3,
    "the_clock_nears_a_holders_deadline": 4,
    "time_passes": 8,
}


def arguments(step, rng):
    pick, transit = rng.randrange(100), (0.0, 0.0, 0.01, 0.5, 4.0)
    return {
        "offer": {
            "scheduler": rng.choice(SCHEDULERS),
            "cpu": rng.choice((1, 1, 2)),
            "gpu": rng.choice((0, 1)),
            "accept": rng.random() < 0.7,
        },
        "renew_and_be_answered": {
            "pick": pick,
            "there": rng.choice(transit),
            "back": rng.choice(transit),
            "keep": rng.random() < 0.3,
        },
        "deliver": {"pick": pick, "keep": rng.random() < 0.2},
        "ask": {
            "pick": pick,
            "kind": rng.choice(("dispatch", "dispatch", "cancel")),
            "keep": rng.random() < 0.3,
            "at_once": rng.random() < 0.6,
        },
        "release": {"pick": pick, "often": rng.randrange(2)},
        "give_up_waiting": {"pick": pick, "jitter": rng.random()},
        "another_fence_is_named": {"pick": pick, "kind": rng.choice(("renew", "dispatch", "release")), "off": 1},
        "scheduler_restarts": {"scheduler": rng.choice(SCHEDULERS)},
        "sweep": {},
        "the_clock_nears_a_holders_deadline": {"pick": pick, "later": rng.choice((-1e-3, -1e-3, 1e-3))},
        "time_passes": {"seconds": rng.choice((0.01, 0.1, 0.5, 1.0, 3.0, 12.0))},
    }.get(step, {"pick": pick})


@pytest.mark.parametrize("seed", range(40))
def test_long_histories_keep_every_invariant(seed):
    rng = random.Random(seed)
    history = LeaseHistory()
    history.start(
        rng.choice((1.05, rng.uniform(0.95, 1.05))),
        tuple(rng.choice((0.95, rng.uniform(0.95, 1.05))) for _ in SCHEDULERS),
    )
    needs = {"deliver": history.bag, "lose": history.bag, "deliver_again": history.delivered}
    for step in rng.choices(list(OFTEN), weights=list(OFTEN.values()), k=STEPS):
        possible = {"process_group_ends": history.running, "offer": True, "sweep": True, "time_passes": True}
        possible |= {"scheduler_restarts": True} | needs
        if possible[step] if step in possible else history.usable():
            getattr(history, step)(**arguments(step, rng))
        history.holders_never_rely_on_the_same_resource()
        history.capacity_is_what_is_free_and_what_is_held()
        history.silence_frees()
    history.teardown()
    assert history.fence > 0
