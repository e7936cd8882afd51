"""An executor that was started before its job: `python -m hypha.training.warm`, by a worker with `warm_executor`.

    started ─▶ imports what executors need ─▶ waits ── WarmStart on standard input ──▶ train.main | aggregate.main
       └────────── end of input at any time: the worker is gone, or wants it no more ──▶ exit 0

It knows no job and has no bridge until then, and runs one job. Standard input is read by a thread of its own, because
importing takes seconds in which the worker may go.
"""

import importlib
import os
import queue
import sys
import threading
from typing import Any

import msgspec

from hypha.errors import RemoteProtocolError
from hypha.protocol.warm import LINE_BYTES_MAX, WarmStart

# What an executor imports by itself, and beyond that what transformers and torch import at first use.
MODULES = (
    "hypha.training.train",
    "hypha.training.aggregate",
    "hypha.telemetry.export",
    "httpcore",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "transformers.processing_utils",
    # The first step of an optimizer imports it.
    "torch._dynamo",
)


def listen(jobs: "queue.SimpleQueue[WarmStart]") -> None:
    """Wait for the job on standard input and pass it on; end this process where there will be none."""
    line = sys.stdin.buffer.readline(LINE_BYTES_MAX)
    if not line.endswith(b"\n"):
        os._exit(0)
    try:
        jobs.put(msgspec.json.decode(line, type=WarmStart))
    except msgspec.DecodeError as error:
        sys.stderr.write(f"no job: {error}\n")
        os._exit(1)


def warm_up() -> None:
    """Import everything that a job would wait for. What is not installed is the job's to miss."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            sys.stderr.write(f"not imported: {name}: {error}\n")


def begin(job: WarmStart) -> int:
    """Become the executor of a job; returns its exit code. Raises RemoteProtocolError for a directory that is not."""
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    os.environ.update(job.environment)
    try:
        os.chdir(job.directory)
    except OSError as error:
        raise RemoteProtocolError(f"{job.directory}: {error.strerror}") from error
    executor: Any = importlib.import_module(f"hypha.training.{job.work}")
    return int(executor.main(job.arguments))


def main() -> int:
    """Run as a process; returns its exit code."""
    jobs: queue.SimpleQueue[WarmStart] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(jobs,), name="warm-stdin", daemon=True).start()
    warm_up()
    return begin(jobs.get())


if __name__ == "__main__":
    sys.exit(main())
