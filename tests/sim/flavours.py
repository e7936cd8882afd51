"""What may go wrong in a simulated cluster, and in which company: a flavour is a shape of scenario.

flavour ─▶ kinds of faults it draws from, how many, how long ─▶ Fault(at, kind, for, pick) …
                          └─ directed ones bring about what chance alone reaches too seldom

A kind is "what-target".

what    crash, silent (nobody learns of it), wipe (its disk is gone), back (a scheduler crashes, and is to lead again
        when another has just taken over), power (lost in the midst of a write), echo (a crash, and what it said
        last arrives again and again until a while after it is back), pause, leave (politely),
        join, cut, oneway (it is not heard), deaf (it does not hear), storm (of the whole network), exit, stall, spoil
        (its next update is not finite), claim (its next update names samples it was not granted), full, error (of the
        disk, once), decay (of the newest checkpoint), unstored (cut from the store), twin (a second scheduler on its
        journal), wall (its wall clock jumps by an hour), drift (its clock changes its rate)
target  trainer, server (of parameters), spare, worker, data, gateway, gateways (all), scheduler, leader, store, any,
        or whoever is in the midst of it: pusher (a trainer sends its update), merger (a server has merged), closer
        (the scheduler, at that moment), committer (the scheduler, just before it makes a step's entry in the chain)
"""

import random

from msgspec import Struct, structs

from hypha.network.memory_faults import FaultProfile

CALM = FaultProfile(latency_s=0.005, jitter_s=0.01, break_after_s=4.0, dht_record_s=20.0)
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
# So bad that hardly a handshake goes through as it should; never for long.
STORM = structs.replace(LOSSY, loss=0.25, duplication=0.25, reordering=0.3, late_s=3.0, gossip_loss=0.3)
# A job without faults takes about so long: the faults fall into it.
BUSY_S = 14.0
# How long a moment is waited for.
MOMENT_S = 20.0
MOMENTS = ("pusher", "merger", "closer", "committer")
FAULTS_MAX = 4
ECHO_TTLS = (0.2, 1.5)


class Fault(Struct, frozen=True, kw_only=True):
    """At `at_s` something happens, to one of those whom `kind` is about, chosen by `pick`, and ends after `for_s`."""

    at_s: float
    kind: str
    for_s: float
    pick: float = 0.0

    @property
    def over_s(self) -> float:
        """When it has ended at the latest."""
        what, _, target = self.kind.partition("-")
        waits = target in MOMENTS or what in ("power", "decay", "back")
        return self.at_s + self.for_s + (MOMENT_S + self.for_s if waits else 0.0)


DEATHS = (
    "crash-trainer",
    "silent-trainer",
    "wipe-trainer",
    "crash-spare",
    "power-worker",
    "crash-data",
    "crash-gateway",
    "crash-gateways",
    "exit-trainer",
    "stall-trainer",
)
CUTS = (
    "cut-trainer",
    "oneway-trainer",
    "deaf-trainer",
    "cut-server",
    "oneway-server",
    "deaf-server",
    "cut-data",
    "cut-scheduler",
)
PAUSES = ("pause-trainer", "pause-server", "pause-scheduler", "pause-data")
RECOVERIES = (
    "echo-scheduler",
    "echo-scheduler",
    "crash-server",
    "silent-server",
    "wipe-server",
    "exit-server",
    "stall-server",
    "crash-scheduler",
    "silent-scheduler",
    "twin-scheduler",
)
DISKS = (
    "power-scheduler",
    "power-scheduler",
    "error-scheduler",
    "full-scheduler",
    "full-trainer",
    "full-server",
    "decay-store",
    "power-worker",
    "error-worker",
)
CLOCKS = ("drift-any", "drift-any", "wall-any", "wall-any", "pause-trainer", "pause-scheduler", "crash-scheduler")
MEMBERS = (
    "join-worker",
    "join-worker",
    "leave-trainer",
    "leave-server",
    "leave-spare",
    "spoil-trainer",
    "claim-trainer",
    "exit-trainer",
)
DUELS = (
    "pause-committer",
    "pause-committer",
    "crash-leader",
    "back-leader",
    "silent-leader",
    "wipe-leader",
    "power-leader",
    "pause-leader",
    "cut-leader",
    "unstored-leader",
    "full-leader",
    "pause-closer",
    "crash-server",
    "leave-trainer",
)
MOMENTOUS = (
    "crash-pusher",
    "silent-pusher",
    "silent-merger",
    "silent-merger",
    "crash-merger",
    "crash-closer",
    "pause-closer",
    "crash-committer",
)
KINDS = {
    "deaths": DEATHS,
    "partitions": CUTS,
    "pauses": PAUSES,
    "recoveries": RECOVERIES,
    "disks": DISKS,
    "clocks": CLOCKS,
    "members": MEMBERS,
    "duel": DUELS,
    "moments": MOMENTOUS,
    "everything": DEATHS + CUTS + PAUSES + RECOVERIES + DISKS + CLOCKS + MEMBERS + MOMENTOUS,
}
# In the handshake flavour the network is bad while workers are hired; in the starved one samples are too few for all.
FLAVOURS = ("calm", "lossy", *KINDS, "handshake", "starved")


def flavour_of(seed: int) -> str:
    """Return whose turn it is."""
    return FLAVOURS[seed % len(FLAVOURS)]


def turn_of(seed: int) -> int:
    """Return how often the seed's flavour has had its turn before."""
    return seed // len(FLAVOURS)


def profile(flavour: str, chance: random.Random) -> FaultProfile:
    """Return how the network behaves in between."""
    match flavour:
        case "lossy":
            return chance.choice((LOSSY, HARSH))
        case "everything":
            return chance.choice((LOSSY, LOSSY, CALM))
        case _:
            return CALM


def slices(flavour: str, chance: random.Random) -> tuple[int, ...]:
    """Return the sizes of the dataset's slices; the starved flavour's are used up within a round or two."""
    if flavour == "starved":
        return tuple(chance.randint(8, 14) for _ in range(chance.randint(2, 3)))
    return tuple(chance.randint(10, 50) for _ in range(chance.randint(2, 5)))


def faults(flavour: str, chance: random.Random, *, ttl_s: float, turn: int) -> tuple[Fault, ...]:
    """Draw what happens, by the time at which it does; in the flavour's next turn the first is of the next kind."""
    if flavour == "handshake":
        return _storm(chance)
    kinds = KINDS.get(flavour, ())
    count = chance.randint(1, FAULTS_MAX) if kinds else 0
    drawn = [
        _fault(chance.choice(kinds) if number else kinds[turn % len(kinds)], chance, ttl_s, turn)
        for number in range(count)
    ]
    return tuple(sorted(drawn, key=lambda fault: fault.at_s))


def _fault(kind: str, chance: random.Random, ttl_s: float, turn: int) -> Fault:
    lasting = (0.5, 3.0, 8.0, 18.0)
    for_s = chance.choice(lasting) * chance.uniform(0.8, 1.2)
    if kind.startswith("pause") and chance.random() < 0.5:
        for_s = 2 * ttl_s
    if kind.startswith("echo"):
        # Leases are adopted after a short one; in a long one they run out although echoes of renewals come.
        for_s = ECHO_TTLS[turn % 2] * ttl_s
    return Fault(at_s=round(chance.uniform(0.3, BUSY_S), 3), kind=kind, for_s=round(for_s, 3), pick=chance.random())


def _storm(chance: random.Random) -> tuple[Fault, ...]:
    """Bad weather while workers are hired, or later, and a death or two that has them hired again."""
    at_s = chance.choice((0.0, round(chance.uniform(1.0, 6.0), 3)))
    storm = Fault(at_s=at_s, kind="storm-network", for_s=round(chance.uniform(4.0, 12.0), 3))
    deaths = [
        Fault(at_s=round(at_s + chance.uniform(1.0, 8.0), 3), kind="crash-trainer", for_s=3.0, pick=chance.random())
        for _ in range(chance.randint(0, 2))
    ]
    return tuple(sorted((storm, *deaths), key=lambda fault: fault.at_s))
