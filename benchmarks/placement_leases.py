"""One scheduler process that holds a thousand renewing leases, over real sockets and mutual TLS.

    here                 a scheduler's network and pool: accept 1000 offers, then renew at the default ttl (30 s)
    4 × 250 light peers  each a host with certificate, port and ledger, which answers RenewLease and nothing else:
                         no gossip, no DHT, no jobs

CPU seconds of this process per second of wall time, while nothing but renewals happens; and its memory.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio
from libp2p.tools.anyio_service import background_trio_service
from msgspec import Struct

from benchmarks.certificates import Files, issue
from benchmarks.report import Figure
from hypha.config import NodeConfig
from hypha.errors import Refused
from hypha.network import listening, patches
from hypha.network.addresses import parse
from hypha.network.host import Libp2pNetwork, open_network
from hypha.network.seam import Peer
from hypha.protocol.lease import Kept, Ledger, Sender
from hypha.protocol.messages import Ack, LeaseMessage, ReleaseLease, Renewed, RenewLease, WorkerOffer
from hypha.protocol.resources import Resources
from hypha.runtime import RealRuntime
from hypha.scheduler.pool import LeasedWorker, Pool
from hypha.telemetry import metrics

LEASES = 1000
PROCESSES = 4
TTL_S = 30.0
# Two renewals of each lease: it is renewed at 0.6 of its ttl.
WATCH_S = 36.0
READY_S = 180.0
POLL_S = 0.2
# Dials that run at once; each is a handshake of a few milliseconds.
AT_ONCE = 8
ONE = Resources(cpu=1, memory=0.5)
HERE = "/ip4/127.0.0.1/tcp/0"
MEMORY_BASE_MB, MEMORY_PER_WORKER_MB = 100.0, 10.0
# As exported to Prometheus.
RENEWALS = 'hypha_lease_renewals_total{status="success"}'


class Known(Struct, frozen=True):
    """A light peer as the scheduler learns of it."""

    peer_id: str
    addresses: bytes


class LightPeer(Libp2pNetwork):
    """A network that listens, and takes no part in anything else."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen while the context is open."""
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            self._start_dialing(nursery)
            await stack.enter_async_context(background_trio_service(self._swarm))
            await listening.listen(self._swarm, (parse("listen_addresses", HERE),))
            yield


class Grantor:
    """Grants whatever is asked for the first time, and keeps it as a worker's ledger does."""

    def __init__(self, network: LightPeer, runtime: RealRuntime) -> None:
        self._runtime = runtime
        self._ledger = Ledger(ONE)
        self._fence = 0
        network.serve(RenewLease, self._renew)
        network.serve(ReleaseLease, self._release)

    async def _renew(self, peer: Peer, message: RenewLease) -> Renewed:
        now = self._runtime.now()
        if message.fence > self._fence:
            self._fence, name = message.fence, message.lease_id
            self._ledger.grant(name, peer.peer_id, ONE, ttl_s=TTL_S, fence=self._fence, now=now, job_epoch=1)
        kept = self._ledger.renew(message.lease_id, _sender(peer, message), ttl_s=TTL_S, now=now)
        if not isinstance(kept, Kept):
            raise Refused(kept.reason, "stale")
        return Renewed(lease_id=message.lease_id, remaining_s=kept.remaining_s)

    async def _release(self, peer: Peer, message: ReleaseLease) -> Ack:
        self._ledger.release(message.lease_id, _sender(peer, message), reason=message.reason, now=self._runtime.now())
        return Ack()


def _sender(peer: Peer, message: LeaseMessage[Any]) -> Sender:
    return Sender(peer=peer.peer_id, fence=message.fence, job_epoch=message.job_epoch, attempt=message.attempt)


def _config(files: Files) -> NodeConfig:
    return NodeConfig(
        cert_pem=files.cert_pem, key_pem=files.key_pem, trust_pem=files.trust_pem, listen_addresses=(HERE,)
    )


async def light_peers(directory: Path, share: str, files: list[Files]) -> None:
    """Run these peers until killed, and say in a file where they are."""
    patches.apply()
    runtime, known = RealRuntime(), []
    async with AsyncExitStack() as stack:
        for each in files:
            network = LightPeer(each.identity(), _config(each), role="worker", runtime=runtime)
            await stack.enter_async_context(network.running())
            Grantor(network, runtime)
            known.append(Known(network.peer_id, network.signed_addresses()))
        (directory / f"{share}.part").write_bytes(msgspec.json.encode(known))
        (directory / f"{share}.part").rename(directory / f"{share}.json")
        await trio.sleep_forever()


@contextmanager
def peers(directory: Path) -> Iterator[None]:
    """Start the processes of light peers."""
    running = [
        subprocess.Popen([sys.executable, "-m", __spec__.name, str(directory), str(share)])
        for share in range(PROCESSES)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


async def measure(directory: Path, scheduler: Files) -> dict[str, float]:
    """Lease them all, then watch; returns numbers by name. Raises RuntimeError where a lease is lost."""
    known = await _known(directory)
    runtime, deaths, before_mb = RealRuntime(), [], memory_mb()

    def died(_worker: LeasedWorker, reason: str) -> None:
        deaths.append(reason)

    async with open_network(scheduler.identity(), _config(scheduler), role="scheduler", runtime=runtime) as network:
        pool = Pool(network, runtime, job_epoch=1, died=died)
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            began, cpu = time.monotonic(), time.process_time()
            await _lease_all(network, pool, known, runtime)
            leasing_s, leasing_cpu_s = time.monotonic() - began, time.process_time() - cpu
            renewed = metrics.snapshot()[RENEWALS]
            began, cpu = time.monotonic(), time.process_time()
            await trio.sleep(WATCH_S)
            cpu_s, seconds = time.process_time() - cpu, time.monotonic() - began
            found = {
                "live": len(pool.live()),
                "lost": len(deaths),
                "renewals": metrics.snapshot()[RENEWALS] - renewed,
                "cpu_share": cpu_s / seconds,
                "leasing_s": leasing_s,
                "leasing_cpu_ms_per_lease": 1000 * leasing_cpu_s / LEASES,
                "memory_mb": memory_mb(),
                "memory_before_mb": before_mb,
            }
            nursery.cancel_scope.cancel()
    return {name: round(number, 4) for name, number in found.items()}


async def _known(directory: Path) -> list[Known]:
    paths = [directory / f"{share}.json" for share in range(PROCESSES)]
    with trio.fail_after(READY_S):
        while not all(path.exists() for path in paths):  # noqa: ASYNC110 - other processes write them
            await trio.sleep(POLL_S)
    return [each for path in paths for each in msgspec.json.decode(path.read_bytes(), type=list[Known])]


async def _lease_all(network: Libp2pNetwork, pool: Pool, known: list[Known], runtime: RealRuntime) -> None:
    limit = trio.CapacityLimiter(AT_ONCE)

    async def lease(number: int, peer: Known) -> None:
        async with limit:
            network.learn(peer.peer_id, peer.addresses)
            # A machine busy with other things may not shake hands within the two attempts that an offer gets.
            for fence in itertools.count(1):
                offer = WorkerOffer(
                    advertisement_id="bench",
                    choices=(),
                    lease_id=f"lease-{number}-{fence}",
                    fence=fence,
                    resources=ONE,
                    ttl_s=TTL_S,
                    addresses=peer.addresses,
                )
                now = runtime.now()
                leased = await pool.accept(
                    peer.peer_id, offer, work="train", executor="none", price=1.0, received_at=now
                )
                if isinstance(leased, LeasedWorker):
                    return

    async with trio.open_nursery() as nursery:
        for number, peer in enumerate(known):
            nursery.start_soon(lease, number, peer)


def memory_mb() -> float:
    """Return the resident memory of this process in MB."""
    return float(psutil.Process().memory_info().rss / 1e6)


def run() -> tuple[list[Figure], dict[str, object]]:
    """Measure; returns the figures and the detail."""
    names = [f"peer-{number}" for number in range(LEASES)]
    with tempfile.TemporaryDirectory() as path:
        directory = Path(path)
        files = issue(directory, dict.fromkeys(names, "worker") | {"scheduler": "scheduler"})
        for share in range(PROCESSES):
            mine = [files[name] for name in names[share::PROCESSES]]
            (directory / f"{share}.files").write_bytes(msgspec.json.encode(mine, enc_hook=str))
        with peers(directory):
            found = trio.run(measure, directory, files["scheduler"])
    bound_mb = MEMORY_BASE_MB + LEASES * MEMORY_PER_WORKER_MB
    figures = [
        Figure("processor of a scheduler with 1000 leases", found["cpu_share"], 1.0, "lower", "cores"),
        Figure("leases lost of 1000", LEASES - found["live"], 0, "lower", "leases"),
        Figure("memory of a scheduler with 1000 leases", found["memory_mb"], bound_mb, "lower", "MB"),
    ]
    return figures, dict(found) | {"load": os.getloadavg()}


def main() -> None:
    """Be a process of light peers; arguments: the directory, and which share."""
    directory, share = Path(sys.argv[1]), sys.argv[2]
    text = (directory / f"{share}.files").read_bytes()
    files = msgspec.json.decode(text, type=list[Files], dec_hook=lambda kind, value: kind(value))
    trio.run(light_peers, directory, share, files)


if __name__ == "__main__":
    main()
