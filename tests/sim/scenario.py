"""What one seed is about: a cluster, a job, and the faults that strike while it runs.

Scenario.draw(seed) ─▶ flavour ─▶ sizes, clocks, speeds, FaultProfile, Fault(at, kind, for, pick) …
replay: the same seed draws the same scenario; a test may also write one down itself
"""

import random

from msgspec import Struct, structs

from hypha.network.memory_faults import FaultProfile

CALM = FaultProfile(latency_s=0.005, jitter_s=0.01, break_after_s=4.0, dht_record_s=20.0)
FLAVOURS = ("calm", "lossy", "deaths", "partitions", "pauses", "recoveries", "everything")
# Of the in-memory network, when it is bad: about one message in thirty is lost, late or doubled.
LOSSY = FaultProfile(
    latency_s=0.01,
    jitter_s=0.05,
    loss=0.02,
    duplication=0.03,
    reordering=0.04,
    late_s=2.0,
    stream_break=0.01,
    break_after_s=4.0,
    gossip_loss=0.1,
    gossip_duplication=0.1,
    dht_delay_s=0.5,
    dht_record_s=20.0,
)
# One message in ten is lost: what is said once only is not heard.
HARSH = structs.replace(LOSSY, loss=0.1, latency_s=0.02)
CLOCK_DRIFT = 0.05
SLOW_DISK_S = 0.4
SLOW_DISK_CHANCE = 0.2
# A job without faults takes about so long: the faults fall into it.
BUSY_S = 14.0


class Fault(Struct, frozen=True, kw_only=True):
    """At `at_s` something happens, to one of those whom `kind` is about, chosen by `pick`, and ends after `for_s`.

    crash-…, silent-… (nobody learns of it), pause-…, cut-… (from the scheduler), oneway-…, exit-…, stall-…, and a
    target: trainer, server (of parameters), spare, data, gateway, scheduler, or the name of a machine.
    """

    at_s: float
    kind: str
    for_s: float
    pick: float = 0.0


class Scenario(Struct, frozen=True, kw_only=True):
    """Everything that is drawn before the cluster starts. Times in seconds of virtual time."""

    seed: int
    flavour: str = "calm"
    trainers: int = 3
    parameter_servers: int = 1
    spares: int = 1
    data_nodes: int = 2
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
    rates: tuple[float, ...] = ()  # of the machines' clocks, in the order of their starting; the rest run true
    paces: tuple[float, ...] = ()  # seconds for a batch on each worker
    profile: FaultProfile = CALM
    faults: tuple[Fault, ...] = ()

    @property
    def healed_at_s(self) -> float:
        """When the last fault is over."""
        return max((fault.at_s + fault.for_s for fault in self.faults), default=0.0)

    @property
    def patience_s(self) -> float:
        """How long the job may take after that: so many ttls, rounds and deadlines (L7)."""
        return 12 * self.ttl_s + self.rounds * (self.deadline_s + 3 * self.ttl_s)


def draw(seed: int) -> Scenario:
    """Return the scenario of a seed."""
    chance = random.Random(f"scenario:{seed}")
    flavour = FLAVOURS[seed % len(FLAVOURS)]
    trainers = chance.randint(2, 4)
    slow_disk = 0.0 if flavour == "calm" else SLOW_DISK_CHANCE
    return Scenario(
        seed=seed,
        flavour=flavour,
        trainers=trainers,
        spares=chance.randint(1, 2),
        rounds=chance.randint(4, 7),
        samples=chance.choice((32, 64, 96)),
        slices=tuple(chance.randint(10, 50) for _ in range(chance.randint(2, 5))),
        quorum=min(trainers, chance.choice((1, 1, 2))),
        deadline_s=chance.choice((10.0, 20.0)),
        ttl_s=chance.choice((5.0, 8.0)),
        evaluate_every=chance.choice((0, 1, 2)),
        checkpoint_every=chance.choice((1, 2, 3)),
        blocking_s=chance.choice((0.0, 0.002)),
        disk_s=SLOW_DISK_S if chance.random() < slow_disk else chance.choice((0.0, 0.002)),
        rates=tuple(chance.uniform(1 - CLOCK_DRIFT, 1 + CLOCK_DRIFT) for _ in range(12)) if flavour != "calm" else (),
        paces=tuple(chance.choice((0.15, 0.3, 0.3, 0.7)) for _ in range(8)),
        profile=_profile(flavour, chance),
        faults=_faults(flavour, chance),
        parameter_servers=chance.choice((1, 2)),
    )


def _profile(flavour: str, chance: random.Random) -> FaultProfile:
    match flavour:
        case "lossy":
            return chance.choice((LOSSY, HARSH))
        case "everything":
            return chance.choice((LOSSY, LOSSY, CALM))
        case _:
            return CALM


DEATHS = (
    "crash-trainer",
    "silent-trainer",
    "crash-spare",
    "crash-data",
    "crash-gateway",
    "exit-trainer",
    "stall-trainer",
)
CUTS = ("cut-trainer", "oneway-trainer", "cut-server", "cut-data")
PAUSES = ("pause-trainer", "pause-server", "pause-scheduler", "pause-data")
RECOVERIES = ("crash-server", "silent-server", "exit-server", "stall-server", "crash-scheduler", "silent-scheduler")
KINDS = {
    "deaths": DEATHS,
    "partitions": CUTS,
    "pauses": PAUSES,
    "recoveries": RECOVERIES,
    "everything": DEATHS + CUTS + PAUSES + RECOVERIES,
}


def _faults(flavour: str, chance: random.Random) -> tuple[Fault, ...]:
    kinds = KINDS.get(flavour, ())
    count = chance.randint(1, 4) if kinds else 0
    faults = [
        Fault(
            at_s=round(chance.uniform(0.3, BUSY_S), 3),
            kind=chance.choice(kinds),
            for_s=round(chance.choice((0.5, 3.0, 8.0, 18.0)) * chance.uniform(0.8, 1.2), 3),
            pick=chance.random(),
        )
        for _ in range(count)
    ]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
