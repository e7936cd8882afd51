"""What one seed is about: a cluster, a job, and the faults that strike while it runs.

Scenario.draw(seed) ─▶ flavour ─▶ sizes, clocks, speeds, FaultProfile, Fault(at, kind, for, pick) …
replay: the same seed draws the same scenario; a test may also write one down itself
"""

import random

from msgspec import Struct

from hypha.network.memory_faults import FaultProfile
from hypha.protocol.fragments import Streaming
from tests.sim import flavours
from tests.sim.flavours import CALM, Fault

CLOCK_DRIFT = 0.05
SLOW_DISK_S = 0.4
SLOW_DISK_CHANCE = 0.2
# A standby takes over after so long: a few ttls of the longer kind would only make every duel longer.
HOLD_S = 6.0


class Scenario(Struct, frozen=True, kw_only=True):
    """Everything that is drawn before the cluster starts. Times in seconds of virtual time."""

    seed: int
    flavour: str = "calm"
    trainers: int = 3
    parameter_servers: int = 1
    growth: int = 0  # so many more are welcome
    spares: int = 1
    data_nodes: int = 2
    gateways: int = 1
    standby: bool = False  # a second scheduler on a shared store
    rounds: int = 4
    samples: int = 48  # per round
    batch: int = 4
    slices: tuple[int, ...] = (40, 24, 32)
    quorum: int = 1
    deadline_s: float = 20.0
    ttl_s: float = 8.0
    evaluate_every: int = 1
    checkpoint_every: int = 2
    blocking_s: float = 0.0  # of every access to a disk
    disk_s: float = 0.0  # likewise at the scheduler
    rates: tuple[float, ...] = ()  # of the machines' clocks, in the order of their making; the rest run true
    paces: tuple[float, ...] = ()  # seconds for a batch on each worker
    profile: FaultProfile = CALM
    faults: tuple[Fault, ...] = ()
    fragments: int = 1
    overlap: int = 0  # inner steps

    @property
    def streaming(self) -> Streaming:
        """How the job synchronises its model."""
        return Streaming(fragments=self.fragments, overlap_steps=self.overlap)

    @property
    def healed_at_s(self) -> float:
        """When the last fault is over."""
        return max((fault.over_s for fault in self.faults), default=0.0)

    @property
    def patience_s(self) -> float:
        """How long the job may take after that: so many ttls, rounds and deadlines (L7)."""
        standing_by_s = 2 * HOLD_S if self.standby else 0.0
        return 12 * self.ttl_s + self.rounds * (self.deadline_s + 3 * self.ttl_s) + standing_by_s


def draw(seed: int) -> Scenario:
    """Return the scenario of a seed."""
    chance = random.Random(f"scenario:{seed}")
    flavour = flavours.flavour_of(seed)
    trainers = chance.randint(2, 4) if flavour != "starved" else 4
    slow_disk = 0.0 if flavour == "calm" else SLOW_DISK_CHANCE
    ttl_s = chance.choice((5.0, 8.0))
    return Scenario(
        seed=seed,
        flavour=flavour,
        trainers=trainers,
        growth=chance.randint(1, 2) if flavour in ("members", "everything") else 0,
        spares=chance.randint(1, 2),
        gateways=chance.randint(1, 2),
        standby=flavour == "duel",
        rounds=chance.randint(4, 7),
        samples=chance.choice((32, 64, 96)),
        slices=flavours.slices(flavour, chance),
        quorum=min(trainers, chance.choice((1, 2, trainers))),
        deadline_s=chance.choice((10.0, 20.0)),
        ttl_s=ttl_s,
        evaluate_every=chance.choice((0, 1, 2)),
        checkpoint_every=chance.choice((1, 2, 3)),
        blocking_s=chance.choice((0.0, 0.002)),
        disk_s=SLOW_DISK_S if chance.random() < slow_disk else chance.choice((0.0, 0.002)),
        rates=tuple(chance.uniform(1 - CLOCK_DRIFT, 1 + CLOCK_DRIFT) for _ in range(16)) if flavour != "calm" else (),
        paces=tuple(chance.choice((0.15, 0.3, 0.3, 0.7)) for _ in range(8)),
        profile=flavours.profile(flavour, chance),
        faults=flavours.faults(flavour, chance, ttl_s=ttl_s, turn=flavours.turn_of(seed)),
        parameter_servers=chance.choice((1, 2)),
        fragments=chance.choice((1, 2, 3)),
        overlap=chance.choice((0, 0, 1, 2)),
    )
