"""Console scripts as real processes, watched by what they say.

Program(name, command, directory) ─▶ lines as they come ─▶ wait_for("Gateway ready") ─▶ stop(SIGINT) ─▶ exit code
run(command, directory)            ─▶ (exit code, output)
inhabitants(directory)             ─▶ processes whose working directory lies in it
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
# Two shared cores, torch imports included.
PATIENCE_S = 90.0
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("HYPHA_", "OTEL_"))},
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


class Program:
    """A running program; everything it says on either stream is kept."""

    def __init__(self, name: str, command: list[str] | str, directory: Path) -> None:
        self.name = name
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            command if isinstance(command, list) else ["bash", "-c", f"exec {command}"],
            cwd=directory,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for(self, text: str, timeout_s: float = PATIENCE_S) -> str:
        """Return the first line that holds the text, once it is there; AssertionError with all lines otherwise."""
        with self._grown:
            self._grown.wait_for(lambda: self._ended or any(text in line for line in self.lines), timeout_s)
            found = [line for line in self.lines if text in line]
        assert found, f"{self.name} did not say {text!r}:\n" + "\n".join(self.lines)
        return found[0]

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = PATIENCE_S) -> int:
        """Send a signal and return the exit code, all lines read."""
        self.process.send_signal(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code, all lines read."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def kill(self) -> None:
        """Kill its process group, whatever it does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def records(self) -> list[dict[str, Any]]:
        """Return the lines that are JSON objects."""
        return list(_objects(self.lines))

    def errors(self) -> list[str]:
        """Return lines at error level and tracebacks."""
        bad = [record for record in self.records() if record.get("level") == "error"]
        return [str(record) for record in bad] + [line for line in self.lines if "Traceback (most recent" in line]


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


class Stage:
    """Starts programs and ends them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.programs: dict[str, Program] = {}

    def start(self, name: str, command: list[str] | str, directory: Path | None = None) -> Program:
        """Start a program under a name of its own."""
        self.programs[name] = Program(name, command, directory or self.directory)
        return self.programs[name]


@contextmanager
def stage(directory: Path) -> Iterator[Stage]:
    """Give a stage, and kill whatever is still on it in the end."""
    opened = Stage(directory)
    try:
        yield opened
    finally:
        for program in opened.programs.values():
            program.kill()


def run(command: list[str] | str, directory: Path, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
    """Run a program to its end; returns exit code and everything it said."""
    done = subprocess.run(
        command if isinstance(command, list) else ["bash", "-euc", command],
        cwd=directory,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout


def inhabitants(directory: Path) -> list[psutil.Process]:
    """Return the processes that work in the directory or below it; zombies are not counted."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_deserted(directory: Path, timeout_s: float = PATIENCE_S) -> list[psutil.Process]:
    """Wait until no process works in the directory; returns those that still do."""
    psutil.wait_procs(inhabitants(directory), timeout=timeout_s)
    return inhabitants(directory)
