"""The nodes as real processes, to be killed, stopped and started again; and what their workers run.

    Node ── start ─▶ process, standard error to logs/NAME.log ── kill, stop, go on, end
    runs(directory) ─▶ work/NAME/hypha-JOB-FENCE/job.json + work/NAME/processes/LEASE.json: who executes what

A guardian hears of every process, so that none outlives this one, however it ends.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from hypha.demo import guardian
from hypha.worker.process import ProcessRecord, birth_of
from tests.chaos import cast
from tests.e2e.programs import ENVIRONMENT

BYTES_PER_MB = 1e6
LOG_LEVELS = "info"
READY = {"gateway": '"Gateway ready"', "data": '"Serving"', "worker": '"Worker ready"', "scheduler": '"Job started"'}


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

    def __init__(self, name: str, directory: Path, watch: int, run: str = "") -> None:
        self.name = name
        self.log = directory / "logs" / f"{run or name}.log"
        self.command = cast.command(name, run)
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = False
        self.stopped = False
        self._log_from = 0
        self._directory = directory
        self._watch = watch

    def start(self) -> None:
        """Start it; its log goes on where the last one ended."""
        self.wanted = True
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self._directory,
                env={**ENVIRONMENT, "HYPHA_LOG": LOG_LEVELS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self._tell("+")

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
        with self.log.open("rb") as log:
            log.seek(self._log_from)
            return READY[cast.ROLES[self.name]].encode() in log.read()

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
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return Use(round(process.memory_info().rss / BYTES_PER_MB, 1), process.num_fds())
        return None

    def _signal(self, number: signal.Signals) -> None:
        if self.runs:
            os.kill(self.pid, number)

    def _ended(self) -> None:
        assert self.process is not None
        self.process.wait()
        self._tell("-")

    def _tell(self, sign: str) -> None:
        with suppress(BrokenPipeError):
            os.write(self._watch, f"{sign}{self.pid}\n".encode())


@contextmanager
def guarded() -> Iterator[int]:
    """Keep a guardian while the block runs; gives the descriptor that nodes tell it of their processes through."""
    command = [sys.executable, "-I", "-S", str(Path(guardian.__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watching:
        assert watching.stdin is not None
        yield watching.stdin.fileno()


def executors(directory: Path) -> list[Running]:
    """Return every executor that the workers' files name and that lives."""
    found = []
    for name in cast.WORKERS:
        place = directory / "work" / name
        works = [work for path in place.glob("hypha-*/job.json") if (work := _work(path))]
        for path in place.glob("processes/*.json"):
            with suppress(OSError, msgspec.DecodeError):
                record = msgspec.json.decode(path.read_bytes(), type=ProcessRecord)
                running = Running(name, works[-1] if works else "", record.pgid, record.birth)
                found += [running] if running.lives else []
    return found


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
