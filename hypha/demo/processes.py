"""The demo's processes: all in the guardian's process group, standard error of each in DIR/logs/NAME.log.

    step     run to the end, return its standard output        exit ≠ 0 ─▶ DemoFailed
    attend   run for as long as the demo wants
               died ─▶ told to `lost` ─▶ backoff ─▶ started again, RESTARTS_MAX times ─▶ DemoFailed
               its configuration was refused (exit 2) ─▶ DemoFailed at once
    cancelled: SIGTERM ─▶ grace ─▶ SIGKILL, and nothing of it is left

The guardian ends its group when the demo is gone, so that not even SIGKILL of the demo leaves a process behind; and a
Ctrl-C in the terminal, which goes to the group in its foreground, reaches the demo alone.
"""

import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import trio

from hypha.demo import guardian
from hypha.errors import HyphaError

# A node ends its executors (2 s of grace) and flushes telemetry (2 s) in less.
STOP_GRACE_S = 10.0
# A step is one command that ends by itself; the longest, preparing the largest text, takes seconds.
STEP_S = 120.0
OUTPUT_BYTES_MAX = 1 << 20
RESTARTS_MAX = 5
BACKOFF_S = 0.5
BACKOFF_MAX_S = 8.0
EXIT_CONFIG = 2
LAST_LINES = 5
Ended = Callable[[int], bool]
Lost = Callable[[str, str], None]


class DemoFailed(HyphaError):
    """The demo cannot go on; the message is for the person who started it."""


def in_words(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


class Processes:
    """Starts, restarts and stops them; made by `processes`."""

    def __init__(self, directory: Path, environment: Mapping[str, str], group: int, lost: Lost) -> None:
        self._directory = directory
        self._environment = dict(environment)
        self._group = group
        self._lost = lost
        self.running: dict[str, int] = {}  # name -> pid

    async def step(self, name: str, command: Sequence[str]) -> str:
        """Run a command to its end, for STEP_S at most; returns its standard output. Raises DemoFailed."""
        said = shlex.join(command[:2])
        # A file, not a pipe: a step that says more than a pipe holds would wait for a reader for ever.
        with tempfile.TemporaryFile() as out:
            async with self._process(name, command, out.fileno()) as process:
                with trio.move_on_after(STEP_S):
                    await process.wait()
            if process.returncode != 0:
                how = in_words(process.returncode or 0)
                raise DemoFailed(f"{said} …: {how}: {self.last_lines(name)}")
            # Nodes always have a log; of a step only what it complained of is kept.
            if not self._log(name).stat().st_size:
                self._log(name).unlink()
            out.seek(0)
            return out.read(OUTPUT_BYTES_MAX).decode(errors="replace")

    async def attend(self, name: str, command: Sequence[str], *, is_end: Ended = lambda code: False) -> None:
        """Keep a command running until an exit that `is_end` accepts. Raises DemoFailed when that is hopeless."""
        for restarts in range(RESTARTS_MAX + 1):
            async with self._process(name, command, subprocess.DEVNULL) as process:
                code = await process.wait()
            if is_end(code):
                return
            self._lost(name, in_words(code))
            if code == EXIT_CONFIG:
                raise DemoFailed(f"{name}: {self.last_lines(name)}")
            await trio.sleep(min(BACKOFF_MAX_S, BACKOFF_S * 2**restarts))
        raise DemoFailed(f"{name} died {RESTARTS_MAX + 1} times; last: {self.last_lines(name)}")

    def last_lines(self, name: str) -> str:
        """Return the end of what a process wrote on standard error."""
        with suppress(OSError):
            lines = self._log(name).read_text(errors="replace").splitlines()
            return " | ".join(line[:500] for line in lines[-LAST_LINES:])
        return ""

    def _log(self, name: str) -> Path:
        return self._directory / "logs" / f"{name}.log"

    @asynccontextmanager
    async def _process(self, name: str, command: Sequence[str], stdout: int) -> AsyncIterator[trio.Process]:
        process = await self._start(name, command, stdout)
        self.running[name] = process.pid
        try:
            yield process
        finally:
            if not await _end(process):
                self._lost(name, f"it did not stop within {STOP_GRACE_S:g} s")
            del self.running[name]

    async def _start(self, name: str, command: Sequence[str], stdout: int) -> trio.Process:
        try:
            with _appending(self._log(name)) as log:
                return await trio.lowlevel.open_process(
                    list(command),
                    cwd=self._directory,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=log.fileno(),
                    process_group=self._group,
                )
        except OSError as error:
            raise DemoFailed(f"{command[0]} does not start: {error.strerror}") from error


def _appending(path: Path) -> BinaryIO:
    return path.open("ab")


async def _end(process: trio.Process) -> bool:
    """Return when the process is gone: True if it stopped when asked to."""
    if process.returncode is None:
        process.terminate()
        with trio.move_on_after(STOP_GRACE_S, shield=True):
            await process.wait()
    if process.returncode is not None:
        return True
    process.kill()
    with trio.CancelScope(shield=True):
        await process.wait()
    return False


@contextmanager
def processes(directory: Path, environment: Mapping[str, str], lost: Lost) -> Iterator[Processes]:
    """Keep a guardian while the block runs; `lost` hears of every process that died, and how."""
    command = [sys.executable, "-I", "-S", str(Path(guardian.__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0) as watching:
        try:
            yield Processes(directory, environment, watching.pid, lost)
        finally:
            watching.communicate(guardian.DONE)
