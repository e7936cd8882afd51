"""Ends what a demo started, should the demo itself be killed: `python -I -S guardian.py`, leader of a process group.

    every process of the demo joins this one's group as it is forked, before it is anything else
    standard input: "done" ─▶ exit 0
    standard input: end of file without it (the demo is gone, however it went)
        ─▶ SIGTERM to the group, which this process ignores ─▶ grace ─▶ SIGKILL to the group, itself included

The kernel closes the pipe even where no handler can run, as after SIGKILL. Standard library only: it starts in
hundredths of a second and rests at a few megabytes.
"""

import os
import signal
import sys
import time

DONE = b"done\n"
# Nodes kill their executors and flush their telemetry within this.
GRACE_S = 10.0


def main() -> None:
    """Wait for the end of standard input, and then for nobody."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    if sys.stdin.buffer.read() == DONE:
        return
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
