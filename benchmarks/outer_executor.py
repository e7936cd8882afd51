"""The training executor of the outer-round benchmark: the product's Trainer, but inner steps cost nothing.

    inner step     every parameter shrinks a little, and a moment passes: no forward, no backward, no AdamW moments
    before a push  wait in FOLDER until every worker of the round is ready to push, so that all start together
    FOLDER/PID.jsonl       {"round", "event": "push" | "loaded" | …, "at": CLOCK_MONOTONIC in seconds} a line

Everything from the push to the loaded update is hypha.training.train as it is.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.noting import Idle, Noting
from hypha.protocol.bridge import SendUpdate, UpdateArrived
from hypha.protocol.job import JobSpec
from hypha.training import executor
from hypha.training.inner import Batch
from hypha.training.kept import Kept
from hypha.training.session import Session

# Long enough for the samples of a round to be shared out evenly.
STEP_S = 0.05
POLL_S = 0.002
BARRIER_S_MAX = 120.0


class Still(Idle):
    """Moves the parameters without computing anything."""

    def step(self, batch: Batch, *, round_: int) -> float:
        """Shrink everything, and let time pass."""
        self.shrink(1e-3)
        time.sleep(STEP_S)
        self.steps += 1
        self.step_s = STEP_S
        return 1.0


class Timed(Noting):
    """A trainer that starts its pushes together with the others."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path, *, folder: Path, workers: int) -> None:
        super().__init__(session, job, work_dir, notes=folder / f"{os.getpid()}.jsonl")
        self.inner = Still(self.inner)
        self.folder, self.workers = folder, workers

    def send(self, kept: Kept, update: SendUpdate) -> None:
        """Start together with the others."""
        arrived = self.folder / f"ready-{self.here}"
        arrived.mkdir(exist_ok=True)
        (arrived / str(os.getpid())).touch()
        until = time.monotonic() + BARRIER_S_MAX
        while len(list(arrived.iterdir())) < self.workers and time.monotonic() < until:
            time.sleep(POLL_S)
        super().send(kept, update)

    def apply(self, arrived: UpdateArrived) -> None:
        """Note when the update is here, too."""
        self.note("arrived")
        super().apply(arrived)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a process; returns its exit code."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bench-folder", type=Path, required=True)
    parser.add_argument("--bench-workers", type=int, required=True)
    ours, rest = parser.parse_known_args(arguments)

    def work(session: Session, job: JobSpec, work_dir: Path) -> None:
        Timed(session, job, work_dir, folder=ours.bench_folder, workers=ours.bench_workers).run()

    return executor.run(work, "train", rest)


if __name__ == "__main__":
    sys.exit(main())
