"""What the executors' time went to, from what they noted and what passed their links.

round 1 … last step ├──────────── window ────────────┤ last step of the last round      whole rounds, one worker
                     step step … idle … step step …     utilisation = Σ step ÷ window
"""

import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

from msgspec import Struct

from benchmarks.shaped_links import Counted
from benchmarks.shaped_nodes import TRAINERS, Variant


class Event(Struct, frozen=True):
    """A line of what an executor notes."""

    what: str
    at: float
    seconds: float
    round: int


Window = tuple[float, float]
# As the executors note it.
CODING = "coding the pseudo-gradient"


def noted(folder: Path) -> list[list[Event]]:
    """Read what each executor has noted so far."""
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [
        [Event(**json.loads(line)) for line in text.splitlines(keepends=True) if line[-1] == "\n"] for text in texts
    ]


def step_s(workers: list[list[Event]], latest: int, at_least: int) -> float | None:
    """Return the median seconds of the latest inner steps; None before every trainer took enough of them."""
    steps = [[event.seconds for event in events if event.what == "step"][-latest:] for events in workers]
    if len(steps) < TRAINERS or min(map(len, steps)) < at_least:
        return None
    return statistics.median(itertools.chain.from_iterable(steps))


def over(variant: Variant, workers: list[list[Event]]) -> bool:
    """Return whether every trainer has taken its last inner step: it codes one pseudo-gradient after each round's."""
    coded = [sum(event.what == CODING for event in events) for events in workers]
    return len(coded) == TRAINERS and min(coded) >= variant.rounds


def parameters(workers: list[list[Event]]) -> int:
    """Return how many parameters the model has."""
    return next(int(event.seconds) for event in workers[0] if event.what == "model")


def report(variant: Variant, workers: list[list[Event]], counted: list[Counted]) -> dict[str, object]:
    """Return shares of all executors' time in per cent, and how slow the links came out. Raises RuntimeError."""
    steps = [[event for event in events if event.what == "step"] for events in workers]
    windows = [_window(mine) for mine in steps]
    seconds = sum(end - begin for begin, end in windows)
    inside = [
        event
        for events, (begin, end) in zip(workers, windows, strict=True)
        for event in events
        if begin < event.at <= end
    ]
    spent: defaultdict[str, float] = defaultdict(float)
    for event in inside:
        spent[event.what] += event.seconds
    ends = [(mine[0].at - mine[0].seconds, mine[-1].at) for mine in steps]
    all_of_it = sum(event.seconds for mine in steps for event in mine) / sum(end - begin for begin, end in ends)
    taken, wanted = sum(map(len, steps)), variant.rounds * variant.steps * TRAINERS
    typical_s = statistics.median(event.seconds for event in inside if event.what == "step")
    model_bytes = 4 * parameters(workers)
    return {
        "utilisation_percent": round(100 * spent["step"] / seconds, 2),
        "from_first_to_last_step_percent": round(100 * all_of_it, 2),
        "steps_taken_beyond_contributed_percent": round(100 * (taken / wanted - 1), 2),
        "idle_percent": {
            what: round(100 * spent[what] / seconds, 2)
            for what in sorted(spent, key=spent.__getitem__, reverse=True)
            if what != "step"
        }
        | {"else": round(100 * (1 - sum(spent.values()) / seconds), 2)},
        "step_s": round(typical_s, 4),
        "round_s": round(seconds / len(steps) / (variant.rounds - 1), 3),
        "model_bytes": model_bytes,
        **_links(windows[0], counted, model_bytes, typical_s),
    }


def _window(steps: list[Event]) -> Window:
    """From the last inner step of the first round to the last of all."""
    if len({step.round for step in steps}) < 2:
        raise RuntimeError("an executor trained no two rounds")
    first = min(step.round for step in steps)
    return max(step.at for step in steps if step.round == first), steps[-1].at


def _links(window: Window, counted: list[Counted], model_bytes: int, typical_s: float) -> dict[str, object]:
    """Rates during the window, and how busy the parameter server's link was; each count ends a stretch."""
    stretches = [pair for pair in itertools.pairwise(counted) if window[0] <= pair[1].at <= window[1]]
    if not stretches:
        raise RuntimeError("the links were not looked at")
    could = sum((after.at - before.at) * after.bytes_per_s for before, after in stretches)
    rate = could / sum(after.at - before.at for before, after in stretches)
    names = [f"worker-{number}" for number in range(len(counted[0].passed))]
    busy = {
        name: [
            round(100 * sum(b.passed[number][way] - a.passed[number][way] for a, b in stretches) / could, 1)
            for way in (0, 1)
        ]
        for number, name in enumerate(names)
    }
    return {
        "link_megabits": round(rate * 8 / 1e6, 3),
        "steps_to_move_the_model": round(model_bytes / rate / typical_s, 1),
        "link_busy_percent_out_in": busy,
    }
