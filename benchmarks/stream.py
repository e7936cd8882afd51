"""Bytes per second between two processes, on both ways a transfer can go, against blocking TLS sockets in the same run.

    sender (this process) ══ ssl.SSLSocket.sendall ══▶ recv_into     baseline: same certificates, same cipher
    sender ══ mutual TLS, yamux ══▶ receiver (child)                 muxed: a stream of the peers' connection
    sender ══ mutual TLS ══▶ receiver                                bulk: a connection of its own, in threads
    sender ══ gateway ══▶ another receiver (two more children)       relayed: a quarter of the bytes

4 GiB, 1 MiB pieces, memory to memory, three repetitions, alternating, so that a slow minute hits all. Ratios are those
of the medians. Beside that: four bulk transfers at once against one, requests beside a transfer at full speed, and the
memory that a transfer takes. `--gib N` changes the size.
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
from contextlib import ExitStack
from pathlib import Path

import msgspec
import trio

from benchmarks.certificates import Files, issue
from benchmarks.report import Figure, print_report
from benchmarks.stream_peer import LANE, MEMORY, MUXED, PIECE_BYTES, Part, config_of, forget_peak, memory_mib
from hypha.network.host import Libp2pNetwork, open_network
from hypha.network.lane import Terms, lane_of
from hypha.protocol.messages import Ack, FetchSlice, FileHeader, Health
from hypha.runtime import RealRuntime

GIB = 1 << 30
REPETITIONS = 3
AT_ONCE = 4
RELAYED_SHARE = 4
STREAM_WANTED, MUXED_WANTED, BULK_WANTED, RELAYED_WANTED = 0.5, 0.65, 0.95, 0.15
REQUEST_P99_WANTED_MS = 20.0
MEMORY_WANTED_MIB = 32.0
# A lease renewal is a request like this one; beside a full-speed transfer it must still be quick.
PINGS = 100
PING_EVERY_S = 0.02

Transfer = Callable[["Bench", int], Awaitable[None]]


class Bench(msgspec.Struct, frozen=True):
    """Our side of the network, and who is at the other."""

    network: Libp2pNetwork
    peer_id: str
    port: int
    files: Files
    behind_walls: "Bench | None" = None  # the same, where only a gateway leads from one to the other


class Said(msgspec.Struct, frozen=True):
    """What the children said: each receiver's line, and the gateway's address."""

    receiver: str
    hidden: str
    gateway: str


# --- one transfer ----------------------------------------------------------------------------------------------------


async def blocking(bench: Bench, size: int) -> None:
    """Send over plain blocking TLS sockets."""
    await trio.to_thread.run_sync(_send_blocking, bench.files.identity().client_context(), bench.port, size)


def _send_blocking(context: ssl.SSLContext, port: int, size: int) -> None:
    piece = bytes(PIECE_BYTES)
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port))) as connection:
        for _ in range(size // PIECE_BYTES):
            connection.sendall(piece)
        connection = _finish_sending(connection)
        assert connection.recv(1) == b"\x01"


def _finish_sending(connection: ssl.SSLSocket) -> ssl.SSLSocket:
    # unwrap() would wait for the peer's close; only our direction ends here, which TLS 1.3 allows.
    connection.settimeout(0.0)
    try:
        connection.unwrap()
    except (ssl.SSLWantReadError, OSError):
        connection.settimeout(None)
    return connection


async def muxed(bench: Bench, size: int) -> None:
    """Send over a stream of the peers' connection."""
    piece = bytes(PIECE_BYTES)
    stream = await bench.network.open_stream(bench.peer_id, _header(MUXED, size))
    try:
        for _ in range(size // PIECE_BYTES):
            await stream.send_all(piece)
        await stream.send_eof()
        await stream.receive_message(Ack)
    finally:
        await stream.aclose()


async def bulk(bench: Bench, size: int) -> None:
    """Send over a connection of its own; agreeing on it is part of the time."""
    stream = await bench.network.open_stream(bench.peer_id, _header(LANE, size))
    try:
        async with lane_of(stream, Terms(sending=True), size) as lane:
            assert lane is not None, "peers on one machine can dial each other"
            await lane.send(len, size)
        await stream.receive_message(Ack)
    finally:
        await stream.aclose()


async def bulk_at_once(bench: Bench, size: int) -> None:
    """Send the same amount in AT_ONCE bulk transfers side by side."""
    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(bulk, bench, size // AT_ONCE)


async def relayed(bench: Bench, size: int) -> None:
    """Send over a stream of a connection that a gateway relays."""
    assert bench.behind_walls is not None
    await muxed(bench.behind_walls, size)


def _header(name: str, size: int) -> FetchSlice:
    return FetchSlice(dataset="bench", manifest_digest=None, slice=name, offset=size)


# --- measuring -------------------------------------------------------------------------------------------------------


async def rate(transfer: Transfer, bench: Bench, size: int) -> float:
    """Return MB/s of one transfer."""
    started = time.perf_counter()
    await transfer(bench, size)
    return size / (time.perf_counter() - started) / 1e6


async def latencies(bench: Bench, beside: Transfer | None, size: int) -> list[float]:
    """Return the milliseconds of PINGS requests, PING_EVERY_S apart, sorted; transfers run beside them all the time."""
    taken = []
    async with trio.open_nursery() as nursery:
        if beside is not None:
            nursery.start_soon(_for_ever, beside, bench, size)
        for _ in range(PINGS):
            started = time.perf_counter()
            await bench.network.request(bench.peer_id, Health())
            taken.append((time.perf_counter() - started) * 1e3)
            await trio.sleep(PING_EVERY_S)
        nursery.cancel_scope.cancel()
    return sorted(taken)


async def _for_ever(transfer: Transfer, bench: Bench, size: int) -> None:
    while True:
        await transfer(bench, size)


async def peak_mib(bench: Bench) -> tuple[float, float]:
    """Return the most memory that sender and receiver took since this was asked last."""
    stream = await bench.network.open_stream(bench.peer_id, _header(MEMORY, 0))
    theirs = (await stream.receive_message(FileHeader)).bytes / 2**20
    await stream.aclose()
    ours = memory_mib("VmHWM")
    forget_peak()
    return ours, theirs


async def memory_of(transfer: Transfer, bench: Bench, size: int) -> float:
    """Return what one transfer takes above rest, MiB, at the side where that is more."""
    await peak_mib(bench)
    rest = await peak_mib(bench)
    await transfer(bench, size)
    peak = await peak_mib(bench)
    return max(after - before for before, after in zip(rest, peak, strict=True))


async def measure(files: dict[str, Files], said: Said, size: int) -> tuple[list[Figure], dict[str, object]]:
    """Open our side: one node that dials, and one that only a gateway leads to."""
    peer_id, addresses, port = said.receiver.split()
    hidden_id, circuits, _ = said.hidden.split()
    mine, walled, runtime = files["sender"], files["walled"], RealRuntime()
    async with (
        open_network(mine.identity(), config_of(mine), role="worker", runtime=runtime) as network,
        open_network(walled.identity(), config_of(walled, said.gateway), role="worker", runtime=runtime) as far,
    ):
        network.learn(peer_id, bytes.fromhex(addresses))
        far.learn(hidden_id, bytes.fromhex(circuits))
        return await measured(Bench(network, peer_id, int(port), mine, Bench(far, hidden_id, 0, walled)), size)


async def measured(bench: Bench, size: int) -> tuple[list[Figure], dict[str, object]]:
    """Run all repetitions, alternating, then what is measured beside a transfer."""
    transfers: tuple[Transfer, ...] = (blocking, muxed, bulk, bulk_at_once, relayed)
    rates: dict[Transfer, list[float]] = {each: [] for each in transfers}
    requests = {"idle": await latencies(bench, None, 0)}
    memory = {"muxed": await memory_of(muxed, bench, size), "bulk": await memory_of(bulk, bench, size)}
    for _ in range(REPETITIONS):
        for transfer in transfers:
            share = RELAYED_SHARE if transfer is relayed else 1
            rates[transfer].append(await rate(transfer, bench, size // share))
    requests["beside muxed"] = await latencies(bench, muxed, size)
    requests["beside bulk"] = await latencies(bench, bulk, size)
    return _figures(rates, requests, memory), {
        "gib": size / GIB,
        "mb_s": {each.__name__: [round(one) for one in found] for each, found in rates.items()},
        "request_ms": {name: _quantiles(found) for name, found in requests.items()},
        "memory_mib_above_rest": {name: round(found, 1) for name, found in memory.items()},
    }


def _figures(
    rates: dict[Transfer, list[float]], requests: dict[str, list[float]], memory: dict[str, float]
) -> list[Figure]:
    median = {each: statistics.median(found) for each, found in rates.items()}
    stream = round(median[muxed] / median[blocking], 3)
    return [
        Figure("stream_to_blocking_tls", stream, STREAM_WANTED, "higher", "ratio"),
        Figure("muxed_to_blocking_tls", stream, MUXED_WANTED, "higher", "ratio"),
        Figure("bulk_to_blocking_tls", round(median[bulk] / median[blocking], 3), BULK_WANTED, "higher", "ratio"),
        Figure(
            "relayed_to_blocking_tls", round(median[relayed] / median[blocking], 3), RELAYED_WANTED, "higher", "ratio"
        ),
        Figure("four_bulk_to_one", round(median[bulk_at_once] / median[bulk], 3), 1.0, "higher", "ratio"),
        *(
            Figure(
                f"request_p99_{name.replace(' ', '_')}",
                _quantiles(requests[name])["p99"],
                REQUEST_P99_WANTED_MS,
                "lower",
                "ms",
            )
            for name in ("beside muxed", "beside bulk")
        ),
        Figure("memory_above_rest", round(max(memory.values()), 1), MEMORY_WANTED_MIB, "lower", "MiB"),
    ]


def _quantiles(ordered: list[float]) -> dict[str, float]:
    return {
        "p50": round(ordered[len(ordered) // 2], 2),
        "p99": round(ordered[int(len(ordered) * 0.99)], 2),
        "max": round(ordered[-1], 2),
    }


def start(stack: ExitStack, folder: Path, part: Part) -> str:
    """Start another process, `benchmarks.stream_peer`, and return what it says."""
    told = folder / f"{part.files.cert_pem.stem}.json"
    told.write_bytes(msgspec.json.encode(part, enc_hook=str))
    command = [sys.executable, "-m", "benchmarks.stream_peer", str(told)]
    child = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(child.terminate)
    assert child.stdout is not None
    return child.stdout.readline().strip()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    size = int(parser.parse_args().gib * GIB) // (AT_ONCE * PIECE_BYTES) * AT_ONCE * PIECE_BYTES
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypha-bench-")))
        roles = {"sender": "worker", "receiver": "worker", "walled": "worker", "hidden": "worker", "gateway": "gateway"}
        files = issue(folder, roles)
        gateway = start(stack, folder, Part(files["gateway"], "gateway"))
        receiver = start(stack, folder, Part(files["receiver"]))
        hidden = start(stack, folder, Part(files["hidden"], gateway=gateway))
        figures, detail = trio.run(measure, files, Said(receiver, hidden, gateway), size)
    print_report("stream", figures, detail)


if __name__ == "__main__":
    main()
