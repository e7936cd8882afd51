"""Adds two runs up to the one JSON object, and says what is not as it must be.

Play(calm), Play(chaos) ─▶ losses, samples, recovery        record.judge ─▶ digests
Aftermath(calm), Aftermath(chaos) ─▶ orphans, leaks, growth       ─▶ faults: empty, or exit code 1
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from tests.chaos import aftermath
from tests.chaos.aftermath import Aftermath
from tests.chaos.play import Play
from tests.chaos.record import judge
from tests.chaos.story import Story

# Of the way from the first loss to the calm run's last one: two calm runs differ by a third of this.
NOISE_SHARE = 0.05
# An executor ends with its bridge: at once, or when its batch is done.
OUTLIVES_MAX_S = 10.0
# A victim may stay away for five ttls, its lease takes one to end, an executor some seconds to start. Beyond this a
# round has waited to its deadline for somebody who could not contribute.
RECOVERY_TTLS_MAX = 10
# A worker finishes its batch, contributes, and gives its leases back; its executor gets two seconds of grace.
LEAVES_MAX_S = 15.0
MEMORY_GROWTH_MB_MAX = 32.0
OPEN_FILES_GROWTH_MAX = 24
ERRORS_SHOWN = 40


class Evidence(Struct, kw_only=True):
    """What was collected, as far as the run came."""

    directory: Path
    calm: Play | None = None
    chaos: Play | None = None
    calm_after: Aftermath | None = None
    chaos_after: Aftermath | None = None
    left_in_the_end: tuple[str, ...] = ()
    hung: tuple[str, ...] = ()  # nodes that did not end when asked to
    failure: str | None = None


def summary(evidence: Evidence, *, kills: int, seed: int, wall_s: float) -> dict[str, Any]:
    """Return the JSON object; `faults` says what is wrong."""
    faults = [] if evidence.failure is None else [evidence.failure]
    said: dict[str, Any] = {"kills": 0, "wanted_kills": kills, "seed": seed}
    if evidence.calm is not None and evidence.chaos is not None:
        said |= _runs(evidence.calm, evidence.chaos)
        faults += [*_run_faults(evidence.calm, evidence.chaos), *_held_faults(said)]
        said |= _chains(evidence, faults)
    after, before = evidence.chaos_after, evidence.calm_after
    orphans = {*evidence.left_in_the_end, *(after.orphans if after is not None else ())}
    leaked = after.leaked if after is not None else ()
    faults += [f"orphan: {each}" for each in sorted(orphans)] + [f"leaked: {each}" for each in leaked]
    faults += [f"{each} did not end when asked to" for each in evidence.hung]
    said |= {"orphans": len(orphans), "leaked_dirs": len(leaked)}
    if before is not None and after is not None:
        grown = aftermath.growth(before, after)
        said |= {"growth": grown, "held": aftermath.largest(after.uses)}
        faults += _growth_faults(grown)
    found = aftermath.errors(evidence.directory / "logs")
    said |= {"error_lines": sum(found.values()), "errors": dict(found.most_common(ERRORS_SHOWN))}
    return said | {"faults": faults, "wall_s": round(wall_s, 1)}


def _runs(calm: Play, chaos: Play) -> dict[str, Any]:
    story = chaos.story
    made = chaos.blows.made
    healed = [blow.healed_s for blow in made if blow.healed_s is not None]
    by_role = Counter(blow.strike.role for blow in made)
    by_act = Counter(blow.strike.act for blow in made)
    replaced = list(replacements(story))
    return {
        "kills": len(made),
        "stopped_early": chaos.stopped_early,
        "by_role": dict(sorted(by_role.items())),
        "by_act": dict(sorted(by_act.items())),
        "rounds": story.round,
        "final_loss": _loss(story),
        "calm_loss": _loss(calm.story),
        "first_loss": story.held_out.get(0),
        "samples": _samples(story),
        "calm_samples": _samples(calm.story),
        "train_wall_s": _wall(story),
        "calm_wall_s": _wall(calm.story),
        "outer_steps_lost": story.steps_lost,
        "recovery_s": _quantiles(healed),
        "recovery_by_role": {role: _quantiles(list(_healed(chaos, role))) for role in sorted(by_role)},
        "replaced_s": _quantiles(replaced),
        "not_healed": sum(blow.healed_s is None for blow in made),
        "adopted": story.counts["Worker adopted"],
        "scheduler_starts": len(story.starts),
        "executors_outlived_s": max((each.ended_s or 0.0 for each in chaos.blows.outlived), default=0.0),
        "left_after_s": max((each.ended_s or 0.0 for each in chaos.blows.leavings), default=0.0),
        **chaos.growth.summary(),
        "crashes": chaos.crashes,
    }


def _run_faults(calm: Play, chaos: Play) -> Iterator[str]:
    story = chaos.story
    if story.steps_lost_at_once_max > 1 or story.steps_lost > len(chaos.blows.made):
        yield f"{story.steps_lost} outer steps lost, {story.steps_lost_at_once_max} of them at once"
    final, calm_loss, first = _loss(story), _loss(calm.story), calm.story.held_out.get(0)
    if final is None or calm_loss is None or first is None:
        yield "a held-out loss is missing"
    elif final - calm_loss > NOISE_SHARE * (first - calm_loss):
        yield f"loss {final:.4f} is worse than calm {calm_loss:.4f} by more than noise"
    yield from (f"crash: {each}" for each in (*calm.crashes, *chaos.crashes))
    yield from _struck_faults(chaos)


def _struck_faults(chaos: Play) -> Iterator[str]:
    for blow in chaos.blows.made:
        if blow.healed_s is not None and blow.healed_s > RECOVERY_TTLS_MAX * chaos.ttl_s:
            yield f"strike {blow.strike.number + 1} on {blow.victim} took {blow.healed_s:.0f} s to heal"
    for leaving in chaos.blows.leavings:
        if leaving.code != 0 or (leaving.ended_s or 0.0) > LEAVES_MAX_S:
            yield f"{leaving.node.name} left with exit code {leaving.code} after {leaving.ended_s} s"
    for each in chaos.blows.outlived:
        if each.ended_s is None or each.ended_s > OUTLIVES_MAX_S:
            yield f"executor of {each.executor.worker} outlived its killed worker: {each.ended_s} s"


def _chains(evidence: Evidence, faults: list[str]) -> dict[str, Any]:
    """Judge both chains; adds to the faults."""
    resumed_well = True
    for play in (evidence.calm, evidence.chaos):
        if play is None or not (play.story.finished or play.stopped_early):
            resumed_well = False
            continue
        verdict = judge(play.store, play.kept, evidence.directory / "dataset", play.story)
        wrong = (*verdict.faults, *verdict.resume_faults)
        resumed_well = resumed_well and not wrong
        faults += [f"{play.run}: {each}" for each in wrong]
        if verdict.samples != _samples(play.story):
            faults.append(f"{play.run}: {_samples(play.story)} samples told, {verdict.samples} in the chain")
    return {"resume_digest_ok": resumed_well}


def _growth_faults(grown: dict[str, float]) -> Iterator[str]:
    if grown["memory_mb_max"] > MEMORY_GROWTH_MB_MAX:
        yield f"a node grew by {grown['memory_mb_max']} MB"
    if grown["open_files_max"] > OPEN_FILES_GROWTH_MAX:
        yield f"a node grew by {grown['open_files_max']} open files"


def _held_faults(said: dict[str, Any]) -> Iterator[str]:
    for role, grown in said["rss_growth_mb"].items():
        if grown > MEMORY_GROWTH_MB_MAX:
            yield f"a {role} grew by {grown} MB while it ran"
    for role, grown in said["fd_growth"].items():
        if grown > OPEN_FILES_GROWTH_MAX:
            yield f"a {role} grew by {grown} open files while it ran"


def replacements(story: Story) -> Iterator[float]:
    """Yield, for each trainer whose lease was lost, the seconds until a round was committed with all trainers again."""
    for lost_at, work in story.losses:
        if work == "train":
            whole = story.whole_again(story.round_at(lost_at), lost_at)
            if whole is not None:
                yield whole - lost_at


def _healed(chaos: Play, role: str) -> Iterator[float]:
    for blow in chaos.blows.made:
        if blow.strike.role == role and blow.healed_s is not None:
            yield blow.healed_s


def _samples(story: Story) -> int | None:
    """Samples in committed rounds, as the last leader told them."""
    if story.finished is not None:
        return story.finished.samples
    return story.commits[-1].samples_total if story.commits else None


def _wall(story: Story) -> float | None:
    """Seconds from the first committed round to the last."""
    return round(story.commits[-1].at - story.commits[0].at, 1) if story.commits else None


def _loss(story: Story) -> float | None:
    """The held-out loss of the newest model that was evaluated."""
    return round(story.held_out[max(story.held_out)], 4) if story.held_out else None


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return {
        name: round(value, 2)
        for name, value in zip(("p50", "p99", "max"), (statistics.median(ordered), p99, ordered[-1]), strict=True)
    }
