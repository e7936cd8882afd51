"""What a run's processes take while it goes: processor seconds by kind of process, and the server's executor's memory.

every SAMPLE_S   /proc/PID/stat of every process below the given ones ─▶ samples
between(t0, t1)  ─▶ {"server": s, "server executor": s, "workers": s, "worker executors": s, "scheduler": s, …}
"""

import os
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path

import psutil

SAMPLE_S = 0.05
# Looking for new processes reads all of /proc; they come at the beginning only.
SEARCH_S = 1.0
TICK = os.sysconf("SC_CLK_TCK")
MIB = 1024


class Watch:
    """Samples in a thread of its own while used as a context manager; `roots` are process ids by the node's name."""

    def __init__(self, roots: dict[str, int]) -> None:
        self.peak_mib: dict[str, float] = {}
        self._roots = roots
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._kinds: dict[int, str] = {}
        self._searched = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> dict[str, float]:
        """Return processor seconds of each kind between two moments of CLOCK_MONOTONIC."""
        times = [at for at, _ in self._samples]
        first, last = (min(bisect_left(times, at), len(times) - 1) for at in (begin, end))
        before, after = self._samples[max(0, first - 1)][1], self._samples[last][1]
        return {kind: round(after[kind] - before.get(kind, 0.0), 2) for kind in sorted(after)}

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            if time.monotonic() - self._searched > SEARCH_S:
                self._search()
                self._searched = time.monotonic()
            taken: dict[str, float] = defaultdict(float)
            for pid, kind in self._kinds.items():
                taken[kind] += _cpu_s(pid)
            self._samples.append((time.monotonic(), dict(taken)))

    def _search(self) -> None:
        for name, pid in self._roots.items():
            node = {"worker-0": "server"}.get(name, "workers" if name.startswith("worker") else name)
            self._kinds[pid] = node
            try:
                below = psutil.Process(pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in below:
                kind = "server executor" if node == "server" else "worker executors"
                self._kinds[process.pid] = kind
                self.peak_mib[kind] = max(self.peak_mib.get(kind, 0.0), _peak_mib(process.pid))


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def _peak_mib(pid: int) -> float:
    """VmHWM: the most that was ever resident, mapped files included."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / MIB
    except (OSError, IndexError):
        return 0.0
