"""Executors as real processes: one process group each, killed whole, its death confirmed before anything is freed.

    start ─▶ record on disk ─▶ running ──exit──▶ ended ─▶ group confirmed gone ─▶ record removed
      ▲                           └──kill──▶ SIGTERM ─▶ grace ─▶ SIGKILL ──────────┘
      └── anew, or a spare that has imported everything already (hypha.worker.warm)

The record (process group and start time) lets a restarted worker end what its previous incarnation left behind. Start
times are ticks since boot, so that setting the clock confuses nobody; a process whose leader is gone is known by the
lease in its environment, or by the mark of the spare that it was.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec
import psutil
import trio

from hypha.errors import JobFailed, StoreError
from hypha.protocol.job import JobSpec
from hypha.protocol.warm import WarmStart
from hypha.telemetry import get_logger
from hypha.worker.bridge import JobSession, serve_bridge
from hypha.worker.config import ExecutorConfig

log = get_logger("worker.process")

# What a failed job shows its scheduler; the whole output is in executor.log until the directory goes.
LAST_LINES_KEPT = 20
LINE_BYTES_MAX = 2000
# A training step in progress ends within this; after it the group is killed outright.
TERMINATE_GRACE_S = 2.0
# SIGKILL is immediate unless the kernel holds the process (a hung device); past this we say so and keep waiting.
KILL_POLL_S = 0.02
KILL_WARN_S = 10.0
# What the dead wrote is in the pipe already; somebody who left the group may hold it open for longer.
OUTPUT_GRACE_S = 1.0
# How often it is looked whether an executor stands still.
STOPPED_POLL_S = 1.0
# executor.log is for people; an executor that writes without end must not fill the disk.
LOG_BYTES_MAX = 16 << 20
# In every executor's environment, and so in that of all it starts.
LEASE_VARIABLE = "HYPHA_LEASE_ID"
# Runs a module of ours; its name and its arguments follow.
INTERPRETER = (sys.executable, "-m")


class Executor(Protocol):
    """One running executor, real or simulated."""

    async def wait(self) -> int:
        """Return the exit code once the executor has ended by itself or was killed."""

    def last_lines(self) -> tuple[str, ...]:
        """Return the end of what it wrote, for people."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be started: whose job, by which executor, where, with how many threads."""

    job: JobSpec
    lease_id: str
    executor: ExecutorConfig
    session: JobSession
    directory: Path
    threads: int
    has_gpu: bool = False
    stopped_max_s: float = float("inf")  # a process that stands still (SIGSTOP) for longer has failed


class Launcher(Protocol):
    """How executors are started. Implementations: processes, and the simulator's tasks."""

    def launch(self, what: Launch) -> AbstractAsyncContextManager[Executor]:
        """Run an executor while the context is open; leaving it returns only when nothing of it is left.

        Raises JobFailed when it cannot be started.
        """


class Spares(Protocol):
    """Processes that were started before their job."""

    def take(self, start: WarmStart, *, has_gpu: bool) -> tuple[trio.Process, str] | None:
        """Give one its job; returns it with the mark in its environment, None where there is none."""


class ProcessRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A process group with the birth of its leader: a recycled pid has another one.

    `mark` is what stands for the lease in its environment where it was started before it had one.
    """

    pgid: int
    birth: str
    mark: str = ""


class ProcessExecutor:
    """A child process with its own session, its output copied to a log and its last lines kept."""

    def __init__(self, process: trio.Process, log_path: Path) -> None:
        self._process = process
        self._log_path = log_path
        self._lines: deque[str] = deque(maxlen=LAST_LINES_KEPT)
        self._rest = b""
        self._log_bytes_left = LOG_BYTES_MAX
        self._output_ended = trio.Event()

    @property
    def pgid(self) -> int:
        """The process group, which is the leader's pid because it started a session."""
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code; negative is the signal that ended it."""
        return await self._process.wait()

    def last_lines(self) -> tuple[str, ...]:
        """Return at most LAST_LINES_KEPT lines, an unfinished one last."""
        unfinished = [_text(self._rest)] if self._rest.strip() else []
        return (*self._lines, *unfinished)[-LAST_LINES_KEPT:]

    async def copy_output(self) -> None:
        """Copy standard output and error to the log until the pipe closes, whoever holds it."""
        output = self._process.stdout
        assert output is not None
        try:
            async for chunk in output:
                self._log(bytes(chunk))
                *lines, rest = (self._rest + bytes(chunk)).split(b"\n")
                self._lines.extend(_text(line) for line in lines if line.strip())
                self._rest = rest[-LINE_BYTES_MAX:]
        finally:
            self._output_ended.set()

    async def ended_output(self) -> None:
        """Wait until everything it wrote has been copied, but not for ever."""
        with trio.move_on_after(OUTPUT_GRACE_S):
            await self._output_ended.wait()

    def _log(self, chunk: bytes) -> None:
        """Append to the log file; a full disk costs the log, not the job."""
        if not self._log_bytes_left:
            return
        chunk = chunk[: self._log_bytes_left]
        self._log_bytes_left -= len(chunk)
        try:
            with self._log_path.open("ab") as sink:
                sink.write(chunk)
        except OSError as error:
            self._log_bytes_left = 0
            self._lines.append(f"[executor.log: {error.strerror}]")


def _text(line: bytes) -> str:
    return line[:LINE_BYTES_MAX].decode(errors="replace").rstrip("\r")


class ProcessLauncher:
    """Starts executors as child processes and remembers them on disk under `records`."""

    def __init__(self, records: Path, environment: Mapping[str, str], spares: Spares | None = None) -> None:
        self._records = records
        self._environment = dict(environment)
        self._spares = spares

    @asynccontextmanager
    async def launch(self, what: Launch) -> AsyncIterator[Executor]:
        """Serve the bridge, start the process, and on leaving kill its group and wait until it is gone."""
        job_json = what.directory / "job.json"
        _write(job_json, msgspec.json.encode(what.job))
        record = self._records / f"{what.lease_id}.json"
        async with trio.open_nursery() as nursery:
            socket_path = await nursery.start(serve_bridge, what.session, what.directory)
            command = command_of(what.executor, socket_path=socket_path, work_dir=what.directory, job_json=job_json)
            process, mark = self._spare(command, what) or (await self._spawn(command, what), "")
            running = ProcessExecutor(process, what.directory / "executor.log")
            nursery.start_soon(running.copy_output)
            try:
                _write(record, msgspec.json.encode(ProcessRecord(running.pgid, birth_of(running.pgid) or "", mark)))
                if mark:
                    (self._records / f"{mark}.json").unlink(missing_ok=True)
                nursery.start_soon(_watch_for_stop, running.pgid, what)
                yield running
            finally:
                with trio.CancelScope(shield=True):
                    await end_group(running.pgid)
                    await process.wait()
                    await running.ended_output()
                record.unlink(missing_ok=True)
                nursery.cancel_scope.cancel()

    def _spare(self, command: list[str], what: Launch) -> tuple[trio.Process, str] | None:
        """Return a process that was started for no job and has this one now, where there is such."""
        if self._spares is None or what.executor.cmd is not None:
            return None
        start = WarmStart(
            work=what.executor.work,
            arguments=tuple(command[len(INTERPRETER) + 1 :]),
            directory=str(what.directory),
            environment=_own(what),
        )
        return self._spares.take(start, has_gpu=what.has_gpu)

    async def _spawn(self, command: list[str], what: Launch) -> trio.Process:
        try:
            return await trio.lowlevel.open_process(
                command,
                cwd=what.directory,
                env={**self._environment, **_own(what)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise JobFailed(f"executor {command[0]!r} did not start: {error}") from error

    async def end_leftovers(self) -> int:
        """Kill what a previous incarnation of this worker left running; returns how many groups."""
        ended = 0
        for record in sorted(self._records.glob("*.json")):
            try:
                left = msgspec.json.decode(record.read_bytes(), type=ProcessRecord)
            except (OSError, msgspec.DecodeError):
                record.unlink(missing_ok=True)
                continue
            if _is_ours(left, record.stem):
                log.warn("Ending an executor of an earlier run", process_group=left.pgid)
                await end_group(left.pgid)
                ended += 1
            record.unlink(missing_ok=True)
        return ended


async def _watch_for_stop(pgid: int, what: Launch) -> None:
    """Fail the job of a process that was seen standing still for longer than it may: it will not say so itself.

    Only what was seen counts, so that a machine that was suspended with all its processes has lost nothing.
    """
    seen_s = 0.0
    while seen_s <= what.stopped_max_s:
        await trio.sleep(STOPPED_POLL_S)
        seen_s = seen_s + STOPPED_POLL_S if _stands_still(pgid) else 0.0
    what.session.fail(f"the executor was stopped for {seen_s:.0f} s (a stop signal)")


def _stands_still(pid: int) -> bool:
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _own(what: Launch) -> dict[str, str]:
    """Return what the environment of an executor holds for its job alone."""
    threads = str(what.threads)
    own = {"OMP_NUM_THREADS": threads, "HYPHA_THREADS": threads, LEASE_VARIABLE: what.lease_id}
    if not what.has_gpu:
        own["CUDA_VISIBLE_DEVICES"] = ""  # torch takes every device that it sees; this lease paid for none
    return own


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error


def birth_of(pid: int) -> str | None:
    """Return what tells a process from any other that had or will have its pid; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return _birth_elsewhere(pid)
    return f"{boot} {int(fields[19])}"  # proc(5), field 22: starttime, in ticks since boot


def _birth_elsewhere(pid: int) -> str | None:
    """The same where there is no /proc: the kernel keeps the time at which it started the process."""
    with suppress(psutil.NoSuchProcess):
        return str(psutil.Process(pid).create_time())
    return None


def _is_ours(left: ProcessRecord, lease_id: str) -> bool:
    birth = birth_of(left.pgid)
    if birth is not None:
        return birth == left.birth
    # The leader is gone; what it started may live on in its group.
    return any(_lease_of(pid) in {lease_id, left.mark or lease_id} for pid in group_members(left.pgid))


def _lease_of(pid: int) -> str | None:
    with suppress(psutil.Error):
        lease_id: str | None = psutil.Process(pid).environ().get(LEASE_VARIABLE)
        return lease_id
    return None


def command_of(executor: ExecutorConfig, *, socket_path: Path, work_dir: Path, job_json: Path) -> list[str]:
    """Return the argument vector with {SOCKET_PATH}, {WORK_DIR} and {JOB_JSON} filled in.

    The built-in executors need no `cmd`: they run as `python -m hypha.training.train` or `…aggregate`.
    """
    values = {"{SOCKET_PATH}": str(socket_path), "{WORK_DIR}": str(work_dir), "{JOB_JSON}": str(job_json)}
    if executor.cmd is None:
        template = [*INTERPRETER, f"hypha.training.{executor.work}", "--socket", "{SOCKET_PATH}"]
        template += ["--work-dir", "{WORK_DIR}", "--job", "{JOB_JSON}"]
    else:
        template = [executor.cmd, *executor.args]
    for key, value in values.items():
        template = [part.replace(key, value) for part in template]
    return template


def group_members(pgid: int) -> list[int]:
    """Return the pids in a process group that are not zombies."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return sorted(found)


def _signal_group(pgid: int, number: int) -> bool:
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so when only zombies are left
        return bool(group_members(pgid))
    return True


async def end_group(pgid: int) -> None:
    """Terminate a process group, kill it after a grace, and return only when none of it is left."""
    if _signal_group(pgid, signal.SIGTERM):
        with trio.move_on_after(TERMINATE_GRACE_S):
            await _gone(pgid)
            return
    else:
        return
    _signal_group(pgid, signal.SIGKILL)
    with trio.move_on_after(KILL_WARN_S):
        await _gone(pgid)
        return
    log.error("A killed executor does not end; its resources stay reserved", process_group=pgid)
    await _gone(pgid)


async def _gone(pgid: int) -> None:
    # Signal 0 only asks, and costs less than looking at every process; zombies answer it, too.
    while _signal_group(pgid, 0) and group_members(pgid):  # noqa: ASYNC110 - the end of a group is no event
        await trio.sleep(KILL_POLL_S)
