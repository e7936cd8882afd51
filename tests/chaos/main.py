"""`make chaos`: a network of real processes trains calmly, then again while its processes are killed and stopped.

    python -m tests.chaos.main --kills 8 --seed 0 [--limit SECONDS] [--dir DIR] [--defaults]

The last line of standard output is JSON; what happens is told on standard error. Exit code 1 where `faults` is not
empty; then the directory with all logs stays.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import trio
from msgspec import Struct
from msgspec.structs import replace

from tests.chaos import aftermath, cast, dataset, plan
from tests.chaos.cast import CALM, CHAOS, SCHEDULERS, Job
from tests.chaos.plan import Strike
from tests.chaos.play import ChaosFailed, Play
from tests.chaos.report import Evidence, summary
from tests.chaos.troupe import Node, guarded
from tests.e2e.programs import inhabitants

READY_S = 60.0
END_S = 20.0
POLL_S = 0.1
DEFAULT_TTL_S = 30.0
# A long run need not be as long calmly: by then the loss is at its floor.
CALM_ROUNDS_MAX = 160
# The dataset grows with the run, so that a long one is no more epochs than it must be.
KILLS_PER_SLICE = 2.5
# Half of the workers keep a warm executor: both ways of starting one are struck.
WARM = ("worker-2", "worker-4")


class Wish(Struct, frozen=True, kw_only=True):
    """What is to be played."""

    kills: int
    seed: int
    limit_s: float = float("inf")


async def stage(evidence: Evidence, job: Job, wish: Wish) -> None:
    """Prepare, play calm and chaos, clear up; what came of it is in the evidence. Raises ChaosFailed."""
    directory = evidence.directory
    cast.prepare(directory, job, wish.seed)
    with guarded() as group:
        nodes = {name: Node(name, directory, group) for name in cast.ROLES if name not in SCHEDULERS}
        schedulers = {run: [Node(name, directory, group, run) for name in SCHEDULERS] for run in (CALM, CHAOS)}
        try:
            for node in nodes.values():
                node.start()
            await _ready(nodes.values())
            evidence.calm = Play(directory, nodes, schedulers[CALM][:1], CALM, job)
            await evidence.calm.perform(())
            evidence.calm_after = await aftermath.look(directory, nodes.values())
            evidence.chaos = Play(directory, nodes, schedulers[CHAOS], CHAOS, job, limit_s=wish.limit_s)
            await _perform(evidence.chaos, plan.draw(wish.kills, wish.seed))
            await _ready(nodes.values())
            evidence.chaos_after = await aftermath.look(directory, nodes.values())
        finally:
            evidence.hung = _end([*schedulers[CALM], *schedulers[CHAOS], *reversed(nodes.values())])
            evidence.left_in_the_end = tuple(aftermath.strangers(directory, ()))
            for process in inhabitants(directory):
                process.kill()


async def _perform(play: Play, strikes: Sequence[Strike]) -> None:
    """Play, and stop early where a signal asks for it: what has been played until then is evidence, too."""

    async def listen() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                play.stop_early()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await play.perform(strikes)
        nursery.cancel_scope.cancel()


def _end(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Ask every node to end; returns those that did not end well."""
    codes = {node.log.stem: node.end(END_S) for node in nodes if node.process is not None}
    return tuple(f"{name} (exit code {code})" for name, code in codes.items() if code) + tuple(
        f"{name} (killed)" for name, code in codes.items() if code is None
    )


async def _ready(nodes: Iterable[Node]) -> None:
    waiting = list(nodes)
    with trio.move_on_after(READY_S):
        while waiting := [node for node in waiting if not node.ready]:  # noqa: ASYNC110 - a log file sets no event
            await trio.sleep(POLL_S)
        return
    raise ChaosFailed(f"not ready within {READY_S:g} s: {', '.join(node.name for node in waiting)}")


def _job(kills: int, *, defaults: bool) -> Job:
    rounds = plan.rounds_for(kills)
    job = Job(
        rounds=rounds,
        calm_rounds=min(rounds, CALM_ROUNDS_MAX),
        slices=max(dataset.SLICES, int(kills / KILLS_PER_SLICE)),
        warm=WARM,
    )
    return replace(job, ttl_s=DEFAULT_TTL_S, deadline_s=4 * DEFAULT_TTL_S) if defaults else job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.main")
    parser.add_argument("--kills", type=int, default=8, help="how many strikes, kills and stops together")
    parser.add_argument("--seed", type=int, default=0, help="decides them, and the dataset")
    parser.add_argument("--dir", type=Path, help="a new directory that stays; default: one that goes when all is well")
    parser.add_argument("--defaults", action="store_true", help="leases as they are by default, 30 s instead of 6 s")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which nobody is struck any more"
    )
    given = parser.parse_args(arguments)
    directory = given.dir or Path(tempfile.mkdtemp(prefix="hypha-chaos-"))
    directory.mkdir(exist_ok=True)
    job = _job(given.kills, defaults=given.defaults)
    evidence = Evidence(directory=directory.resolve())
    began = time.monotonic()
    try:
        trio.run(stage, evidence, job, Wish(kills=given.kills, seed=given.seed, limit_s=given.limit))
    except* ChaosFailed as failures:
        evidence.failure = "; ".join(str(each) for each in failures.exceptions)
    said = summary(evidence, kills=given.kills, seed=given.seed, wall_s=time.monotonic() - began)
    if said["faults"]:
        sys.stderr.write(f"everything is in {directory}; again: make chaos KILLS={given.kills} SEED={given.seed}\n")
    elif given.dir is None:
        shutil.rmtree(directory)
    sys.stdout.write(json.dumps(said) + "\n")
    return 1 if said["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
