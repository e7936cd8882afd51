"""Links of a given speed for the outer-round benchmark: every worker in a network namespace of its own. Needs root.

    hypha-br0 10.77.0.1 ── veth, tc tbf both ways ── namespace hypha-bench-0  10.77.0.10   worker-0, serves parameters
    (gateway, data node,                        └── namespace hypha-bench-1  10.77.0.11   worker-1 …
     scheduler: unshaped)

bound = (what the server receives + what it sends) ÷ bandwidth: it cannot send before it has received everything.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

BRIDGE, SPACE = "hypha-br0", "hypha-bench-"
NETWORK, FIRST = "10.77.0", 10
# tbf lets so much through at once; what exceeds the rate waits LATENCY at most.
BURST, LATENCY = "256kb", "50ms"


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def address(number: int) -> str:
    """IP address of a worker."""
    return f"{NETWORK}.{FIRST + number}"


def inside(number: int) -> tuple[str, ...]:
    """What runs a program where a worker is."""
    return ("ip", "netns", "exec", f"{SPACE}{number}")


def bound_s(workers: int, model_bytes: int, megabits: int) -> float:
    """Seconds that the server's link takes for all pushes and then for all updates."""
    return 2 * workers * model_bytes * 8 / (megabits * 1e6)


@contextmanager
def links(workers: int, megabits: int) -> Iterator[None]:
    """Keep `workers` + 1 namespaces while the block runs. Raises CalledProcessError."""
    try:
        _do("ip", "link", "add", BRIDGE, "type", "bridge")
        _do("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _do("ip", "link", "set", BRIDGE, "up")
        for number in range(workers + 1):
            _link(number, megabits)
        yield
    finally:
        for number in range(workers + 1):
            subprocess.run(("ip", "netns", "del", f"{SPACE}{number}"), capture_output=True, check=False)
        subprocess.run(("ip", "link", "del", BRIDGE), capture_output=True, check=False)


def _link(number: int, megabits: int) -> None:
    space, outer = f"{SPACE}{number}", f"hypha-v{number}"
    shape = ("root", "tbf", "rate", f"{megabits}mbit", "burst", BURST, "latency", LATENCY)
    _do("ip", "netns", "add", space)
    _do("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
    _do("ip", "link", "set", outer, "master", BRIDGE, "up")
    _do(*inside(number), "ip", "link", "set", "lo", "up")
    _do(*inside(number), "ip", "addr", "add", f"{address(number)}/24", "dev", "eth0")
    _do(*inside(number), "ip", "link", "set", "eth0", "up")
    _do("tc", "qdisc", "add", "dev", outer, *shape)
    _do(*inside(number), "tc", "qdisc", "add", "dev", "eth0", *shape)
