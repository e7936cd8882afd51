"""What is left when a job is over and the nodes still run: nothing but the nodes, and what those hold.

executors and job directories gone? ── patience ──▶ orphans, leaked directories
each node's memory and open files ──▶ compared between calm and chaos where the process is the same
every log ──▶ lines at error level and tracebacks
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import trio
from msgspec import Struct

from hypha.demo.loglines import LogFile
from tests.chaos.troupe import Node, Use, job_directories, spares
from tests.e2e.programs import inhabitants

# Two leases' time: what holds on longer holds on for ever.
PATIENCE_S = 15.0
# Connections to those that went are noticed, buffers given back.
SETTLE_S = 2.0
POLL_S = 0.2
TRACEBACK = "Traceback (most recent call last)"


class Aftermath(Struct, frozen=True):
    """Processes and directories that should be gone, and what each node's process (by name and pid) holds."""

    orphans: tuple[str, ...]
    leaked: tuple[str, ...]
    uses: dict[tuple[str, int], Use]


async def look(directory: Path, nodes: Iterable[Node]) -> Aftermath:
    """Wait for everything that ends with a job, and look over what remains."""
    standing = list(nodes)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (strangers(directory, standing) or job_directories(directory)):  # noqa: ASYNC110 - other processes set no event
        await trio.sleep(POLL_S)
    await trio.sleep(SETTLE_S)
    return Aftermath(
        orphans=tuple(strangers(directory, standing)),
        leaked=tuple(str(path.relative_to(directory)) for path in job_directories(directory)),
        uses={(node.name, node.pid): use for node in standing if (use := node.use()) is not None},
    )


def strangers(directory: Path, nodes: Iterable[Node]) -> list[str]:
    """Return the processes working in the directory that are no node's, nor a spare that one of them keeps."""
    known = {node.pid for node in nodes if node.process is not None}
    idle = {spare.pgid for spare in spares(directory)}
    return [
        _words(process)
        for process in inhabitants(directory)
        if process.pid not in known and not (process.pid in idle and _parent(process) in known)
    ]


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return int(process.ppid())
    return None


def _words(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:160]}"
    except psutil.Error:
        return f"{process.pid}: gone"


def growth(before: Aftermath, after: Aftermath) -> dict[str, float]:
    """Return by how much the processes that are in both have grown, at most: MB and open files."""
    same = before.uses.keys() & after.uses.keys()
    return {
        "processes": len(same),
        "memory_mb_max": max(
            (round(after.uses[key].memory_mb - before.uses[key].memory_mb, 1) for key in same), default=0.0
        ),
        "open_files_max": max((after.uses[key].files - before.uses[key].files for key in same), default=0),
    }


def largest(uses: Mapping[tuple[str, int], Use]) -> dict[str, float]:
    """Return the most that any node holds."""
    return {
        "memory_mb_max": max((use.memory_mb for use in uses.values()), default=0.0),
        "open_files_max": max((use.files for use in uses.values()), default=0),
    }


def errors(logs: Path) -> Counter[str]:
    """Return what went wrong in the logs' own words, each with how often."""
    found: Counter[str] = Counter()
    for path in sorted(logs.glob("*.log")):
        for line in LogFile(path).news(last=True):
            trace = line.text("stack") or line.text("exception")
            if line.level == "error" or TRACEBACK in line.message or TRACEBACK in trace:
                reason = line.text("reason") or trace.strip().rpartition("\n")[2]
                found[f"{path.stem}: {line.message[:200]}" + (f" ({reason[:200]})" if reason else "")] += 1
    return found
