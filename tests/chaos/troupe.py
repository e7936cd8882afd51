"""The nodes as real processes, to be killed, stopped and started again; and what their workers run.

    Node ── start ─▶ process, standard error to logs/TITLE.log ── kill, stop, go on, leave, end
    executors(directory) ─▶ work/NAME/hypha-JOB-FENCE/job.json + work/NAME/processes/LEASE.json: who executes what
    spares(directory)    ─▶ work/NAME/processes/warm-*.json: who has no job yet

Every node is in the group of a guardian, which ends it when this process is gone, however it went.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from hypha.demo import guardian
from hypha.worker.process import ProcessRecord, birth_of
from hypha.worker.warm import MARK_PREFIX
from tests.chaos import cast
from tests.e2e.programs import ENVIRONMENT

BYTES_PER_MB = 1e6
LOG_LEVELS = "info"
READY = {"gateway": '"Gateway ready"', "data": '"Serving"', "worker": '"Worker ready"', "scheduler": '"Job started"'}
STANDBY = "--standby"
STANDING_BY = '"Standing by"'
# What a scheduler says as its last word when another has taken over.
DEPOSED = '"Deposed"'
SPARE = "spare"


class Running(Struct, frozen=True):
    """An executor at work: whose, which class, its process group and the birth of its leader."""

    worker: str
    work: str
    pgid: int
    birth: str

    @property
    def lives(self) -> bool:
        """Whether its leader is still there, and is no zombie."""
        with suppress(psutil.Error):
            return birth_of(self.pgid) == self.birth and psutil.Process(self.pgid).status() != psutil.STATUS_ZOMBIE
        return False


class Use(Struct, frozen=True):
    """What a process holds: resident memory in MB (10^6 bytes) and open files."""

    memory_mb: float
    files: int


class Node:
    """One node; `wanted` says whether it is meant to run."""

    def __init__(self, name: str, directory: Path, group: int, run: str = "") -> None:
        self.name = name
        self.role = cast.ROLES[name]
        self.log = directory / "logs" / f"{cast.title(name, run)}.log"
        self.command = cast.command(name, run)
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = False
        self.stopped = False
        self.started_at = 0.0
        self._options: tuple[str, ...] = ()
        self._log_from = 0
        self._directory = directory
        self._group = group

    def start(self, *options: str) -> None:
        """Start it, with options beside its configuration; its log goes on where the last one ended."""
        self.wanted, self.stopped = True, False
        self._options, self.started_at = options, time.monotonic()
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *options],
                cwd=self._directory,
                env={**ENVIRONMENT, "HYPHA_LOG": LOG_LEVELS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                process_group=self._group,
            )

    @property
    def pid(self) -> int:
        """Of the process that runs, or last ran."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    @property
    def runs(self) -> bool:
        """Whether its process is there, stopped or not."""
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether the process that runs has said so."""
        if not self.runs:
            return False
        # A scheduler that comes back while another leads stands by, whether it was told to or not.
        waits = self.role == "scheduler" and self.said(STANDING_BY)
        return waits or (STANDBY not in self._options and self.said(READY[self.role]))

    def said(self, text: str) -> bool:
        """Whether the process that runs, or last ran, has written this."""
        with self.log.open("rb") as log:
            log.seek(self._log_from)
            return text.encode() in log.read()

    def died(self) -> int | None:
        """Return the exit code of a process that nobody asked to end."""
        return self.process.poll() if self.wanted and self.process is not None else None

    def kill(self) -> None:
        """End it as a power cut does."""
        self.wanted = self.stopped = False
        self._signal(signal.SIGKILL)
        self._ended()

    def stop(self) -> None:
        """Stop it as a suspended machine does."""
        self.stopped = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a stopped one go on."""
        self.stopped = False
        self._signal(signal.SIGCONT)

    def leave(self) -> None:
        """Ask it to end, and wait for nothing."""
        self.wanted = False
        self._signal(signal.SIGTERM)

    def left(self) -> int | None:
        """Return the exit code of one that was asked to leave, once it has."""
        if self.runs:
            return None
        self._ended()
        assert self.process is not None
        return self.process.returncode

    def end(self, timeout_s: float) -> int | None:
        """Ask it to end; returns its exit code, or None where it had to be killed."""
        self.wanted = False
        if not self.runs:
            return 0
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout_s)
            self._ended()
            return code
        self.kill()
        return None

    def use(self) -> Use | None:
        """Return what its process holds now; None where there is none."""
        return use_of(self.pid) if self.runs else None

    def _signal(self, number: signal.Signals) -> None:
        if self.runs:
            os.kill(self.pid, number)

    def _ended(self) -> None:
        assert self.process is not None
        self.process.wait()


def use_of(pid: int) -> Use | None:
    """Return what a process holds now; None where there is none."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return Use(round(process.memory_info().rss / BYTES_PER_MB, 1), process.num_fds())
    return None


@contextmanager
def guarded() -> Iterator[int]:
    """Keep a guardian while the block runs; gives the process group that it ends when this process is gone."""
    command = [sys.executable, "-I", "-S", str(Path(guardian.__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0) as watching:
        try:
            yield watching.pid
        finally:
            watching.communicate(guardian.DONE)


def executors(directory: Path) -> list[Running]:
    """Return every executor that the workers' files name and that lives, but for those that have no job yet."""
    found = []
    for name in cast.WORKERS:
        place = directory / "work" / name
        works = [work for path in place.glob("hypha-*/job.json") if (work := _work(path))]
        records = [path for path in place.glob("processes/*.json") if not path.name.startswith(MARK_PREFIX)]
        found += _running(name, works[-1] if works else "", records)
    return found


def spares(directory: Path) -> list[Running]:
    """Return every warm executor that waits for a job."""
    return [
        running
        for name in cast.WORKERS
        for running in _running(name, SPARE, directory.glob(f"work/{name}/processes/{MARK_PREFIX}*.json"))
    ]


def _running(name: str, work: str, records: Iterable[Path]) -> Iterator[Running]:
    for path in records:
        with suppress(OSError, msgspec.DecodeError):
            record = msgspec.json.decode(path.read_bytes(), type=ProcessRecord)
            running = Running(name, work, record.pgid, record.birth)
            if running.lives:
                yield running


def signal_group(pgid: int, number: signal.Signals) -> None:
    """Send a signal to a process group that may be gone."""
    with suppress(ProcessLookupError):
        os.killpg(pgid, number)


def _work(path: Path) -> str:
    with suppress(OSError, msgspec.DecodeError):
        return str(msgspec.json.decode(path.read_bytes())["work"])
    return ""


def job_directories(directory: Path) -> list[Path]:
    """Return the directories of jobs that lie under the workers' work directories."""
    return sorted(directory.glob("work/*/hypha-*"))
