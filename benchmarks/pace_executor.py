"""The training executor of the pace benchmark: the product's Trainer on a machine as slow as it is told to be.

    inner step   every parameter shrinks a little, then SAMPLE_S × slowness passes for each sample
    FOLDER/SLOWNESS.jsonl  {"round", "event": "step" | "push" | "pushed" | "loaded", "at": monotonic seconds, …} a line

Everything else is hypha.training.train as it is.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.noting import Idle, Noting
from hypha.protocol.job import JobSpec
from hypha.training import executor
from hypha.training.batches import rows_of
from hypha.training.inner import Batch, InnerLoop
from hypha.training.session import Session

# A batch of 16 takes the fastest machine 64 ms, like one of a small model on a GPU, and far above a timer's error.
SAMPLE_S = 0.004


class Slow(Idle):
    """Moves the parameters without computing anything, and takes its time."""

    slowness: float

    def __init__(self, loop: InnerLoop, slowness: float) -> None:
        super().__init__(loop)
        self.slowness = slowness

    def step(self, batch: Batch, *, round_: int) -> float:
        """Shrink everything, and let the time of these samples pass."""
        began = time.monotonic()
        self.shrink(1e-4)
        until = began + SAMPLE_S * self.slowness * rows_of(dict(batch))
        time.sleep(max(0.0, until - time.monotonic()))
        self.steps += 1
        self.step_s = time.monotonic() - began
        return 1.0


class Noted(Noting):
    """A slow trainer that notes its inner steps, too."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path, *, folder: Path, slowness: float) -> None:
        super().__init__(session, job, work_dir, notes=folder / f"{slowness:g}.jsonl")
        self.inner = Slow(self.inner, slowness)
        step = self.inner.step

        def noted(batch: Batch, *, round_: int) -> float:
            loss = step(batch, round_=round_)
            self.note("step", seconds=self.inner.step_s, rows=rows_of(dict(batch)))
            return loss

        self.inner.step = noted  # type: ignore[method-assign]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a process; returns its exit code."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bench-folder", type=Path, required=True)
    parser.add_argument("--bench-slowness", type=float, required=True)
    ours, rest = parser.parse_known_args(arguments)

    def work(session: Session, job: JobSpec, work_dir: Path) -> None:
        Noted(session, job, work_dir, folder=ours.bench_folder, slowness=ours.bench_slowness).run()

    return executor.run(work, "train", rest)


if __name__ == "__main__":
    sys.exit(main())
