"""A cluster of real rules and pretended bytes: one scheduler, one parameter server, workers, and what is in flight.

Cluster ── book, table, chain, journal   the scheduler, what its store holds
        ── server                        a Collector that merges by hashing
        ── workers, zombies              leases that live, leases that died without knowing
        ── flight                        messages; the test decides which arrive, when, how often
"""

from hashlib import sha256

from hypha.protocol.closing import Close, Waiting
from hypha.protocol.collect import Collector, MergePlan, Screening, Take
from hypha.protocol.manifest import Chain, from_bytes, to_bytes
from hypha.protocol.messages import (
    Accepted,
    Collected,
    Committed,
    Contribution,
    Interval,
    Member,
    Merged,
    PushUpdate,
    Ready,
    Rebase,
    RoundView,
    SliceRef,
    SliceRequest,
)
from hypha.protocol.rounds import RoundBook, Terms
from hypha.protocol.slices import Grant, SliceTable
from hypha.protocol.tally import Exclude
from hypha.protocol.views import Part, ViewGuard

SLICES = [SliceRef(name=f"s{n}", samples=s, bytes=1, digest="0" * 64) for n, s in enumerate((14, 9))]
TOTAL = 23
QUORUM = 2
CALM_TURNS = 10
LEASED = (Part.MEMBER, Part.FOLLOWER)


def digest_of(*parts):
    return sha256(repr(parts).encode()).hexdigest()


def model_after(base, contributions):
    return digest_of("model", base, [(c.peer_id, c.fence, c.digest) for c in contributions if c.samples])


class Worker:
    """A lease that trains: it obeys the newest view it has seen and keeps its samples when it must rebase."""

    def __init__(self, member):
        self.member = member
        self.guard = ViewGuard("job")
        self.state = None  # (round, base digest)
        self.intervals = []
        self.request = 0
        self.update = None

    def observe(self, view):
        if not self.guard.observe(view, "scheduler").changed:
            return
        if self.state is None or self.state[0] != view.round:
            self.intervals, self.request = [], 0
        if self.state != (view.round, view.base_digest) or (self.update is not None and not self.update.samples):
            self.update = None
        self.state = (view.round, view.base_digest)

    def contribute(self, keep):
        """Return the update of the open round, made from the first `keep` of its grants."""
        if self.update is None:
            used = tuple(self.intervals[:keep])
            samples = sum(i.samples for i in used)
            made = digest_of("update", self.member, self.state, used)
            self.update = Contribution(
                peer_id=self.member.peer_id, fence=self.member.fence, lease_id=self.member.lease_id,
                round=self.state[0], base_digest=self.state[1], digest=made, bytes=samples, samples=samples,
                intervals=used,
            )  # fmt: skip
        c, view = self.update, self.guard.view
        return PushUpdate(
            job_id="job", job_epoch=view.job_epoch, round=c.round, lease_id=c.lease_id, fence=c.fence, view=view.view,
            contribution=c,
        )  # fmt: skip


class Cluster:
    """The whole, one event at a time."""

    def __init__(self):
        self.now = 0.0
        self.fence = 0
        self.flight = []  # (handler name, arguments)
        self.workers = []
        self.zombies = []  # their leases are gone, they do not know
        self.server = None
        self.entries = []  # bytes: the chain
        self.journal = []  # Grant and Exclude, in order
        self.outcome = None
        self.sent = (0, 0)  # the newest view that was sent
        self.start_scheduler([])
        self.server_starts()
        for _ in range(3):
            self.worker_joins()

    def start_scheduler(self, awaited):
        chain = Chain("job", SLICES)
        for data in self.entries:
            chain.append(digest_of(data), from_bytes(data))
        self.append(chain, chain.epoch_entry(scheduler="scheduler", nonce=f"epoch-{len(self.entries)}"))
        state = self.chain.state
        grants = [line for line in self.journal if isinstance(line, Grant)]
        table = SliceTable.restore(SLICES, epoch=state.epoch, used=state.used, grants=grants, committed=state.round)
        self.book = RoundBook(
            Terms(job_id="job", updates=1000, quorum=QUORUM, deadline_s=10.0),
            job_epoch=state.job_epoch, chain=state, table=table, now=self.now, sha256=sha256,
            excluded=[line for line in self.journal if isinstance(line, Exclude)], awaited=awaited,
        )  # fmt: skip
        self.outcome = None
        self.write(self.book.orphans())

    def append(self, chain, entry):
        data = to_bytes(entry)
        chain.append(digest_of(data), entry)
        self.entries.append(data)
        self.chain = chain

    def write(self, excludes):
        for exclude in excludes:
            self.journal.append(exclude)
            self.book.excluded(exclude)

    def send_view(self):
        view = self.book.view(self.now)
        if view is not None:
            self.sent = (view.job_epoch, view.view)
            self.flight += [("view_at_worker", w, view) for w in self.workers + self.zombies]
            self.flight.append(("view_at_server", self.server, view))

    def view_at_worker(self, worker, view):
        worker.observe(view)
        if worker.member in view.followers:
            self.flight.append(("ready", worker, worker.guard.view))

    def ready(self, worker, view: RoundView):
        message = Ready(
            job_id="job", job_epoch=view.job_epoch, round=view.round - 1, lease_id=worker.member.lease_id,
            fence=worker.member.fence, digest=view.base_digest,
        )  # fmt: skip
        if self.book.check_lease(message, worker.member.peer_id, LEASED) is None:
            self.book.worker_ready(worker.member, round=message.round, digest=message.digest)

    def view_at_server(self, server, view):
        if server is self.server and server.observe(view, "scheduler").changed:
            self.report(server)

    def report(self, server):
        message = server.collected()
        if message is not None:
            self.flight.append(("collected", server, message))

    def collected(self, server, message: Collected):
        found = self.book.collected(message, server.me.peer_id)
        if isinstance(found, tuple):
            self.write(found)

    def push(self, server, push, worker):
        if server is not self.server:
            return
        answer = server.offer(push, push.contribution.peer_id)
        if isinstance(answer, Take):
            self.flight.append(("landed", server, answer.ticket))
        elif isinstance(answer, Rebase) and worker.state == (answer.round, answer.base_digest):
            worker.update = None

    def landed(self, server, ticket):
        answer = server.landed(ticket)
        if isinstance(answer, Screening):
            answer = server.screened(ticket, None)
        if isinstance(answer, Accepted):
            view = server.guard.view
            held = [c for c in server.collected().contributions if c.digest == answer.digest]
            senders = {(m.peer_id, m.fence, m.lease_id) for m in view.members}
            assert held, "accepted, yet not held"
            assert (held[0].peer_id, held[0].fence, held[0].lease_id) in senders, "L2: not of the newest view"
            assert (held[0].round, held[0].base_digest) == (view.round, view.base_digest), "L2: stale round or base"
            self.report(server)

    def close(self, server, request):
        if server is not self.server:
            return
        answer = server.close(request, "scheduler")
        if isinstance(answer, MergePlan):
            assert list(answer.inputs) == sorted(answer.inputs, key=lambda c: (c.peer_id, c.fence))
            model = model_after(answer.base_digest, answer.inputs)
            merged = Merged(
                round=answer.round, close=answer.close, base_digest=answer.base_digest, model_digest=model,
                momentum_digest=digest_of("momentum", model), record_digest=digest_of("record", model),
                update_digest=digest_of("update", model), model_bytes=1, momentum_bytes=1, record_bytes=1,
                update_bytes=1,
            )  # fmt: skip
            self.flight.append(("merge_done", server, merged))
        elif isinstance(answer, Merged):
            self.flight.append(("merged", server, answer))
        elif hasattr(answer, "retry") and not answer.retry:
            self.flight.append(("refused", request.close, answer.reason))

    def merge_done(self, server, merged):
        if server.merge_done(merged):
            self.report(server)

    def merged(self, server, merged):
        outcome = self.book.merged(server.me, merged, self.now)
        if outcome is not None and not isinstance(outcome, str):
            self.outcome = outcome

    def refused(self, close, reason):
        self.book.close_refused(close, reason)

    def committed(self, server, message):
        server.committed(message, "scheduler")

    def deliver(self, at, *, again):
        name, *arguments = self.flight[at] if again else self.flight.pop(at)
        getattr(self, name)(*arguments)
        view = self.book.view(self.now)
        if view is not None and (view.job_epoch, view.view) != self.sent:
            self.send_view()

    def lossy(self):
        """What crosses the network; a merge ends inside its server."""
        return [at for at, message in enumerate(self.flight) if message[0] != "merge_done"]

    def worker_dies(self, worker):
        if len(self.workers) > 1:
            self.workers.remove(worker)
            self.zombies = [*self.zombies[-1:], worker]
            self.write(self.book.lease_died(worker.member))

    def ask(self, worker, wanted, *, answered=True):
        view = worker.guard.view
        if view is None or worker.update is not None:
            return None
        message = SliceRequest(
            job_id="job", job_epoch=view.job_epoch, round=view.round, lease_id=worker.member.lease_id,
            fence=worker.member.fence, request=worker.request, wanted=wanted,
        )  # fmt: skip
        if self.book.check(message, worker.member.peer_id, (Part.MEMBER,)) is not None:
            return None
        granted = self.book.grant(worker.member, request=message.request, wanted=wanted)
        if isinstance(granted, Interval):
            self.journal.append(
                Grant(member=worker.member, round=view.round, request=message.request, interval=granted)
            )
            if answered and granted not in worker.intervals:
                worker.intervals.append(granted)
                worker.request += 1
        return granted

    def contribute(self, worker, keep):
        if worker.state is not None and worker.member in worker.guard.view.members:
            self.flight.append(("push", self.server, worker.contribute(keep), worker))

    def resend(self):
        pending = self.book.pending
        if isinstance(pending, Close):
            self.flight += [("close", self.server, request) for _, request in pending.requests]

    def tell_committed(self):
        self.flight.append(("committed", self.server, Committed(
            job_id="job", job_epoch=self.book.job_epoch, round=self.book.committed_round,
            digest=self.book.committed_digest or "0" * 64,
        )))  # fmt: skip

    def server_starts(self):
        """A new server restores the newest committed state from the store."""
        self.fence += 1
        me = Member(peer_id="server", fence=self.fence, lease_id=f"lease-{self.fence}")
        state = self.chain.state
        self.server = Collector("job", me, round=state.round, model_digest=state.model_digest or digest_of("model 0"))
        self.server_says_ready()

    def server_says_ready(self):
        reason = self.book.server_ready(
            self.server.me, b"address", round=self.server.round, digest=self.server.model_digest,
            momentum_digest=next(iter(self.chain.state.momenta), None), now=self.now,
        )  # fmt: skip
        assert reason is None, reason

    def heal(self):
        """One fair turn of everybody, in which nothing is lost."""
        while len(self.workers) < QUORUM:
            self.worker_joins()
        self.now += 11.0
        for turn in range(CALM_TURNS):
            self.calm_turn(turn)

    def calm_turn(self, turn):
        """Do the next thing that brings a round nearer to its end; CALM_TURNS of them make a whole round."""
        train, contribute, decide = self.all_train, self.all_contribute, self.decide
        drain, resend = self.drain, self.resend
        (self.send_view, drain, train, contribute, drain, decide, drain, resend, drain, self.commit)[turn]()

    def all_train(self):
        for worker in self.workers:
            while len(worker.intervals) < 2 and isinstance(self.ask(worker, 3), Interval):
                pass

    def all_contribute(self):
        for worker in self.workers:
            self.contribute(worker, len(worker.intervals))
        self.tell_committed()

    def decide(self):
        decision = self.book.decide(self.now)
        for member in decision.replace if isinstance(decision, Waiting) else ():
            self.workers = [worker for worker in self.workers if worker.member != member]
            self.write(self.book.lease_died(member))
            self.worker_joins()
        self.resend()

    def drain(self):
        for _ in range(2000):
            if not self.flight:
                return
            self.deliver(0, again=False)
        raise AssertionError("messages never end")

    def commit(self, *, crash=False):
        outcome = self.outcome
        if outcome is None:
            return
        entry = self.chain.round_entry(
            outcome.merged[0], outcome.contributions, job_epoch=self.book.job_epoch, nonce=f"r{len(self.entries)}"
        )
        self.append(self.chain, entry)
        if crash:
            self.scheduler_dies(adopts=True)
            return
        self.book.committed(outcome.round)
        self.outcome = None
        self.tell_committed()
        assert self.book.samples == self.chain.state.samples

    def worker_joins(self):
        if len(self.workers) < 4:
            self.fence += 1
            member = Member(peer_id="abcd"[self.fence % 4], fence=self.fence, lease_id=f"lease-{self.fence}")
            self.workers.append(Worker(member))
            self.book.lease_added(member)

    def lose_outcome(self):
        if self.outcome is not None:
            self.write(self.book.lost(self.outcome.round, self.now))
            self.outcome = None

    def server_dies(self):
        self.write(self.book.lease_died(self.server.me))
        self.lose_outcome()
        self.server_starts()

    def scheduler_dies(self, *, adopts):
        """Another incarnation reads chain and journal; leases that answer go on, the others are dead."""
        before = self.workers
        self.start_scheduler([worker.member for worker in before])
        self.workers = before if adopts else before[:1]
        for worker in before:
            if worker in self.workers:
                self.book.lease_adopted(worker.member)
            else:
                self.zombies = [*self.zombies[-1:], worker]
                self.write(self.book.lease_died(worker.member))
        view = self.book.view(self.now)
        kept = adopts and view is not None and self.server.observe(view, "scheduler").unservable is None
        if kept:
            state = self.chain.state
            message = Committed(job_id="job", job_epoch=state.job_epoch, round=state.round, digest=state.model_digest)
            kept = isinstance(self.server.committed(message, "scheduler"), tuple)
        if kept:
            self.server_says_ready()
        else:
            self.server_starts()
