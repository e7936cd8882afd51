"""Ends what a demo started, should the demo itself be killed: `python -I -S guardian.py`, alone in its session.

    demo ── "+1234" a process group began, "-1234" it has ended ──▶ standard input
    end of file (the demo is gone, however it went) ─▶ SIGTERM to what is left ─▶ grace ─▶ SIGKILL

The kernel closes the pipe even where no handler can run, as after SIGKILL. Standard library only: it starts in
hundredths of a second and rests at a few megabytes.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

# Nodes kill their executors and flush their telemetry within this.
GRACE_S = 10.0
POLL_S = 0.05


def groups_left(lines: Iterable[str]) -> set[int]:
    """Return the process groups that began and did not end."""
    left: set[int] = set()
    for line in lines:
        sign, number = line[:1], line[1:].strip()
        if number.isdecimal() and int(number) > 1:
            (left.add if sign == "+" else left.discard)(int(number))
    return left


def is_there(group: int) -> bool:
    """Whether any process is left in the group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end(groups: set[int], *, grace_s: float = GRACE_S) -> None:
    """Terminate the groups, and kill what is left of them after the grace."""
    deadline = time.monotonic() + grace_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        groups = {group for group in groups if is_there(group)}
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        while any(map(is_there, groups)) and time.monotonic() < deadline:
            time.sleep(POLL_S)


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    end(groups_left(sys.stdin))
