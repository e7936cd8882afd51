"""Slow links for the utilisation benchmark: every worker in a network namespace of its own. Needs root, ip and tc.

    hypha-sbr 10.78.0.1 ── veth hypha-s0, tc tbf both ways ── namespace hypha-shaped-0  10.78.0.10  worker-0
    (gateway, data node,               └── hypha-s1 … ─────── namespace hypha-shaped-1  10.78.0.11  worker-1 …
     scheduler: unshaped)

Both ends of a veth are shaped, so a link is as fast in as it is out, at the same time. `Links.slow_down` changes all.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

BRIDGE, SPACE, VETH = "hypha-sbr", "hypha-shaped-", "hypha-s"
NETWORK, FIRST = "10.78.0", 10
# tbf lets so much through at once, a few hundredths of a fragment, and so much waits: some forty packets. A queue of a
# few packets, which is what 50 ms are on such a link, would lose most of each window that TCP sends.
BURST, QUEUE = "16kb", "64kb"
# As long as nothing is measured the links are as good as open, so that a run begins soon.
OPEN_BYTES_PER_S = 100e6


class Counted(Struct, frozen=True):
    """At what moment (monotonic seconds) which rate began, and what had passed each worker's link: bytes out, in."""

    at: float
    bytes_per_s: float
    passed: tuple[tuple[int, int], ...]


def fault() -> str | None:
    """Say why links cannot be made here; None: they can."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian: apt install iproute2)"
    if os.geteuid() != 0:
        return "needs root for network namespaces: run it with sudo"
    for space in _spaces():
        if _do("ip", "netns", "pids", space).split():
            return f"namespace {space} is in use: another run is under way, or its processes were left behind"
    return None


def address(number: int) -> str:
    """IP address of a worker; that of what is not shaped ends with 1."""
    return f"{NETWORK}.{FIRST + number}"


def inside(number: int) -> tuple[str, ...]:
    """What runs a program where a worker is."""
    return ("ip", "netns", "exec", f"{SPACE}{number}")


class Links:
    """The links of workers 0 to `workers` - 1."""

    def __init__(self, workers: int) -> None:
        self.numbers = range(workers)
        self.bytes_per_s = OPEN_BYTES_PER_S
        self.counted: list[Counted] = []

    def slow_down(self, bytes_per_s: float) -> None:
        """Give every link another rate, in both directions."""
        for number in self.numbers:
            for place, device in _ends(number):
                _do(*place, "tc", "qdisc", "change", "dev", device, *_shape(bytes_per_s))
        self.bytes_per_s = bytes_per_s

    def count(self) -> None:
        """Note what has passed until now."""
        passed = tuple((_sent(number, 1), _sent(number, 0)) for number in self.numbers)
        self.counted.append(Counted(time.monotonic(), self.bytes_per_s, passed))


@contextmanager
def links(workers: int) -> Iterator[Links]:
    """Keep namespaces and links, open at first, while the block runs. Raises CalledProcessError."""
    _remove()
    try:
        _do("ip", "link", "add", BRIDGE, "type", "bridge")
        _do("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _do("ip", "link", "set", BRIDGE, "up")
        for number in range(workers):
            _link(number)
        yield Links(workers)
    finally:
        _remove()


def _link(number: int) -> None:
    space = f"{SPACE}{number}"
    _do("ip", "netns", "add", space)
    _do("ip", "link", "add", f"{VETH}{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
    _do("ip", "link", "set", f"{VETH}{number}", "master", BRIDGE, "up")
    _do(*inside(number), "ip", "link", "set", "lo", "up")
    _do(*inside(number), "ip", "addr", "add", f"{address(number)}/24", "dev", "eth0")
    _do(*inside(number), "ip", "link", "set", "eth0", "up")
    for place, device in _ends(number):
        _do(*place, "tc", "qdisc", "add", "dev", device, *_shape(OPEN_BYTES_PER_S))


def _remove() -> None:
    """Remove what stands, of an earlier run, too."""
    for space in _spaces():
        subprocess.run(("ip", "link", "del", VETH + space.removeprefix(SPACE)), capture_output=True, check=False)
        subprocess.run(("ip", "netns", "del", space), capture_output=True, check=False)
    subprocess.run(("ip", "link", "del", BRIDGE), capture_output=True, check=False)


def _spaces() -> list[str]:
    names = [line.split()[0] for line in _do("ip", "netns", "list").splitlines() if line]
    return [name for name in names if name.startswith(SPACE)]


def _ends(number: int) -> tuple[tuple[tuple[str, ...], str], tuple[tuple[str, ...], str]]:
    return ((), f"{VETH}{number}"), (inside(number), "eth0")


def _shape(bytes_per_s: float) -> tuple[str, ...]:
    return ("root", "tbf", "rate", f"{int(bytes_per_s * 8)}bit", "burst", BURST, "limit", QUEUE)


def _sent(number: int, end: int) -> int:
    place, device = _ends(number)[end]
    disciplines: list[dict[str, Any]] = json.loads(_do(*place, "tc", "-s", "-j", "qdisc", "show", "dev", device))
    return int(disciplines[0]["bytes"])


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
