"""A copy of the tree in which defects are planted, one at a time, and what catches them there.

working tree ──copy──▶ scratch ──plant──▶ simulation: first violation ─▶ Caught("seed 4: L5 …")
                          ▲                unit tests: first failure  ─▶ Caught("tests/protocol/…::test_…")
                          └───restore──────────────┘
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COPIED = ("hypha", "tests", "configs", "scripts", "benchmarks", "docs", "pyproject.toml", "Makefile", "README.md")
# A defect may turn a loop into an endless one: nothing here takes as long or as much when it is right.
TESTS_S = 180.0
# On a busy machine that is more: so many times what the same tests took in the copy as it is.
TESTS_TIMES = 4.0
SEED_S = 60.0
MEMORY_BYTES_MAX = 6 << 30
BROKEN = re.compile(r"^BROKEN (.*)$", re.MULTILINE)
SEED = re.compile(r"^seed (\d+) ", re.MULTILINE)
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class Scratch:
    """A copy of the tree below `directory`. Whatever runs in it imports its modules, not the installed ones."""

    def __init__(self, directory: Path, root: Path = ROOT) -> None:
        self.directory = directory
        self._took_s: dict[tuple[str, ...], float] = {}
        leave = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis")
        for name in COPIED:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, directory / name, ignore=leave, symlinks=True)
            elif source.exists():
                shutil.copy2(source, directory / name)

    def read(self, file: str) -> str:
        """Return a file's text, as planted."""
        return (self.directory / file).read_text()

    @contextmanager
    def planted(self, file: str, text: str) -> Iterator[None]:
        """Have `text` in place of a file's own for as long as this is open."""
        before = self.read(file)
        self._write(file, text)
        try:
            yield
        finally:
            self._write(file, before)

    def _write(self, file: str, text: str) -> None:
        path = self.directory / file
        path.write_text(text)
        # Compiled files are judged by second and size: two mutants in one second may look alike.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        shutil.rmtree(self.directory / ".hypothesis", ignore_errors=True)

    # --- running ------------------------------------------------------------------------------------------------

    def tests(self, paths: Sequence[str]) -> str | None:
        """Run tests up to the first failure; returns its name, or None when all pass."""
        patience_s = max(TESTS_S, TESTS_TIMES * self._took_s.get(tuple(paths), TESTS_S / TESTS_TIMES))
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths]
        code, output = self._run(command, patience_s)
        if code == 0:
            self._took_s[tuple(paths)] = time.monotonic() - began
            return None
        if code is None:
            return f"still running after {patience_s:.0f} s"
        failed = FAILED.search(output)
        return failed.group(1) if failed is not None else _last_line(output)

    def simulation(self, seeds: int, start: int = 0) -> str | None:
        """Simulate one seed after another up to the first violation; returns it, or None when there is none."""
        command = [sys.executable, "-m", "tests.sim.main", "--seeds", str(seeds), "--start", str(start), "--jobs", "1"]
        code, output = self._run(command, seeds * SEED_S, until=BROKEN)
        broken, seed = BROKEN.search(output), SEED.search(output)
        if broken is not None and seed is not None:
            return f"seed {seed.group(1)}: {broken.group(1)}"
        return None if code == 0 else f"it does not end: {_last_line(output)}"

    def _run(
        self, command: list[str], patience_s: float, until: re.Pattern[str] | None = None
    ) -> tuple[int | None, str]:
        """Return exit code (None: out of time) and output; ended early once a line matches `until`."""
        environment = os.environ | {
            "PYTHONPATH": str(self.directory),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            ["timeout", "--signal=KILL", f"{patience_s:g}", *command],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_limit_memory,
        )
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if until is not None and until.match(line):
                    break
            else:
                process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        killed = process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return None if killed else process.returncode, "".join(lines)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def _last_line(output: str) -> str:
    said = [line.strip() for line in output.splitlines() if line.strip()]
    return said[-1] if said else "nothing was said"
