"""The grantor's ledger: time-bounded leases over what a worker has (leases.md; the words are etcd's lessor's).

    FREE ──grant──▶ TEMPORARY ──renew──▶ RENEWABLE ──dispatch──▶ RUNNING ──gone──▶ SPENT
                        │                    │ └──cancel──▶ SPENT    │               │
                       die                  die                     die             die
                        ▼                    ▼                       ▼               ▼
                       DEAD                 DEAD                   ENDING ──gone──▶ DEAD

*die*: released by the holder, revoked by the grantor, or the deadline came. *gone*: the job's process group is
confirmed gone. ENDING still holds its resources; DEAD is for ever. A lease is dead AT its deadline: every method
settles the deadlines up to `now` before it answers, and `expire` says once of each lease that it died so.

A lease runs one job: SPENT has had its own. The pair (job epoch, attempt) orders what the holder sends: a lower epoch
is refused, only a renewal above the highest pair seen extends. Fences are the grantor's, strictly increasing.
"""

from collections.abc import Iterator
from enum import Enum

from msgspec import Struct
from msgspec.structs import replace

from hypha.errors import LocalProtocolError
from hypha.protocol.resources import NOTHING, Resources

# Of leases that ended, only the reason is kept, to answer late messages in words; fences keep them dead without it.
TOMBSTONES_MAX = 1024
# A worker's machine holds far fewer jobs; the bound keeps leases of tiny amounts from filling its memory.
LEASES_MAX = 4096


class State(Enum):
    """Where a lease is in its life."""

    FREE = "free"
    TEMPORARY = "temporary"
    RENEWABLE = "renewable"
    RUNNING = "running"
    SPENT = "spent"
    ENDING = "ending"
    DEAD = "dead"


class Event(Enum):
    """What moves a lease."""

    GRANT = "grant"
    RENEW = "renew"
    DISPATCH = "dispatch"
    CANCEL = "cancel"
    DIE = "die"
    GONE = "gone"


# Illegal means absent.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.FREE, Event.GRANT): State.TEMPORARY,
    (State.TEMPORARY, Event.RENEW): State.RENEWABLE,
    (State.TEMPORARY, Event.DIE): State.DEAD,
    (State.RENEWABLE, Event.RENEW): State.RENEWABLE,
    (State.RENEWABLE, Event.DISPATCH): State.RUNNING,
    # The dispatch that this cancels may still be under way: it must find the lease spent.
    (State.RENEWABLE, Event.CANCEL): State.SPENT,
    (State.RENEWABLE, Event.DIE): State.DEAD,
    (State.RUNNING, Event.RENEW): State.RUNNING,
    (State.RUNNING, Event.CANCEL): State.RUNNING,
    (State.RUNNING, Event.GONE): State.SPENT,
    (State.RUNNING, Event.DIE): State.ENDING,
    (State.SPENT, Event.RENEW): State.SPENT,
    (State.SPENT, Event.CANCEL): State.SPENT,
    (State.SPENT, Event.DIE): State.DEAD,
    (State.ENDING, Event.GONE): State.DEAD,
}
LIVING = (State.TEMPORARY, State.RENEWABLE, State.RUNNING, State.SPENT)


class Lease(Struct, frozen=True, kw_only=True):
    """One lease as it stands; `deadline` in seconds of the grantor's clock, (job_epoch, attempt) the highest seen."""

    lease_id: str
    holder: str
    resources: Resources
    fence: int
    deadline: float
    state: State
    job_epoch: int
    attempt: int = 0
    job_id: str | None = None
    reason: str = ""

    @property
    def has_process(self) -> bool:
        """Whether its job's process group may still exist, and has to be killed once the lease is dead."""
        return self.state in (State.RUNNING, State.ENDING)


class Sender(Struct, frozen=True, kw_only=True):
    """Who speaks, and how new the words are: taken from a LeaseMessage and the connection it came by."""

    peer: str
    fence: int
    job_epoch: int
    attempt: int


class NoRoom(Struct, frozen=True):
    """No grant; `ever` is False where even an idle machine could not."""

    reason: str
    ever: bool = True


class Kept(Struct, frozen=True, kw_only=True):
    """The lease lives `remaining_s` more from now. `accepted`: this renewal was the first, the offer is taken."""

    lease: Lease
    remaining_s: float
    extended: bool
    accepted: bool = False


class Gone(Struct, frozen=True):
    """No such lease for this sender, or no more: it never comes back."""

    reason: str


class Stale(Struct, frozen=True):
    """Refused: it comes from an older incarnation of the holder, or cannot be done in this state. Nothing changed."""

    reason: str


class Start(Struct, frozen=True):
    """Start the job of this lease now."""

    lease: Lease


class Already(Struct, frozen=True):
    """The same was said before: acknowledge and do nothing."""

    lease: Lease


class Ended(Struct, frozen=True):
    """The lease has died just now; where it `has_process`, kill it and then call `confirm_gone`."""

    lease: Lease


class Stop(Struct, frozen=True):
    """Kill the job of this lease now, then call `confirm_gone`; the lease lives on."""

    lease: Lease


class Ledger:
    """All leases on one worker's capacity. `now` is in seconds, of one clock that never jumps."""

    def __init__(self, capacity: Resources) -> None:
        self.capacity = capacity
        self._leases: dict[str, Lease] = {}  # in the order of their fences
        self._tombstones: dict[str, str] = {}
        self._died: list[Lease] = []
        self._fence = 0
        self._now = float("-inf")

    def grant(
        self,
        lease_id: str,
        holder: str,
        resources: Resources,
        *,
        ttl_s: float,
        fence: int,
        now: float,
        job_epoch: int = 0,
    ) -> Lease | NoRoom:
        """Lease `resources` to the peer `holder` for `ttl_s`, or say what there is too little of.

        `job_epoch` is the one advertised: what an older incarnation sends is refused from the start. Raises
        LocalProtocolError for a fence that does not rise, an id known already, or a lease on nothing.
        """
        self._settle(now)
        if fence <= self._fence or lease_id in self._leases or lease_id in self._tombstones:
            raise LocalProtocolError(f"lease {lease_id}: id and fence {fence} must be new (highest {self._fence})")
        if resources.is_zero:
            raise LocalProtocolError(f"lease {lease_id}: a lease on nothing holds nothing")
        if (no_room := self._lacks(resources)) is not None:
            return no_room
        self._fence = fence
        lease = Lease(
            lease_id=lease_id,
            holder=holder,
            resources=resources,
            fence=fence,
            deadline=self._now + ttl_s,
            state=TRANSITIONS[State.FREE, Event.GRANT],
            job_epoch=job_epoch,
        )
        self._leases[lease_id] = lease
        assert self._held().fits_in(self.capacity), "capacity exceeded"
        return lease

    def renew(self, lease_id: str, sender: Sender, *, ttl_s: float, now: float) -> Kept | Gone | Stale:
        """Extend to `now + ttl_s` where the pair is the highest yet, else answer what remains; never shortens."""
        lease = self._find(lease_id, sender, now)
        if not isinstance(lease, Lease):
            return lease
        extended = _pair(sender) > (lease.job_epoch, lease.attempt)
        if extended:
            first = lease.state is State.TEMPORARY
            deadline = max(lease.deadline, self._now + ttl_s)
            lease = self._move(replace(_seen(lease, sender), deadline=deadline), Event.RENEW)
            return Kept(lease=lease, remaining_s=lease.deadline - self._now, extended=True, accepted=first)
        return Kept(lease=lease, remaining_s=lease.deadline - self._now, extended=False)

    def dispatch(
        self, lease_id: str, sender: Sender, job_id: str, *, now: float, resources: Resources | None = None
    ) -> Start | Already | Gone | Stale:
        """Bind the one job of a lease; `resources`, if given, is what the job needs: the lease shrinks to it."""
        lease = self._find(lease_id, sender, now)
        if not isinstance(lease, Lease):
            return lease
        if lease.job_id is not None:
            if lease.job_id == job_id:
                return Already(self._store(_seen(lease, sender)))
            return Stale(f"lease {lease_id} is for job {lease.job_id}: one lease, one job")
        if (lease.state, Event.DISPATCH) not in TRANSITIONS:
            return Stale(f"lease {lease_id} is {lease.state.value}: renew it first")
        if resources is not None and (resources.is_zero or not resources.fits_in(lease.resources)):
            return Stale(f"lease {lease_id} holds {lease.resources}; job {job_id} needs {resources}")
        kept = lease.resources if resources is None else resources
        return Start(self._move(replace(_seen(lease, sender), job_id=job_id, resources=kept), Event.DISPATCH))

    def cancel(self, lease_id: str, sender: Sender, job_id: str, *, now: float) -> Stop | Already | Gone | Stale:
        """Stop the lease's job, also one whose dispatch has not come yet; the lease itself stays."""
        lease = self._find(lease_id, sender, now)
        if not isinstance(lease, Lease):
            return lease
        if lease.job_id not in (None, job_id):
            return Stale(f"lease {lease_id} is for job {lease.job_id}, not {job_id}")
        if (lease.state, Event.CANCEL) not in TRANSITIONS:
            return Stale(f"lease {lease_id} is {lease.state.value}: it has no job")
        running = lease.state is State.RUNNING
        lease = self._move(replace(_seen(lease, sender), job_id=job_id), Event.CANCEL)
        return Stop(lease) if running else Already(lease)

    def release(self, lease_id: str, sender: Sender, *, reason: str, now: float) -> Ended | Gone | Stale:
        """End the lease for its holder, whatever the attempt: a holder that released never renews again."""
        lease = self._find(lease_id, sender, now)
        if not isinstance(lease, Lease):
            return lease
        return Ended(self._die(_seen(lease, sender), f"released: {reason}"))

    def revoke(self, lease_id: str, *, reason: str, now: float) -> Ended | Gone:
        """End the lease for the grantor: it is shutting down, or the offer could not be sent."""
        self._settle(now)
        lease = self._leases.get(lease_id)
        if lease is None or lease.state not in LIVING:
            return Gone(self._why_gone(lease_id))
        return Ended(self._die(lease, f"revoked: {reason}"))

    def confirm_gone(self, lease_id: str, *, now: float) -> bool:
        """Note that the process group of the lease's job is gone; resources of a dead lease return with it.

        False, and nothing happens, where there is no such group: whoever waited and whoever killed may both say it.
        """
        self._settle(now)
        lease = self._leases.get(lease_id)
        if lease is None or (lease.state, Event.GONE) not in TRANSITIONS:
            return False
        self._move(lease, Event.GONE)
        return True

    def expire(self, now: float) -> tuple[Lease, ...]:
        """Return the leases whose deadline has come since the last call: ENDING ones have a process to kill."""
        self._settle(now)
        died, self._died = self._died, []
        return tuple(self._leases.get(lease.lease_id, replace(lease, state=State.DEAD)) for lease in died)

    def next_deadline(self) -> float | None:
        """Return when `expire` next has something to say: no later than this. None: not before the next grant."""
        if self._died:
            return self._now
        return min((lease.deadline for lease in self._living()), default=None)

    def free(self, now: float) -> Resources:
        """Return what is not held by any lease."""
        self._settle(now)
        return self.capacity.minus(self._held())

    def leases(self, now: float) -> tuple[Lease, ...]:
        """Return the leases that hold resources, ENDING ones too, in the order of their fences."""
        self._settle(now)
        return tuple(self._leases.values())

    def live(self, lease_id: str, *, fence: int, now: float) -> Lease | None:
        """Return the lease if it lives: what an effect under it has to be checked against."""
        self._settle(now)
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.fence == fence and lease.state in LIVING else None

    def _living(self) -> Iterator[Lease]:
        return (lease for lease in self._leases.values() if lease.state in LIVING)

    def _held(self) -> Resources:
        held = NOTHING
        for lease in self._leases.values():
            held = held.plus(lease.resources)
        return held

    def _lacks(self, resources: Resources) -> NoRoom | None:
        if lacking := resources.lacking_in(self.capacity):
            have = "; ".join(_of(kind, resources, self.capacity) for kind in lacking)
            return NoRoom(f"this worker has too little: {have}", ever=False)
        free = self.capacity.minus(self._held())
        if lacking := resources.lacking_in(free):
            return NoRoom("not free now: " + "; ".join(_of(kind, resources, free) for kind in lacking))
        if len(self._leases) >= LEASES_MAX:
            return NoRoom(f"{len(self._leases)} leases are the most this worker keeps")
        return None

    def _find(self, lease_id: str, sender: Sender, now: float) -> Lease | Gone | Stale:
        self._settle(now)
        lease = self._leases.get(lease_id)
        if lease is None or lease.state not in LIVING:
            return Gone(self._why_gone(lease_id))
        if lease.holder != sender.peer:
            return Gone(f"lease {lease_id} is not held by {sender.peer}")
        if lease.fence != sender.fence:
            return Gone(f"lease {lease_id} has fence {lease.fence}, not {sender.fence}")
        if sender.job_epoch < lease.job_epoch:
            return Stale(f"job epoch {sender.job_epoch} is over: lease {lease_id} is held in {lease.job_epoch}")
        return lease

    def _why_gone(self, lease_id: str) -> str:
        lease = self._leases.get(lease_id)
        return lease.reason if lease is not None else self._tombstones.get(lease_id, f"no lease {lease_id}")

    def _settle(self, now: float) -> None:
        # Time that went backwards would revive the dead.
        self._now = max(self._now, now)
        for lease in [lease for lease in self._living() if lease.deadline <= self._now]:
            self._died.append(self._die(lease, "expired: not renewed before its deadline"))

    def _die(self, lease: Lease, reason: str) -> Lease:
        return self._move(replace(lease, reason=reason), Event.DIE)

    def _move(self, lease: Lease, event: Event) -> Lease:
        state = TRANSITIONS.get((lease.state, event))
        if state is None:
            raise LocalProtocolError(f"lease {lease.lease_id} is {lease.state.value}: it cannot {event.value}")
        return self._store(replace(lease, state=state))

    def _store(self, lease: Lease) -> Lease:
        if lease.state is not State.DEAD:
            self._leases[lease.lease_id] = lease
            return lease
        del self._leases[lease.lease_id]
        self._tombstones[lease.lease_id] = lease.reason
        if len(self._tombstones) > TOMBSTONES_MAX:
            del self._tombstones[next(iter(self._tombstones))]
        return lease


def _pair(sender: Sender) -> tuple[int, int]:
    return sender.job_epoch, sender.attempt


def _seen(lease: Lease, sender: Sender) -> Lease:
    job_epoch, attempt = max((lease.job_epoch, lease.attempt), _pair(sender))
    return replace(lease, job_epoch=job_epoch, attempt=attempt)


def _of(kind: str, wanted: Resources, there: Resources) -> str:
    return f"{kind} {getattr(wanted, kind):g} wanted, {getattr(there, kind):g} there"
