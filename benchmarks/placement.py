"""Placement at scale: how soon workers are leased, and what a network of many costs. ARGS='--part NAME' runs one part.

processes  advertisement → 16 leased workers in real processes                     placement_processes
thousand   1000 workers in memory and virtual time: messages and CPU per lease     placement_memory
growth     10 to 10 000 workers, likewise: a table, and a plot with --plot FILE    placement_growth
gateway    100 nodes on one gateway: memory, CPU at rest, DHT, gossip              placement_gateway
leases     a scheduler that renews 1000 leases over real sockets: CPU, memory      placement_leases
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks import placement_gateway, placement_growth, placement_leases, placement_memory, placement_processes
from benchmarks.report import Figure, print_report

Part = Callable[[], tuple[list[Figure], dict[str, object]]]
NAMES = ("processes", "thousand", "growth", "gateway", "leases")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=NAMES, action="append", help="only this one; may be repeated")
    parser.add_argument("--plot", type=Path, help="where the plot of `growth` goes")
    given = parser.parse_args()
    parts: dict[str, Part] = {
        "processes": placement_processes.run,
        "thousand": placement_memory.thousand,
        "growth": lambda: placement_growth.run(given.plot),
        "gateway": placement_gateway.run,
        "leases": placement_leases.run,
    }
    figures: list[Figure] = []
    detail: dict[str, object] = {"cores": os.cpu_count()}
    for name in given.part or NAMES:
        found, detail[name] = parts[name]()
        figures += found
    print_report("placement", figures, detail)


if __name__ == "__main__":
    main()
