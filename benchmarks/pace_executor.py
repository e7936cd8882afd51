"""The training executor of the pace benchmark: the product's Trainer on a machine as slow as it is told to be.

    inner step   every parameter shrinks a little, then SAMPLE_S × slowness passes for each sample
    FOLDER/SLOWNESS.jsonl  {"round", "event": "step" | "push" | "pushed" | "loaded", "at": monotonic seconds, …} a line

Everything else is hypha.training.train as it is.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hypha.protocol.bridge import SendUpdate, UpdateArrived
from hypha.protocol.job import JobSpec
from hypha.training import executor, train
from hypha.training.batches import rows_of
from hypha.training.inner import Batch, Inner, InnerLoop
from hypha.training.kept import Kept
from hypha.training.session import Session

# A batch of 16 takes the fastest machine 64 ms, like one of a small model on a GPU, and far above a timer's error.
SAMPLE_S = 0.004


class Slow(InnerLoop):
    """Moves the parameters without computing anything, and takes its time."""

    slowness: float

    def __init__(self, loop: InnerLoop, slowness: float) -> None:
        self.__dict__ = loop.__dict__
        self.slowness = slowness

    def step(self, batch: Batch, *, round_: int) -> float:
        """Shrink everything, and let the time of these samples pass."""
        began = time.monotonic()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 - 1e-4)
        until = began + SAMPLE_S * self.slowness * rows_of(dict(batch))
        time.sleep(max(0.0, until - time.monotonic()))
        self.steps += 1
        self.step_s = time.monotonic() - began
        return 1.0

    def save(self, path: Path) -> Inner:
        """There are no moments to keep."""
        return Inner(None, self.steps, self.offset, (torch.get_rng_state(),))


class Noted(train.Trainer):
    """A trainer that notes what it does when."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path, *, folder: Path, slowness: float) -> None:
        super().__init__(session, job, work_dir)
        self.inner = Slow(self.inner, slowness)
        self.notes = (folder / f"{slowness:g}.jsonl").open("a", buffering=1)
        step = self.inner.step

        def noted(batch: Batch, *, round_: int) -> float:
            loss = step(batch, round_=round_)
            self.note("step", seconds=self.inner.step_s, rows=rows_of(dict(batch)))
            return loss

        self.inner.step = noted  # type: ignore[method-assign]

    def note(self, event: str, **more: float) -> None:
        """Append a line."""
        self.notes.write(json.dumps({"round": self.here, "event": event, "at": time.monotonic(), **more}) + "\n")

    def send(self, kept: Kept, update: SendUpdate) -> None:
        """Note when the update begins to leave, and when it is accepted."""
        self.note("push", samples=update.samples)
        super().send(kept, update)
        self.note("pushed")

    def apply(self, arrived: UpdateArrived) -> None:
        """Note when the next round may begin."""
        super().apply(arrived)
        self.note("loaded")


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
