"""The names under which faults and situations are counted: all there are, also those that a run did not see.

FAULTS       what struck, from `flavours.KINDS` and the network's own
SITUATIONS   what was reached because of it; a kind that stays at zero is one that a run proves nothing about
"""

from tests.sim.flavours import KINDS

WORDS = {
    "crash": "crash",
    "back": "crash until another leads",
    "silent": "silent crash",
    "wipe": "crash without disk",
    "power": "torn write",
    "echo": "crash and echoes",
    "pause": "pause",
    "leave": "polite leave",
    "cut": "cut",
    "oneway": "one-way cut",
    "deaf": "one-way cut the other way",
    "exit": "exit of an executor",
    "stall": "stall of an executor",
    "spoil": "non-finite update",
    "claim": "update on samples of others",
    "full": "full disk",
    "error": "disk error",
    "decay": "decayed checkpoint",
    "wall": "wall clock jump",
    "drift": "change of clock rate",
    "join": "joiner",
    "twin": "second one on its journal",
    "unstored": "cut from the store",
    "storm": "storm",
}
SLOW_DISK = "slow disk"
CLOCK_OFF = "clock off its rate"
TWICE_THE_TTL = "pause of twice the ttl"
MESSAGES = tuple(f"message {what}" for what in ("lost", "cut", "duplicated", "delayed"))


def name_of(kind: str) -> str:
    """Return what a fault of this kind is counted as."""
    what, _, target = kind.partition("-")
    return f"{WORDS[what]}: {target}"


FAULTS = tuple(
    sorted(
        {name_of(kind) for kinds in KINDS.values() for kind in kinds}
        | {name_of("storm-network"), SLOW_DISK, CLOCK_OFF, TWICE_THE_TTL, *MESSAGES}
    )
)

# By what roles log (see `chronicle`), by words in a line, and by what `situations` sees.
SAID = {
    "Lease lost": "lease lost by its holder",
    "Lease not had": "offer not had",
    "Lease expired": "lease expired at its grantor",
    "Offer lapsed": "offer lapsed",
    "Offer not taken": "offer not taken",
    "Worker lost": "worker lost",
    "Executor failed": "executor failed",
    "Job failed": "job failed at a worker",
    "Outer step lost": "lost open step",
    "Update refused": "update refused",
    "Contribution excluded": "contribution excluded",
    "Base not fetched yet": "base not fetched at first",
    "Update not delivered yet": "update not delivered at first",
    "Provider failed": "provider failed",
    "No samples": "samples refused",
    "Job not taken": "job not taken",
    "Worker adopted": "adopted lease",
    "Worker not adopted": "lease not adopted",
    "State not fetched yet": "state not fetched at first",
    "Outer update not taken": "outer update not taken",
    "Checkpoint unusable, an older one is used": "older checkpoint used",
    "Worker left": "polite leave",
    "The journal can be written again": "full disk survived: journal",
    "The job's store can be written again": "full disk survived: store",
    "The journal's end was torn: what had not been acknowledged is dropped": "torn write detected",
    "The hold on the job's store has lapsed": "hold lapsed",
}
NOTED = {
    "that the quorum asks": "below quorum",
    "are not a step": "only empty contributions",
    "Too few workers": "too few workers",
    "back to round": "went back to a kept round",
    "told to rebase": "rebase",
    "sent again": "update sent again",
    "restored from round": "parameter server restored",
    "the executor was silent for": "stalled executor",
    ": it is not finite": "non-finite update refused",
    "No offers without a new fence": "no fence to offer with",
}
SEEN = (
    "contribution accepted from a dead worker",
    "deposed parameter server",
    "deposed scheduler",
    "duplicated offer",
    "empty contribution",
    "end of epoch with a starved worker",
    "entry of the chain lost to another",
    "late joiner ready in mid-round",
    "lost acceptance reply",
    "release racing renewal",
    "renewal after the deadline refused",
    "round closed without a member",
    "second scheduler on one journal refused",
    "stale view refused",
    "started again after a disk error",
    "started while another leads",
    "standby take-over",
    "worker back as another node",
    "worker dead in mid-push",
)
SITUATIONS = tuple(sorted({*SAID.values(), *NOTED.values(), *SEEN}))
