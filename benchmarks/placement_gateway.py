"""The manual's capacity: a hundred nodes on one gateway.

hypha-gateway              a process of its own: its memory, and its CPU while nothing happens
here                       100 workers' networks with certificates and ports of their own, and one scheduler's

settle ─▶ rest: CPU over WATCH_S ─▶ one announcement: who hears it ─▶ Health of each, found by the DHT alone
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path

import psutil
import trio

from benchmarks.certificates import Files, issue
from benchmarks.placement_processes import configured, cpu_ms
from benchmarks.report import Figure
from hypha.config import NodeConfig
from hypha.demo.nodes import free_port
from hypha.errors import PeerUnreachable
from hypha.network.health import serve_health
from hypha.network.host import Libp2pNetwork, open_network
from hypha.network.retry import attempt
from hypha.network.seam import Network
from hypha.protocol.messages import TOPIC_WORKER, Ask, Health, TaskAdvertisement
from hypha.protocol.resources import Resources
from hypha.runtime import RealRuntime

NODES = 100
READY_S, POLL_S = 60.0, 0.1
SETTLE_S = 8.0
WATCH_S = 15.0
HEAR_S = 10.0
# Each node is asked once by one that knows nothing of it; a DHT query and a handshake.
PATIENCE_S = 60.0
AT_ONCE = 8
# The manual: minimal compute, 1–2 cores, 2–4 GB. At rest a node is to cost next to nothing (BENCH=rest).
MEMORY_WANTED_MB = 2000.0
CPU_WANTED_PERCENT = 20.0


async def measure(files: dict[str, Files], gateway: str, process: psutil.Process) -> dict[str, float]:
    """Join everybody and watch; returns numbers by name."""
    names = [name for name in files if name.startswith("node")]
    heard = Heard()
    async with AsyncExitStack() as stack:
        began = time.monotonic()
        nodes = [await stack.enter_async_context(_joined(files[name], gateway, "worker")) for name in names]
        scheduler = await stack.enter_async_context(_joined(files["scheduler"], gateway, "scheduler"))
        joined_s = time.monotonic() - began
        async with trio.open_nursery() as nursery:
            for node in nodes:
                serve_health(node, RealRuntime(), "worker", dict)
                await nursery.start(heard.listen, node)
            await trio.sleep(SETTLE_S)
            cpu, began = cpu_ms(process), time.monotonic()
            await trio.sleep(WATCH_S)
            at_rest = (cpu_ms(process) - cpu) / 1000 / (time.monotonic() - began)
            memory_mb = process.memory_info().rss / 1e6
            spread_ms = await _announce(scheduler, heard)
            reached = await _reach(scheduler, nodes)
            nursery.cancel_scope.cancel()
    return {
        "joined_s": round(joined_s, 2),
        "gateway_cpu_percent": round(100 * at_rest, 2),
        "gateway_memory_mb": round(memory_mb, 1),
        "heard": len(heard.at),
        "last_heard_ms": spread_ms,
        "reached": len(reached),
        "reach_ms": round(1000 * statistics.median(reached), 1) if reached else 0.0,
    }


def _joined(files: Files, gateway: str, role: str) -> AbstractAsyncContextManager[Libp2pNetwork]:
    config = NodeConfig(
        cert_pem=files.cert_pem,
        key_pem=files.key_pem,
        trust_pem=files.trust_pem,
        gateway_addresses=(gateway,),
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
    )
    return open_network(files.identity(), config, role=role, runtime=RealRuntime())


class Heard:
    """When each node heard the announcement; `all` is set once everybody has."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self.all = trio.Event()

    async def listen(self, node: Network, *, task_status: trio.TaskStatus[None]) -> None:
        """Note what this node hears."""
        async with node.subscribe(TOPIC_WORKER) as announcements:
            task_status.started()
            async for _ in announcements:
                self.at.setdefault(node.peer_id, time.monotonic())
                if len(self.at) == NODES:
                    self.all.set()


async def _announce(scheduler: Libp2pNetwork, heard: Heard) -> float:
    """Publish once; returns after how many ms the last node heard it, of those that did."""
    ask = Ask(work="train", executor="none", resources=Resources(cpu=1), count=1, bid=1)
    began = time.monotonic()
    await scheduler.publish(
        TOPIC_WORKER,
        TaskAdvertisement(
            advertisement_id="bench",
            scheduler=scheduler.peer_id,
            addresses=scheduler.signed_addresses(),
            job_id="bench",
            job_epoch=1,
            asks=(ask,),
            welcome_s=1.0,
        ),
    )
    with trio.move_on_after(HEAR_S):
        await heard.all.wait()
    return round(1000 * (max(heard.at.values(), default=began) - began), 1)


async def _reach(scheduler: Libp2pNetwork, nodes: list[Libp2pNetwork]) -> list[float]:
    """Ask each for its health by its id alone; returns the seconds that each took."""
    limit, taken = trio.CapacityLimiter(AT_ONCE), []

    async def ask(peer_id: str) -> None:
        async with limit:
            began = time.monotonic()
            try:
                await attempt(scheduler, peer_id, Health(), patience_s=PATIENCE_S)
            except PeerUnreachable as error:
                print(error, file=sys.stderr)
            else:
                taken.append(time.monotonic() - began)

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(ask, node.peer_id)
    return taken


def _await_port(port: int) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(POLL_S)
    raise RuntimeError(f"the gateway does not listen on port {port}")


def run() -> tuple[list[Figure], dict[str, object]]:
    """Measure; returns the figures and the detail."""
    names = [f"node-{number}" for number in range(NODES)]
    with tempfile.TemporaryDirectory() as path:
        directory, port = Path(path), free_port()
        roles = dict.fromkeys(names, "worker") | {"gateway": "gateway", "scheduler": "scheduler"}
        files = issue(directory, roles)
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        config = configured(directory / "gateway.toml", files["gateway"], f'listen_addresses = ["{listen}"]')
        program = [str(Path(sys.executable).parent / "hypha-gateway"), "run", "-c", str(config)]
        with (directory / "gateway.log").open("wb") as log:
            process = subprocess.Popen(program, stdout=log, stderr=log)
        try:
            _await_port(port)
            address = f"{listen}/p2p/{files['gateway'].identity().peer_id}"
            found = trio.run(measure, files, address, psutil.Process(process.pid))
        finally:
            process.kill()
            process.wait()
    figures = [
        Figure("100 nodes: memory of the gateway", found["gateway_memory_mb"], MEMORY_WANTED_MB, "lower", "MB"),
        Figure(
            "100 nodes: processor of the gateway at rest",
            found["gateway_cpu_percent"],
            CPU_WANTED_PERCENT,
            "lower",
            "% of a core",
        ),
        Figure("100 nodes: reached by the DHT alone", found["reached"], NODES, "higher", "nodes"),
        Figure("100 nodes: heard one announcement", found["heard"], NODES, "higher", "nodes"),
    ]
    return figures, dict(found) | {"load": os.getloadavg()}
