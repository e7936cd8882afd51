"""What is to happen to whom, and when: everything drawn from the seed before anything runs.

Strike: role, act ── kill       SIGKILL, started again after a pause or only with the next strike
                     stop       SIGSTOP for two ttls, then SIGCONT
                     leave      SIGTERM to a worker: it contributes or hands back, goes, and comes back after a pause
                     all        SIGKILL to everybody who plays the role; back after a while
                     take-over  SIGKILL to the leading scheduler, which stays away until the standby leads
        when      ── the first moment of a kind at or after a round, and then so much more of the journal

A deck holds every card once; it is dealt to the end before it is shuffled again, so that eight strikes are all kinds.
"""

import random
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

Act = Literal["kill", "stop", "leave", "all", "take-over"]
Moment = Literal["Round opened", "Round committed"]
MOMENTS: tuple[Moment, ...] = ("Round opened", "Round committed")


class Card(Struct, frozen=True):
    """One kind of strike: a role, and what may happen to it with which weight."""

    role: str
    acts: Mapping[Act, float]


DECK = (
    Card("gateway", {"kill": 0.5, "stop": 0.2, "all": 0.3}),
    Card("data", {"kill": 0.55, "stop": 0.25, "all": 0.2}),
    Card("worker", {"kill": 0.7, "stop": 0.3}),
    Card("worker", {"leave": 1.0}),
    Card("executor", {"kill": 0.6, "stop": 0.4}),
    Card("parameter-server", {"kill": 0.6, "stop": 0.2, "leave": 0.2}),
    Card("scheduler", {"kill": 0.75, "stop": 0.25}),
    Card("scheduler", {"take-over": 1.0}),
)
ROLES = tuple(dict.fromkeys(card.role for card in DECK))
# Rounds between two strikes at least: enough to be whole again in between, most of the time. There are more in all,
# for strikes that had to wait.
ROUNDS_BETWEEN = 3
ROUNDS_FOR_EACH = 4
ROUNDS_BEFORE, ROUNDS_AFTER = 2, 6
# A grant takes about 300 bytes of the journal, a lease about 500.
JOURNAL_BYTES_MAX = 1200
# At the line itself: a round opens when the one before it is merged, and is committed within a tenth of a second.
AT_ONCE_SHARE = 0.4
LONG_SHARE, OVERLAP_SHARE = 0.2, 0.2
PAUSE_MAX_S = 6.0
# A scheduler that is back before its leases run out adopts them; importing takes it most of that time.
SCHEDULER_PAUSE_MAX_S = 2.0


class Strike(Struct, frozen=True, kw_only=True):
    """One blow. `pick` chooses among those who play the role then; `overlaps`: it waits for no healing."""

    number: int
    role: str
    act: Act
    moment: Moment
    round: int
    journal_bytes: int
    pick: float
    pause_s: float
    long: bool
    overlaps: bool


def rounds_for(kills: int) -> int:
    """Return how many rounds leave room for so many strikes."""
    return ROUNDS_BEFORE + ROUNDS_FOR_EACH * kills + ROUNDS_AFTER


def draw(kills: int, seed: int) -> list[Strike]:
    """Return the strikes of a seed; every card is dealt before any is dealt again.

    Fewer strikes are the first of more, so that what a long run found is found again by a shorter one.
    """
    chance = random.Random(f"roles of {seed}")
    cards: list[Card] = []
    while len(cards) < kills:
        cards += chance.sample(DECK, len(DECK))
    return [_strike(random.Random(f"{seed}.{number}"), number, card) for number, card in enumerate(cards[:kills])]


def _strike(chance: random.Random, number: int, card: Card) -> Strike:
    return Strike(
        number=number,
        role=card.role,
        act=chance.choices(list(card.acts), list(card.acts.values()))[0],
        moment=chance.choice(MOMENTS),
        round=ROUNDS_BEFORE + ROUNDS_BETWEEN * number + chance.randrange(ROUNDS_BETWEEN // 2 + 1),
        journal_bytes=0 if chance.random() < AT_ONCE_SHARE else chance.randrange(JOURNAL_BYTES_MAX),
        pick=chance.random(),
        pause_s=chance.uniform(0.0, SCHEDULER_PAUSE_MAX_S if card.role == "scheduler" else PAUSE_MAX_S),
        long=chance.random() < LONG_SHARE,
        overlaps=chance.random() < OVERLAP_SHARE,
    )
