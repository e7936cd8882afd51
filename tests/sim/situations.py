"""Which rare situations a simulated cluster has been in, told from messages answered and from the state of the roles.

    event of the fabric ─┐
    request answered ────┼─▶ Situations.reached          beside what roles log (`chronicle`); all names: `kinds`
    state, every event ──┘

A situation is counted once for each time that it is entered.
"""

from collections import Counter
from typing import TYPE_CHECKING

from hypha.network.memory_faults import Event
from hypha.protocol.messages import (
    Failure,
    LeaseGone,
    Member,
    Message,
    NoMore,
    Renewed,
    RenewLease,
    RoundView,
    SliceGrant,
    SliceRequest,
    WorkerOffer,
)
from tests.sim.machines import Machine, WorkerMachine

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

LOST = ("lost", "cut")


class Situations:
    """The situations of one cluster."""

    def __init__(self, cluster: "Cluster") -> None:
        self.reached: Counter[str] = Counter()
        self._cluster = cluster
        self._accepted: set[str] = set()
        self._offered: set[str] = set()
        self._granted: set[tuple[str, int]] = set()
        self._acceptance: tuple[str, str] | None = None  # the answer to it leaves now, from and to
        self._rounds: dict[tuple[int, int], set[Member]] = {}  # members by (job epoch, round)
        self._counted: set[Member] = set()
        self._servers: set[Member] = set()
        self._deposed: set[Member] = set()
        cluster.fabric.on_event(self._event)

    def counts(self) -> dict[str, int]:
        """How often each was reached; those that were not are left out."""
        counted = self.reached + self._cluster.chronicle.situations()
        return {name: count for name, count in sorted(counted.items()) if count}

    # --- messages -------------------------------------------------------------------------------------------------

    def answered(self, asker: str, answerer: str, message: Message, answer: Message) -> None:
        """Look at a request at the moment it took effect."""
        match message, answer:
            case RenewLease(lease_id=lease_id), Renewed() if lease_id not in self._accepted:
                self._accepted.add(lease_id)
                self._acceptance = (answerer, asker)
            case RenewLease(), LeaseGone(reason=reason):
                self._renewed_too_late(reason)
            case WorkerOffer(lease_id=lease_id), _:
                self.reached["duplicated offer"] += lease_id in self._offered
                self._offered.add(lease_id)
            case RoundView(), Failure(code="stale"):
                self.reached["stale view refused"] += 1
            case SliceRequest(lease_id=lease_id), SliceGrant(round=round_):
                self._granted.add((lease_id, round_))
            case SliceRequest(lease_id=lease_id), NoMore(round=round_):
                self.reached["end of epoch with a starved worker"] += (lease_id, round_) not in self._granted
                self._granted.add((lease_id, round_))

    def _renewed_too_late(self, reason: str) -> None:
        if reason.startswith("expired"):
            self.reached["renewal after the deadline refused"] += 1
        elif reason.startswith("released"):
            self.reached["release racing renewal"] += 1

    def _event(self, event: Event) -> None:
        acceptance, self._acceptance = self._acceptance, None
        if (event.src, event.dst) == acceptance and event.what == "RenewLease reply" and event.outcome in LOST:
            self.reached["lost acceptance reply"] += 1

    # --- state ----------------------------------------------------------------------------------------------------

    def dies(self, machine: Machine) -> None:
        """A machine is about to crash."""
        if not isinstance(machine, WorkerMachine):
            return
        if any(executor.is_sending for executor in machine.executors()):
            networks = [each for each in self._cluster.fabric.up() if each.peer_id == machine.name]
            is_open = any(not stream.closed for network in networks for stream in network._streams)
            self.reached["worker dead in mid-push"] += is_open

    def look(self) -> None:
        """Look at what the schedulers count on."""
        for machine in self._cluster.schedulers:
            coordinator = machine.scheduler.coordinator if machine.scheduler is not None else None
            if not machine.is_up or coordinator is None:
                continue
            book = coordinator.book
            self._look_at_members((book.job_epoch, book.round), book.members)
            if book.servers and not self._servers >= set(book.servers):
                self._look_at_servers(set(book.servers))

    def _look_at_members(self, when: tuple[int, int], members: set[Member]) -> None:
        known = self._rounds.setdefault(when, set())
        new = members - known
        if not new:
            return
        if known and when > (1, 1):
            self.reached["late joiner ready in mid-round"] += len(new - self._counted)
        known |= new
        self._counted |= new

    def _look_at_servers(self, servers: set[Member]) -> None:
        for old in self._servers - servers - self._deposed:
            machine = self._cluster.machines[old.peer_id]
            assert isinstance(machine, WorkerMachine)
            if machine.is_up and any(executor.what.lease_id == old.lease_id for executor in machine.executors()):
                self._deposed.add(old)
                self.reached["deposed parameter server"] += 1
        self._servers = servers
