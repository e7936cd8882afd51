"""Bytes per second of one tensor stream between two processes, against blocking TLS sockets in the same run.

    sender (this process) ══ mutual TLS, yamux ══▶ receiver (child)      4 GiB, 1 MiB pieces, three repetitions
    sender ══ ssl.SSLSocket.sendall ══▶ recv_into                       same certificates, same cipher

Both receivers throw the bytes away. The figure is the ratio of the medians. `--gib N` changes the size.
"""

import argparse
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from benchmarks.certificates import Files, issue
from benchmarks.report import Figure, print_report
from hypha.config import NodeConfig
from hypha.network.host import Libp2pNetwork, open_network
from hypha.network.seam import Peer, Stream
from hypha.protocol.messages import Ack, FetchSlice, Health, HealthReport
from hypha.runtime import RealRuntime

GIB = 1 << 30
PIECE_BYTES = 1 << 20
REPETITIONS = 3
RATIO_WANTED = 0.5
# A lease renewal is a request like this one; beside a full-speed transfer it must still be quick.
PINGS = 40
PING_EVERY_S = 0.02


def config_of(files: Files) -> NodeConfig:
    """Return a node's configuration that listens on a free loopback port."""
    return NodeConfig(
        cert_pem=files.cert_pem,
        key_pem=files.key_pem,
        trust_pem=files.trust_pem,
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        relay_circuit=False,
    )


# --- receiver --------------------------------------------------------------------------------------------------------


async def receive(files: Files) -> None:
    """Print how to reach us, then swallow streams until standard input closes."""
    identity = files.identity()
    async with open_network(identity, config_of(files), role="worker", runtime=RealRuntime()) as network:

        async def swallow(stream: Stream, _header: FetchSlice) -> None:
            while await stream.receive_some(PIECE_BYTES):
                pass
            await stream.send_message(Ack())

        async def health(_peer: Peer, _message: Health) -> HealthReport:
            return HealthReport(peer_id=network.peer_id, role="worker", version="0", uptime_s=0.0)

        network.accept_streams(FetchSlice, swallow)
        network.serve(Health, health)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            print(f"{network.peer_id} {network.signed_addresses().hex()} {port}", flush=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, _swallow_blocking, listener, files)
                await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()


def _swallow_blocking(listener: socket.socket, files: Files) -> None:
    context = files.identity().server_context()
    buffer = memoryview(bytearray(PIECE_BYTES))
    for _ in range(REPETITIONS):
        plain, _address = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection:
            while connection.recv_into(buffer):
                pass
            connection.sendall(b"\x01")


# --- sender ----------------------------------------------------------------------------------------------------------


def blocking_rate(files: Files, port: int, size: int) -> float:
    """Return MB/s of one transfer over plain blocking TLS sockets."""
    piece = bytes(PIECE_BYTES)
    context = files.identity().client_context()
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port))) as connection:
        started = time.perf_counter()
        for _ in range(size // PIECE_BYTES):
            connection.sendall(piece)
        connection = _finish_sending(connection)
        assert connection.recv(1) == b"\x01"
        return size / (time.perf_counter() - started) / 1e6


def _finish_sending(connection: ssl.SSLSocket) -> ssl.SSLSocket:
    # unwrap() would wait for the peer's close; only our direction ends here, which TLS 1.3 allows.
    connection.settimeout(0.0)
    try:
        connection.unwrap()
    except (ssl.SSLWantReadError, OSError):
        connection.settimeout(None)
    return connection


async def stream_rate(network: Libp2pNetwork, peer_id: str, size: int) -> float:
    """Return MB/s of one transfer over a stream of the network."""
    piece = bytes(PIECE_BYTES)
    stream = await network.open_stream(peer_id, FetchSlice(dataset="bench", manifest_digest=None, slice="bench"))
    started = time.perf_counter()
    for _ in range(size // PIECE_BYTES):
        await stream.send_all(piece)
    await stream.send_eof()
    await stream.receive_message(Ack)
    elapsed = time.perf_counter() - started
    await stream.aclose()
    return size / elapsed / 1e6


async def latencies(network: Libp2pNetwork, peer_id: str) -> list[float]:
    """Return the milliseconds of PINGS requests, PING_EVERY_S apart, sorted."""
    taken = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await network.request(peer_id, Health())
        taken.append((time.perf_counter() - started) * 1e3)
        await trio.sleep(PING_EVERY_S)
    return sorted(taken)


async def measure(files: Files, said: str, size: int) -> tuple[list[Figure], dict[str, object]]:
    """Run all repetitions, alternating, so that a slow minute hits both."""
    peer_id, addresses, port = said.split()
    plain, muxed = [], []
    async with open_network(files.identity(), config_of(files), role="worker", runtime=RealRuntime()) as network:
        network.learn(peer_id, bytes.fromhex(addresses))
        idle = await latencies(network, peer_id)
        for _ in range(REPETITIONS):
            plain.append(await trio.to_thread.run_sync(blocking_rate, files, int(port), size))
            muxed.append(await stream_rate(network, peer_id, size))
        beside: list[float] = []

        async def ping() -> None:
            beside.extend(await latencies(network, peer_id))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping)
            await stream_rate(network, peer_id, size)
    ratio = statistics.median(muxed) / statistics.median(plain)
    figures = [Figure("stream_to_blocking_tls", round(ratio, 3), RATIO_WANTED, "higher", "ratio")]
    detail: dict[str, object] = {
        "gib": size / GIB,
        "stream_mb_s": [round(rate) for rate in muxed],
        "blocking_tls_mb_s": [round(rate) for rate in plain],
        "request_ms_idle": _quantiles(idle),
        "request_ms_beside_stream": _quantiles(beside),
    }
    return figures, detail


def _quantiles(ordered: list[float]) -> dict[str, float]:
    return {"p50": round(ordered[len(ordered) // 2], 2), "p99": round(ordered[int(len(ordered) * 0.99)], 2)}


def main() -> None:
    """Measure, or with --receive be the other process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--receive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive is not None:
        run(receive, msgspec.json.decode(arguments.receive.read_bytes(), type=Files, dec_hook=_path))
        return
    size = int(arguments.gib * GIB) // PIECE_BYTES * PIECE_BYTES
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as folder:
        files = issue(Path(folder), {"sender": "worker", "receiver": "worker"})
        told = Path(folder) / "receiver.json"
        told.write_bytes(msgspec.json.encode(files["receiver"], enc_hook=str))
        command = [sys.executable, "-m", "benchmarks.stream", "--receive", str(told)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            figures, detail = run(measure, files["sender"], child.stdout.readline(), size)
            child.terminate()
    print_report("stream", figures, detail)


def _path(kind: type, value: str) -> object:
    return kind(value)


def run(work: Callable[..., Awaitable[Any]], *arguments: object) -> Any:  # noqa: ANN401 - whatever `work` returns
    """Run under trio."""
    return trio.run(work, *arguments)


if __name__ == "__main__":
    main()
