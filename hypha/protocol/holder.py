"""The holder's side of a lease: when to renew, how long it may be relied on, when it is over (leases.md).

    OFFERED ──begin──▶ ACCEPTING ──answered──▶ HELD ──answered──▶ HELD
       │                  │  no answer            │  deadline, gone, release
       └──────────────────┴──────▶ ENDED ◀────────┘
                          must_release: it may have been accepted, so it has to be given back

The holder counts 0.9 × what remains from *sending* the attempt that was answered; the grantor counts the whole from
*receiving* it. With clocks 5 % fast or slow 0.9 / 0.95 < 1 / 1.05: the holder always stops first.

    sent ────────────────────── 0.6 renew ─── retries, ttl/10 each ─── 0.9 holder's deadline ─ 1.0 grantor's deadline
"""

from enum import Enum

from hypha.errors import LocalProtocolError
from hypha.protocol.resources import Resources

HOLDER_SHARE = 0.9
RENEW_SHARE = 0.6
ATTEMPT_SHARE = 0.1
# With ttl/10 per attempt this leaves room for three attempts between 0.6 and 0.9 of the ttl.
JITTER_SHARE = 0.025
# Two lost answers in a row: another worker is had sooner than a third try.
ACCEPT_ATTEMPTS_MAX = 2
# Attempts whose answer would still be believed; at ttl/10 each, older ones are answered with a time already past.
ATTEMPTS_REMEMBERED_MAX = 16


class HolderState(Enum):
    """Where the holder stands with a lease."""

    OFFERED = "offered"
    ACCEPTING = "accepting"
    HELD = "held"
    ENDED = "ended"


class HolderEvent(Enum):
    """What moves it."""

    BEGIN = "begin"
    ANSWERED = "answered"
    END = "end"


# Illegal means absent.
HOLDER_TRANSITIONS: dict[tuple[HolderState, HolderEvent], HolderState] = {
    (HolderState.OFFERED, HolderEvent.BEGIN): HolderState.ACCEPTING,
    (HolderState.OFFERED, HolderEvent.END): HolderState.ENDED,
    (HolderState.ACCEPTING, HolderEvent.BEGIN): HolderState.ACCEPTING,
    (HolderState.ACCEPTING, HolderEvent.ANSWERED): HolderState.HELD,
    (HolderState.ACCEPTING, HolderEvent.END): HolderState.ENDED,
    (HolderState.HELD, HolderEvent.BEGIN): HolderState.HELD,
    (HolderState.HELD, HolderEvent.ANSWERED): HolderState.HELD,
    (HolderState.HELD, HolderEvent.END): HolderState.ENDED,
}


class HeldLease:
    """One lease as its holder may rely on it; all times in seconds of the holder's clock.

    `offer_ttl_s` counts from `received_at`, generously: only an answered renewal makes the lease count. A restarted
    holder tries a journaled lease under its new epoch in the same way.
    """

    def __init__(
        self,
        *,
        lease_id: str,
        worker: str,
        fence: int,
        resources: Resources,
        job_epoch: int,
        offer_ttl_s: float,
        received_at: float,
    ) -> None:
        self.lease_id = lease_id
        self.worker = worker
        self.fence = fence
        self.resources = resources
        self.job_epoch = job_epoch
        self.state = HolderState.OFFERED
        self.reason = ""
        self.must_release = False
        self.deadline = received_at + HOLDER_SHARE * offer_ttl_s
        self.renew_at = received_at
        self._ttl_s = offer_ttl_s
        self._attempt = 0
        self._unanswered = 0
        self._sent_at: dict[int, float] = {}

    def __repr__(self) -> str:
        """Say what matters in a log line."""
        ended = f", {self.reason}" if self.reason else ""
        return f"<lease {self.lease_id} fence {self.fence} of {self.worker}: {self.state.value}{ended}>"

    @property
    def ttl_s(self) -> float:
        """How long the grantor last granted, in seconds; before the first answer, what it offered."""
        return self._ttl_s

    def is_live(self, now: float) -> bool:
        """Whether what is done under the lease now may count: accepted, not ended, before the deadline."""
        return self.state is HolderState.HELD and now < self.deadline

    def begin_attempt(self, now: float) -> int:
        """Return the number of the renewal to be sent now. Raises LocalProtocolError once the lease has ended."""
        self.lapse(now)
        self._move(HolderEvent.BEGIN)
        attempt = self.next_attempt()
        self._sent_at[attempt] = now
        if len(self._sent_at) > ATTEMPTS_REMEMBERED_MAX:
            del self._sent_at[next(iter(self._sent_at))]
        return attempt

    def next_attempt(self) -> int:
        """Return the number for another message under this lease (dispatch, cancel, release), also of an ended one."""
        self._attempt += 1
        return self._attempt

    def attempt_timeout_s(self, now: float) -> float:
        """Return how long to wait for the answer: a tenth of the ttl, and never past the deadline."""
        return max(0.0, min(ATTEMPT_SHARE * self._ttl_s, self.deadline - now))

    def answered(self, attempt: int, remaining_s: float, now: float) -> bool:
        """Count `remaining_s` from the sending of `attempt`; True where the lease lives by it.

        An answer to an attempt that was never sent or is long forgotten, or that comes once the lease has ended or
        its deadline has passed, changes nothing: what is over never revives.
        """
        self.lapse(now)
        sent_at = self._sent_at.get(attempt)
        if sent_at is None or (self.state, HolderEvent.ANSWERED) not in HOLDER_TRANSITIONS:
            return self.is_live(now)
        deadline = sent_at + HOLDER_SHARE * remaining_s
        # A late answer to an earlier attempt may say less than is known already; the grantor never shortens.
        if self.state is HolderState.ACCEPTING or deadline > self.deadline:
            self._move(HolderEvent.ANSWERED)
            self._unanswered = 0
            self._ttl_s = remaining_s
            self.deadline = deadline
            self.renew_at = sent_at + RENEW_SHARE * remaining_s
        self.lapse(now)
        return self.is_live(now)

    def unanswered(self, attempt: int, now: float, jitter: float) -> None:
        """Plan the next try after no answer; `jitter` in [0, 1) spreads holders that failed together.

        An offer that stays without an answer ends with `must_release`: it may or may not have been accepted.
        """
        self.lapse(now)
        if self.state is HolderState.ENDED or attempt != max(self._sent_at, default=0):
            return
        self._unanswered += 1
        if self.state is HolderState.ACCEPTING and self._unanswered >= ACCEPT_ATTEMPTS_MAX:
            self._end(f"no answer to {self._unanswered} attempts to accept the offer", must_release=True)
            return
        self.renew_at = now + jitter * JITTER_SHARE * self._ttl_s

    def gone(self, reason: str) -> None:
        """Note that the grantor knows no such lease, or refuses this epoch: nothing to release."""
        if self.state is not HolderState.ENDED:
            self._end(reason, must_release=False)
        self.must_release = False

    def release(self, reason: str) -> None:
        """Stop relying on it from now; the caller sends ReleaseLease with `next_attempt()`."""
        if self.state is not HolderState.ENDED:
            self._end(reason, must_release=True)

    def released(self) -> None:
        """Note that the grantor acknowledged the release, or that trying was given up: it expires by itself."""
        self.must_release = False

    def lapse(self, now: float) -> bool:
        """End it where its deadline has come; True where that happened just now.

        An offer whose acceptance is under way may have been accepted and has to be released; so has a held lease:
        the answers may be lost where the renewals were not.
        """
        if self.state is HolderState.ENDED or now < self.deadline:
            return False
        self._end("no renewal was answered before the deadline", must_release=True)
        return True

    def next_event(self) -> float | None:
        """Return when something is due: the next renewal or the deadline. None once it has ended."""
        return None if self.state is HolderState.ENDED else min(self.renew_at, self.deadline)

    def _end(self, reason: str, *, must_release: bool) -> None:
        self._move(HolderEvent.END)
        self.reason = reason
        self.must_release = must_release
        self._sent_at.clear()

    def _move(self, event: HolderEvent) -> None:
        state = HOLDER_TRANSITIONS.get((self.state, event))
        if state is None:
            raise LocalProtocolError(f"{self!r} cannot {event.value}")
        self.state = state
