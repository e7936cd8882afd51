"""What is to happen to whom, and when: everything drawn from the seed before anything runs.

Strike: role ── kill (SIGKILL) or stop (SIGSTOP for two ttls, then SIGCONT)
        when  ── the first moment of a kind at or after a round, and then so much more of the journal
        after ── a kill: started again after a pause, or only with the next strike
"""

import random
from typing import Literal

from msgspec import Struct

ROLES = ("gateway", "data", "worker", "executor", "parameter-server", "scheduler")
Moment = Literal["Round opened", "Round committed"]
MOMENTS: tuple[Moment, ...] = ("Round opened", "Round committed")
# Rounds between two strikes: enough to be whole again in between, most of the time.
ROUNDS_BETWEEN = 4
ROUNDS_BEFORE, ROUNDS_AFTER = 2, 4
# A grant takes about 300 bytes of the journal, a lease about 500.
JOURNAL_BYTES_MAX = 1200
# At the line itself: a round opens when the one before it is merged, and is committed within a tenth of a second.
AT_ONCE_SHARE = 0.4
STOP_SHARE, LONG_SHARE, OVERLAP_SHARE = 0.25, 0.2, 0.2
PAUSE_MAX_S = 6.0
# A scheduler that is back before its leases run out adopts them; importing takes it most of that time.
SCHEDULER_PAUSE_MAX_S = 2.0


class Strike(Struct, frozen=True, kw_only=True):
    """One blow. `pick` chooses among those who play the role then; `overlaps`: it waits for no healing."""

    number: int
    role: str
    stop: bool
    moment: Moment
    round: int
    journal_bytes: int
    pick: float
    pause_s: float
    long: bool
    overlaps: bool


def rounds_for(kills: int) -> int:
    """Return how many rounds leave room for so many strikes."""
    return ROUNDS_BEFORE + ROUNDS_BETWEEN * kills + ROUNDS_AFTER


def draw(kills: int, seed: int) -> list[Strike]:
    """Return the strikes of a seed; every role has its turn before any has two more than another.

    Fewer strikes are the first of more, so that what a long run found is found again by a shorter one.
    """
    chance = random.Random(f"roles of {seed}")
    roles: list[str] = []
    while len(roles) < kills:
        roles += chance.sample(ROLES, len(ROLES))
    return [_strike(random.Random(f"{seed}.{number}"), number, role) for number, role in enumerate(roles[:kills])]


def _strike(chance: random.Random, number: int, role: str) -> Strike:
    return Strike(
        number=number,
        role=role,
        stop=chance.random() < STOP_SHARE,
        moment=chance.choice(MOMENTS),
        round=ROUNDS_BEFORE + ROUNDS_BETWEEN * number + chance.randrange(ROUNDS_BETWEEN // 2),
        journal_bytes=0 if chance.random() < AT_ONCE_SHARE else chance.randrange(JOURNAL_BYTES_MAX),
        pick=chance.random(),
        pause_s=chance.uniform(0.0, SCHEDULER_PAUSE_MAX_S if role == "scheduler" else PAUSE_MAX_S),
        long=chance.random() < LONG_SHARE,
        overlaps=chance.random() < OVERLAP_SHARE,
    )
