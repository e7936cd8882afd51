"""L1 to L7 of the design, as far as they can be seen from outside, looked at after every event.

    state of the roles   capacity, jobs under live leases, the holder stops first, silence frees     L1 L3 L4
                         nobody's newest view goes back; what is held is of the open base            L2
    requests answered    newest epoch, fence and view only, one Committed for each round             L2 L4 L5
                         a grant is journaled before it leaves, and of no used samples               L6
    the chain            every new entry: who was counted, how many, which samples, which model      L2 L5 L6
                         what a leader takes for committed is in it, and its job epoch is its own    L5
    the journal          opened again: everything that it acknowledged is there                      L5 L6
    at the end           see `aftermath`

Whatever is allowed depends on clocks, so deadlines are judged by the clock of the machine that owns them.
"""

from typing import TYPE_CHECKING

import trio

from hypha.errors import StoreError
from hypha.protocol import manifest
from hypha.protocol.lease import LIVING, Lease, State
from hypha.protocol.manifest import JobEpochStarted, RoundCommitted
from hypha.protocol.messages import (
    Ack,
    CloseRound,
    Committed,
    Failure,
    Member,
    Merged,
    Message,
    Renewed,
    RenewLease,
    RoundView,
    SliceGrant,
    SliceRequest,
)
from hypha.protocol.rounds import RoundBook
from hypha.protocol.slices import Grant
from hypha.store.chain import Chain
from hypha.store.objects import DirectoryObjects
from hypha.worker.aggregator import AggregateSession
from hypha.worker.session import Session
from tests.sim.broken import Broken
from tests.sim.machines import SchedulerMachine, WorkerMachine, unseen
from tests.sim.reference import Reference
from tests.sim.scenario import CLOCK_DRIFT, HOLD_S

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

# How long after its lease's death an executor may still be there: a sweep, the kill, and a clock 5 % slow.
KILLED_WITHIN_S = 1.0


class Invariants:
    """What must hold in one cluster; `check` raises Broken."""

    def __init__(self, cluster: "Cluster") -> None:
        from tests.sim.cluster import MODEL_SEED, OUTER

        self._cluster = cluster
        self.reference = Reference(
            seed=MODEL_SEED,
            sizes=cluster.scenario.slices,
            outer=OUTER,
            streaming=cluster.scenario.streaming,
            shards=cluster.scenario.parameter_servers,
        )
        self._objects = DirectoryObjects(cluster.store)
        self._chain = Chain(self._objects)
        self._operations = 0
        self._chain_epoch = 0  # the newest that has begun
        self._leaders: dict[int, str] = {}  # whose each job epoch is
        self._members: dict[tuple[int, int], set[Member]] = {}  # by (job epoch, round): in any view of it
        self._fences: dict[tuple[str, int], str] = {}
        self._dead_since: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self._committed: dict[int, str] = {}
        self._merged: dict[tuple[int, str], str] = {}  # by close and lease
        self._seen_view: dict[str, tuple[int, int]] = {}
        self._standing: dict[str, tuple[int, int]] = {}  # newest view of each session, by lease
        self._epoch_since: dict[str, tuple[int, float]] = {}  # its job epoch, and since when, by lease
        self._renewed: dict[str, tuple[int, int]] = {}  # newest (job epoch, attempt) that renewed, by lease
        self.holder = ""  # who made the newest beat in the job's store
        self._beat = ("", 0.0)  # which it is, and when it was made

    # --- after every event ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Look at everything."""
        if self._cluster.chronicle.bugs:
            raise Broken("no handler fails", self._cluster.chronicle.bugs[0])
        for worker in self._cluster.workers:
            # One with neither leases nor jobs has nothing to do wrong.
            if worker.is_alive and worker.worker is not None and (worker.executors() or worker.worker.ledger._leases):
                self._check_worker(worker)
        leading = [machine for machine in self._cluster.schedulers if machine.is_leading]
        for machine in leading:
            self._check_scheduler(machine)
        if len({id(machine.disk) for machine in leading}) < len(leading):
            raise Broken("one scheduler on a journal", f"{[machine.name for machine in leading]} lead from one")
        self._check_chain()
        for machine in leading:
            self._check_committed(machine)

    def _check_worker(self, machine: WorkerMachine) -> None:
        worker, now = machine.worker, machine.runtime.now()
        assert worker is not None
        leases = {lease.lease_id: lease for lease in worker.ledger.leases(now)}
        held = sum(lease.resources.cpu for lease in leases.values())
        if held > worker.ledger.capacity.cpu:
            raise Broken("L1 no two leases on one resource", f"{machine.name} has {held:g} cores leased")
        for lease in leases.values():
            if self._fences.setdefault((machine.name, lease.fence), lease.lease_id) != lease.lease_id:
                raise Broken("fences rise for ever", f"{machine.name} grants fence {lease.fence} a second time")
            heard = self._heard.get(lease.lease_id)
            if lease.state in LIVING and heard is not None and now > heard + machine.ttl_s + KILLED_WITHIN_S:
                raise Broken("L3 silence frees a lease", f"{lease.lease_id} lives {now - heard:.1f} s after a renewal")
        self._check_jobs(machine, leases, worker.ledger.capacity.cpu - worker.ledger.free(now).cpu)

    def _check_jobs(self, machine: WorkerMachine, leases: dict[str, Lease], reserved: float) -> None:
        running = 0.0
        for executor in machine.executors():
            lease_id, found = executor.what.lease_id, leases.get(executor.what.lease_id)
            if found is None:
                raise Broken("L1 resources return after the process group", f"{lease_id} is free, and its job runs")
            running += found.resources.cpu
            self._check_executor(machine, lease_id, alive=found.state is State.RUNNING)
            self._check_session(lease_id, executor.what.session)
        if running > reserved:
            what = f"{machine.name} runs {running:g} cores of jobs, and has {reserved:g} reserved"
            raise Broken("L1 resources return after the process group", what)

    def _check_executor(self, machine: WorkerMachine, lease_id: str, *, alive: bool) -> None:
        """An executor may outlive its lease only as long as it takes to kill it, pauses not counted."""
        if alive or self._cluster.fabric.gate(machine.name).stopped:
            self._dead_since.pop(lease_id, None)
            return
        now = trio.current_time()
        since = self._dead_since.setdefault(lease_id, now)
        if now - since > KILLED_WITHIN_S:
            raise Broken("L3 a job ends with its lease", f"{lease_id} still runs {now - since:.2f} s after its lease")

    def _check_session(self, lease_id: str, session: object) -> None:
        assert isinstance(session, Session)
        if session.view is not None:
            newest, before = (session.view.job_epoch, session.view.view), self._standing.get(lease_id, (0, 0))
            if newest < before:
                raise Broken("L2 views never go back", f"{lease_id} has view {newest} after {before}")
            self._standing[lease_id] = newest
            if newest[0] != before[0]:
                self._epoch_since[lease_id] = newest[0], trio.current_time()
        collector = session._collector if isinstance(session, AggregateSession) else None
        for generation in collector._generations.values() if collector is not None else ():
            for held in generation.held.values():
                if (held.round, held.base_digest) != (generation.round, generation.base_digest):
                    raise Broken("L2 what is held is of its base", f"{held.lease_id} holds another base's update")

    def _check_scheduler(self, machine: SchedulerMachine) -> None:
        assert machine.scheduler is not None
        assert machine.scheduler.coordinator is not None
        coordinator = machine.scheduler.coordinator
        if machine.lost is not None:
            raise Broken("nothing acknowledged is lost", f"{machine.name}: {machine.lost}")
        book, view = coordinator.book, coordinator.book._view
        if view is not None:
            if view.round > book.committed_round + 2:
                raise Broken("L5 one step may be uncommitted", f"round {view.round} opens on {book.committed_round}")
            self._members.setdefault((view.job_epoch, view.round), set()).update(view.members)
        for leased in coordinator.pool.live():
            self._check_held(leased.member)
        self._check_close(book)

    def _check_close(self, book: RoundBook) -> None:
        for _, request in book.pending.requests if book.pending is not None else ():
            for peer_id, fence, _ in request.contributors:
                if faults := self._excluded(peer_id, fence, request.round):
                    raise Broken("no Close names what is excluded", faults[0])
                if (peer_id, fence, request.round) in book._excluded:  # and about to be journaled
                    raise Broken("no Close names what is excluded", f"{peer_id}/{fence} in round {request.round}")

    def _check_held(self, member: Member) -> None:
        """What the holder relies on, the grantor has not ended: the holder always stops first."""
        machine = self._cluster.machines[member.peer_id]
        incarnation = f"{machine.name}.{machine.incarnation}-"
        if not machine.is_alive or not member.lease_id.startswith(incarnation):
            return  # only its renewals can tell the holder of a crash
        worker = machine.worker  # type: ignore[attr-defined]
        lease = worker.ledger.live(member.lease_id, fence=member.fence, now=machine.runtime.now())
        if lease is None:
            raise Broken("L1 the holder stops before the grantor", f"{member.lease_id} is over at {machine.name} only")

    def _check_chain(self) -> None:
        store = self._cluster.store
        if store.operations == self._operations:
            return
        self._operations = store.operations
        with unseen(store):
            try:
                new = self._chain.refresh()
            except StoreError as error:
                raise Broken("L5 nothing committed is lost", str(error)) from error
        for link in new:
            entry = manifest.from_bytes(link.payload)
            self._chain_epoch = max(self._chain_epoch, entry.job_epoch)
            if isinstance(entry, RoundCommitted):
                self._check_round(entry)
            elif isinstance(entry, JobEpochStarted):
                self._leaders[entry.job_epoch] = entry.scheduler

    def _check_committed(self, machine: SchedulerMachine) -> None:
        """What a leader goes on from is in the chain, under a job epoch that is its own."""
        assert machine.scheduler is not None
        assert machine.scheduler.coordinator is not None
        book = machine.scheduler.coordinator.book
        if book.committed_round and self.reference.digests.get(book.committed_round) != book.committed_digest:
            what = f"{machine.name} takes round {book.committed_round} for committed, which the chain does not have so"
            raise Broken("L5 committed is what the chain has", what)
        if self._leaders.get(book.job_epoch) != machine.name:
            raise Broken("L5 a job epoch is one scheduler's", f"{machine.name} leads under epoch {book.job_epoch}")

    def _check_round(self, entry: RoundCommitted) -> None:
        faults = self.reference.commit(entry)
        round_, epoch, quorum = entry.merged.round, entry.job_epoch, self._cluster.scenario.quorum
        members = self._members.get((epoch, round_), set())
        # What was accepted outlives its sender's lease, and the scheduler that counted it.
        counted = set[Member]().union(
            *(each for (_, round_seen), each in self._members.items() if round_seen == round_)
        )
        if len(entry.contributions) < quorum:
            faults.append(f"round {round_} has {len(entry.contributions)} contributions of {quorum} for a quorum")
        for each in entry.contributions:
            member = Member(peer_id=each.peer_id, fence=each.fence, lease_id=each.lease_id)
            if member not in counted:
                faults.append(f"L2: {member.lease_id} was never counted in round {round_} up to epoch {epoch}")
            faults += self._excluded(each.peer_id, each.fence, round_)
        self._count(entry, len(members))
        if faults:
            raise Broken("the chain", "; ".join(faults))

    def _excluded(self, peer_id: str, fence: int, round_: int) -> list[str]:
        if any((peer_id, fence, round_) in machine.excluded for machine in self._cluster.schedulers):
            return [f"L6: {peer_id}/{fence} is named in round {round_}, from which it was excluded for good"]
        return []

    def _count(self, entry: RoundCommitted, members: int) -> None:
        reached = self._cluster.situations.reached
        leader = self._cluster.schedulers[-1].scheduler
        coordinator = leader.coordinator if leader is not None else None
        for each in entry.contributions:
            member = Member(peer_id=each.peer_id, fence=each.fence, lease_id=each.lease_id)
            if coordinator is not None and not coordinator.pool.is_live(member):
                reached["contribution accepted from a dead worker"] += 1
            reached["empty contribution"] += not each.samples
        reached["round closed without a member"] += len(entry.contributions) < members

    # --- with every beat ------------------------------------------------------------------------------------------

    def held(self, scheduler: str, beat: str) -> None:
        """Whoever makes the newest beat holds the job's store; from another it has it only once that has lapsed."""
        (newest, since), holder, now = self._beat, self.holder, trio.current_time()
        if beat <= newest:
            return  # a claim that came too late, and counts for nothing
        self._beat, self.holder = (beat, now), scheduler
        if holder not in ("", scheduler) and now - since < HOLD_S / (1 + CLOCK_DRIFT):
            raise Broken(
                "L5 a hold passes on once it has lapsed", f"{scheduler} has {holder}'s after {now - since:.1f} s"
            )

    # --- with every answer ----------------------------------------------------------------------------------------

    def answered(self, asker: str, answerer: str, message: Message, answer: Message) -> None:
        """Look at a request at the moment it took effect."""
        match message, answer:
            case RenewLease(), _:
                self._look_at_renewal(answerer, message, answer)
            case Committed(), _:
                self._look_at_epoch(answerer, message, answer)
                self._look_at_commit(message)
            case CloseRound(), _:
                self._look_at_epoch(answerer, message, answer)
                self._look_at_merge(message, answer)
            case SliceRequest(), SliceGrant():
                self._look_at_grant(asker, answerer, message, answer)
            case RoundView(), Ack():
                self._look_at_view(answerer, message)

    def _look_at_renewal(self, answerer: str, message: RenewLease, answer: Message) -> None:
        if not isinstance(answer, Renewed):
            return
        machine, lease_id = self._cluster.machines[answerer], message.lease_id
        assert isinstance(machine, WorkerMachine)
        assert machine.worker is not None
        lease = machine.worker.ledger._leases.get(lease_id)
        if lease is not None and lease.fence != message.fence:
            raise Broken("L2 no other fence renews", f"{lease_id} has fence {lease.fence}, and {message.fence} renews")
        attempt, newest = (message.job_epoch, message.attempt), self._renewed.get(lease_id, (0, 0))
        if attempt[0] < newest[0]:
            raise Broken("L2 no older job epoch renews", f"{lease_id}: {attempt[0]} after {newest[0]}")
        if attempt > newest:  # any other is told what remains, and adds nothing to it
            self._renewed[lease_id], self._heard[lease_id] = attempt, machine.runtime.now()

    def _look_at_epoch(self, answerer: str, message: CloseRound | Committed, answer: Message) -> None:
        """Whoever has heard of a newer job epoch does nothing for an older one."""
        machine, now = self._cluster.machines[answerer], trio.current_time()
        assert isinstance(machine, WorkerMachine)
        for executor in machine.executors():
            epoch, since = self._epoch_since.get(executor.what.lease_id, (0, now))
            # At one and the same moment either may have come first.
            if message.job_epoch < epoch and since < now and not isinstance(answer, Failure):
                what = f"{answerer} takes a {type(message).__name__} of epoch {message.job_epoch}, and knows {epoch}"
                raise Broken("L2 an older job epoch is refused", what)

    def _look_at_commit(self, message: Committed) -> None:
        known = self._committed.setdefault(message.round, message.digest)
        if known != message.digest:
            raise Broken("L5 one successor of each step", f"round {message.round} was committed twice, differently")

    def _look_at_merge(self, request: CloseRound, answer: Message) -> None:
        if isinstance(answer, Merged):
            known = self._merged.setdefault((request.close, request.lease_id), answer.model_digest)
            if known != answer.model_digest:
                raise Broken(
                    "L5 the same close, the same merge", f"close {request.close} was merged twice, differently"
                )

    def _look_at_grant(self, asker: str, answerer: str, message: SliceRequest, answer: SliceGrant) -> None:
        machine = self._cluster.machines[answerer]
        assert isinstance(machine, SchedulerMachine)
        assert machine.scheduler is not None
        assert machine.scheduler.coordinator is not None
        book = machine.scheduler.coordinator.book
        member = Member(peer_id=asker, fence=message.fence, lease_id=message.lease_id)
        grant = Grant(member=member, round=message.round, request=message.request, interval=answer.interval)
        if grant not in machine.granted:
            raise Broken("L6 a grant is journaled before it leaves", f"{asker} got {answer.interval}")
        if book.job_epoch < self._chain_epoch:
            return  # it has been deposed and is about to find out: nothing under its epoch counts
        # It took effect when it was granted; the round may have closed while the journal was written.
        # Ahead, of a round that no view has opened, a member of the round before gets them.
        first = message.round - 1 if self._cluster.scenario.overlap else message.round
        members = [self._members.get((book.job_epoch, number), ()) for number in (first, message.round)]
        if message.job_epoch != book.job_epoch or not any(member in each for each in members):
            raise Broken("L2 who is no member gets no samples", f"{asker} got some in round {message.round}")
        if twice := self.reference.used_of(answer.interval):
            raise Broken("L6 a used sample is not granted", f"{twice[:4]} of epoch {answer.interval.epoch} again")

    def _look_at_view(self, answerer: str, view: RoundView) -> None:
        machine = self._cluster.machines[answerer]
        assert isinstance(machine, WorkerMachine)
        for executor in machine.executors():
            seen = self._seen_view.get(executor.what.lease_id, (0, 0))
            if (view.job_epoch, view.view) < seen:
                raise Broken("L2 views never go back", f"{answerer} took {view.job_epoch}.{view.view} after {seen}")
            self._seen_view[executor.what.lease_id] = (view.job_epoch, view.view)

    def of_the_whole_chain(self) -> Reference:
        """Look at the chain once more, and return what it comes to."""
        self._operations = -1
        self._check_chain()
        return self.reference
