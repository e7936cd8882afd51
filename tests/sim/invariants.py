"""L1 to L7 of the design, as far as they can be seen from outside, looked at after every event.

    state of the roles   capacity, jobs under live leases, the holder stops first, silence frees     L1 L3 L4
    requests answered    views never go back, one Committed for each round                           L2 L5
    the chain            every new entry: who was counted, which samples, which model                L2 L5 L6
    at the end           all rounds, the reference's model, nothing left behind                      L3 L5 L6

Whatever is allowed depends on clocks, so deadlines are judged by the clock of the machine that owns them.
"""

from collections import Counter
from typing import TYPE_CHECKING

import trio

from hypha.protocol import manifest
from hypha.protocol.codec import decode
from hypha.protocol.lease import LIVING, State
from hypha.protocol.manifest import RoundCommitted
from hypha.protocol.messages import (
    Ack,
    CloseRound,
    Committed,
    Member,
    Merged,
    Message,
    RenewLease,
    RoundView,
    SliceGrant,
    SliceRequest,
)
from hypha.protocol.shards import kind_of
from hypha.scheduler.coordinator import Coordinator
from hypha.store.blobs import Artifact
from hypha.store.chain import Chain
from tests.sim.reference import Reference

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.machines import WorkerMachine

# How long after its lease's death an executor may still be there: a sweep, the kill, and a clock 5 % slow.
KILLED_WITHIN_S = 1.0


class Broken(Exception):
    """An invariant that did not hold, and how."""

    def __init__(self, invariant: str, how: str) -> None:
        super().__init__(f"{invariant}: {how}")
        self.invariant = invariant
        self.how = how


class Invariants:
    """What must hold in one cluster; `check` raises Broken."""

    def __init__(self, cluster: "Cluster") -> None:
        from tests.sim.cluster import MODEL_SEED, OUTER

        self._cluster = cluster
        self._reference = Reference(
            seed=MODEL_SEED,
            sizes=cluster.scenario.slices,
            outer=OUTER,
            shards=cluster.scenario.parameter_servers,
        )
        self._chain = Chain(cluster.scheduler.objects)
        self._rounds_told = 0
        self._members: dict[tuple[int, int], set[Member]] = {}  # by (job epoch, round): in any view of it
        self._fences: dict[tuple[str, int], str] = {}
        self._dead_since: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self._committed: dict[int, str] = {}
        self._merged: dict[tuple[int, str], str] = {}  # by close and lease
        self._seen_view: dict[str, tuple[int, int]] = {}
        self._situations: Counter[str] = Counter()

    # --- after every event ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Look at everything."""
        if self._cluster.chronicle.bugs:
            raise Broken("no handler fails", self._cluster.chronicle.bugs[0])
        for machine in self._cluster.workers:
            if machine.is_up and machine.worker is not None:
                self._check_worker(machine)
        coordinator = self._coordinator()
        if coordinator is not None:
            self._check_scheduler(coordinator)

    def _coordinator(self) -> Coordinator | None:
        machine = self._cluster.scheduler
        return machine.scheduler.coordinator if machine.is_up and machine.scheduler is not None else None

    def _check_worker(self, machine: "WorkerMachine") -> None:
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
        running = 0.0
        for lease_id in machine.launcher.running if machine.launcher is not None else ():
            found = leases.get(lease_id)
            running += 0.0 if found is None else found.resources.cpu
            self._check_executor(machine, lease_id, alive=found is not None and found.state is State.RUNNING)
        if running > worker.ledger.capacity.cpu:
            raise Broken("L1 no two jobs on one resource", f"{machine.name} runs {running:g} cores of jobs")

    def _check_executor(self, machine: "WorkerMachine", lease_id: str, *, alive: bool) -> None:
        """An executor may outlive its lease only as long as it takes to kill it, pauses not counted."""
        if alive or self._cluster.fabric.gate(machine.name).stopped:
            self._dead_since.pop(lease_id, None)
            return
        now = trio.current_time()
        since = self._dead_since.setdefault(lease_id, now)
        if now - since > KILLED_WITHIN_S:
            raise Broken("L3 a job ends with its lease", f"{lease_id} still runs {now - since:.2f} s after its lease")

    def _check_scheduler(self, coordinator: Coordinator) -> None:
        view = coordinator.book.view(coordinator.runtime.now())
        if view is not None:
            if view.round > view.committed_round + 2:
                raise Broken("L5 one step may be uncommitted", f"round {view.round} opens on {view.committed_round}")
            self._members.setdefault((view.job_epoch, view.round), set()).update(view.members)
        for leased in coordinator.pool.live():
            self._check_held(leased.member)
        self._check_chain(coordinator)

    def _check_held(self, member: Member) -> None:
        """What the holder relies on, the grantor has not ended: the holder always stops first."""
        machine = self._cluster.machines[member.peer_id]
        incarnation = f"{machine.name}.{machine.incarnation}-"
        if not machine.is_up or not member.lease_id.startswith(incarnation):
            return  # only its renewals can tell the holder of a crash
        worker = machine.worker  # type: ignore[attr-defined]
        lease = worker.ledger.live(member.lease_id, fence=member.fence, now=machine.runtime.now())
        if lease is None:
            raise Broken("L1 the holder stops before the grantor", f"{member.lease_id} is over at {machine.name} only")

    def _check_chain(self, coordinator: Coordinator) -> None:
        told = self._cluster.chronicle.said["Round committed"]
        if told != self._rounds_told:
            self._rounds_told = told
            self._read_on(coordinator)

    def _read_on(self, coordinator: Coordinator) -> None:
        for link in self._chain.refresh():
            entry = manifest.from_bytes(link.payload)
            if isinstance(entry, RoundCommitted):
                self._check_round(entry, coordinator)

    def _check_round(self, entry: RoundCommitted, coordinator: Coordinator) -> None:
        faults = self._reference.commit(entry)
        round_, epoch = entry.merged.round, entry.job_epoch
        members = self._members.get((epoch, round_), set())
        for each in entry.contributions:
            member = Member(peer_id=each.peer_id, fence=each.fence, lease_id=each.lease_id)
            if member not in members:
                faults.append(f"L2: {member.lease_id} was never counted in round {round_} of epoch {epoch}")
            if not coordinator.pool.is_live(member):
                self._situations["contribution of a dead lease"] += 1
            if not each.samples:
                self._situations["empty contribution"] += 1
        if len(entry.contributions) < len(members):
            self._situations["round closed without a member"] += 1
        if faults:
            raise Broken("the chain", "; ".join(faults))

    # --- with every answer ----------------------------------------------------------------------------------------

    def answered(self, asker: str, answerer: str, request: bytes, reply: bytes) -> None:
        """Look at a request at the moment it took effect."""
        message = decode(request)
        if isinstance(message, RenewLease):
            self._heard[message.lease_id] = self._cluster.machines[answerer].runtime.now()
        elif isinstance(message, Committed):
            self._look_at_commit(message)
        elif isinstance(message, CloseRound):
            self._look_at_merge(message, decode(reply))
        elif isinstance(message, SliceRequest):
            self._look_at_grant(decode(reply))
        elif isinstance(message, RoundView) and isinstance(decode(reply), Ack):
            self._look_at_view(answerer, message)

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

    def _look_at_grant(self, answer: Message) -> None:
        if isinstance(answer, SliceGrant) and (twice := self._reference.used_of(answer.interval)):
            raise Broken("L6 a used sample is not granted", f"{twice[:4]} of epoch {answer.interval.epoch} again")

    def _look_at_view(self, answerer: str, view: RoundView) -> None:
        for executor in self._cluster.executors(answerer):
            seen = self._seen_view.get(executor.what.lease_id, (0, 0))
            if (view.job_epoch, view.view) < seen:
                raise Broken("L2 views never go back", f"{answerer} took {view.job_epoch}.{view.view} after {seen}")
            self._seen_view[executor.what.lease_id] = (view.job_epoch, view.view)

    # --- at the end -----------------------------------------------------------------------------------------------

    def at_the_end(self) -> None:
        """The job has finished and everybody had time to clear up."""
        try:
            self._look_over()
        except Broken as broken:
            self._cluster._break(broken.invariant, broken.how)

    def _look_over(self) -> None:
        scenario, reference = self._cluster.scenario, self._reference
        coordinator = self._cluster.scheduler.scheduler.coordinator  # type: ignore[union-attr]
        assert coordinator is not None
        self._read_on(coordinator)
        if reference.round != scenario.rounds:
            raise Broken("the job finishes", f"{reference.round} of {scenario.rounds} rounds are in the chain")
        if scenario.flavour == "calm" and self._cluster.chronicle.warnings:
            raise Broken("a calm run has no warnings", self._cluster.chronicle.warnings[0])
        for shard, digest in enumerate(reference.model_digests):
            kind = kind_of("model", shard)
            final = Artifact(kind=kind, round=reference.round, digest=digest)
            if final.name not in self._cluster.scheduler.objects.names(kind):
                raise Broken("the final model is stored", f"{final.name} is not there")
        if coordinator.book.samples != reference.samples:
            raise Broken("L6 samples", f"{coordinator.book.samples} counted, {reference.samples} in the chain")
        self._look_over_workers()

    def _look_over_workers(self) -> None:
        for machine in self._cluster.workers:
            if machine.left_behind():
                raise Broken("nothing is left behind", f"{machine.name} has {machine.left_behind()}")
            if machine.is_up and machine.executors():
                raise Broken("nothing is left running", f"{machine.name}: {sorted(machine.work())}")
            if machine.is_up and machine.worker is not None and machine.worker.ledger.leases(machine.runtime.now()):
                raise Broken("L3 every lease is freed", f"{machine.name} still has leases after the job")

    def situations(self) -> dict[str, int]:
        """How often rare situations were reached."""
        said = self._cluster.chronicle.situations()
        return dict(sorted((self._situations + said).items()))
