"""The training executor of the utilisation benchmark: the product's, with a clock beside what its main thread does.

    FOLDER/PID.jsonl   {"what": "step", "at": CLOCK_MONOTONIC when it was over, "seconds", "round"} a line
                       what: model (seconds: parameters) · step (forward, backward, optimizer) · everything of WAITS

Real forward and backward passes; nothing of hypha.training is changed, and other threads are not looked at.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypha.protocol.job import JobSpec
from hypha.training import executor, tensors, train
from hypha.training.batches import Feed
from hypha.training.inner import InnerLoop
from hypha.training.session import Session
from hypha.training.train import Trainer

# What else the main thread does: owner, name there, name in the notes.
WAITS: tuple[tuple[Any, str, str], ...] = (
    (Trainer, "_coded", "coding the pseudo-gradient"),
    (Trainer, "_moved", "writing the next base"),
    (Trainer, "_mix", "loading it"),
    (InnerLoop, "save", "keeping the optimizer"),
    (tensors, "save", "keeping parameters"),
    (tensors, "load_parts", "loading it"),
    (Session, "send", "sending"),
    (Session, "report", "reporting"),
    (Session, "next_event", "waiting for events"),
    (Feed, "take", "samples"),
)


class Notes:
    """A file of what took how long."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)
        self._within: list[float] = []  # seconds of the calls within each call under way

    def write(self, what: str, seconds: float, round_: int) -> None:
        """Append a line."""
        line = {"what": what, "at": time.monotonic(), "seconds": seconds, "round": round_}
        self._file.write(json.dumps(line) + "\n")

    def time(self, owner: Any, name: str, what: str) -> None:  # noqa: ANN401 - a class or a module
        """Note every call of a function from the main thread, less what calls within it take that are noted, too."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as `inner`
            if threading.current_thread() is not threading.main_thread():
                return inner(*arguments, **named)
            began = time.monotonic()
            self._within.append(0.0)
            try:
                return inner(*arguments, **named)
            finally:
                seconds = time.monotonic() - began
                self.write(what, seconds - self._within.pop(), named.get("round_", 0))
                if self._within:
                    self._within[-1] += seconds

        setattr(owner, name, timed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a process; returns its exit code."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bench-folder", type=Path, required=True)
    ours, rest = parser.parse_known_args(arguments)
    notes = Notes(ours.bench_folder)
    build = Trainer.__init__

    def built(self: Trainer, session: Session, job: JobSpec, work_dir: Path) -> None:
        build(self, session, job, work_dir)
        notes.write("model", sum(tensor.numel() for tensor in self.parameters.values()), 0)

    Trainer.__init__ = built  # type: ignore[method-assign]
    for owner, name, what in (*WAITS, (InnerLoop, "step", "step")):
        notes.time(owner, name, what)
    return executor.run(train.work, "train", rest)


if __name__ == "__main__":
    sys.exit(main())
