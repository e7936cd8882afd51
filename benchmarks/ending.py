"""Ending the nodes that a benchmark started: all are asked first, and who does not go in time is made to."""

import subprocess
from collections.abc import Collection


def end(processes: Collection["subprocess.Popen[bytes]"], patience_s: float) -> None:
    """Return when all have ended, each at most `patience_s` seconds after its turn."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
