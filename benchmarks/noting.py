"""What executors of benchmarks share: a trainer that notes what it does when, and inner steps that compute nothing.

FILE.jsonl   {"round", "event": "push" | "pushed" | "loaded" | …, "at": CLOCK_MONOTONIC in seconds, …} a line
"""

import json
import time
from pathlib import Path

import torch

from hypha.protocol.bridge import SendUpdate, UpdateArrived
from hypha.protocol.job import JobSpec
from hypha.training import train
from hypha.training.inner import Inner, InnerLoop
from hypha.training.kept import Kept
from hypha.training.session import Session


class Idle(InnerLoop):
    """An inner loop without forward, backward and moments; subclasses say how long a step takes."""

    def __init__(self, loop: InnerLoop) -> None:
        self.__dict__ = loop.__dict__

    def shrink(self, share: float) -> None:
        """Take a share of every parameter away, so that there is an update."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 - share)

    def save(self, path: Path) -> Inner:
        """There are no moments to keep."""
        return Inner(None, self.steps, self.offset, (torch.get_rng_state(),))


class Noting(train.Trainer):
    """The product's trainer with a file of notes."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path, *, notes: Path) -> None:
        super().__init__(session, job, work_dir)
        self.notes = notes.open("a", buffering=1)

    def note(self, event: str, **more: float) -> None:
        """Append a line."""
        self.notes.write(json.dumps({"round": self.here, "event": event, "at": time.monotonic(), **more}) + "\n")

    def send(self, kept: Kept, update: SendUpdate) -> None:
        """Note when the update begins to leave, and when it is accepted."""
        self.note("push", bytes=sum(file.bytes for file in update.files), samples=update.samples)
        super().send(kept, update)
        self.note("pushed")

    def apply(self, arrived: UpdateArrived) -> None:
        """Note when the next round may begin."""
        super().apply(arrived)
        self.note("loaded")
