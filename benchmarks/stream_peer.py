"""The other processes of the stream benchmark: they end with standard input.

receiver   swallows whatever comes, on every way, and says how much memory it took; with a gateway, one that nobody
           can dial. stdout: peer id, signed addresses, port of the blocking TLS listener
gateway    relays. stdout: its address
"""

import socket
import sys
from functools import partial
from pathlib import Path

import msgspec
import trio

from benchmarks.certificates import Files
from hypha.config import NodeConfig
from hypha.network.host import Libp2pNetwork, open_network
from hypha.network.lane import Terms, lane_of
from hypha.network.seam import Peer, Stream
from hypha.protocol.messages import Ack, FetchSlice, FileHeader, Health, HealthReport
from hypha.runtime import RealRuntime

PIECE_BYTES = 1 << 20
# All that loopback has: a node that excludes it dials no peer, and tells none where to dial.
WALLS = ("127.0.0.0/8",)
RESERVED_WITHIN_S = 20.0
# What a stream is named whose bytes go over a lane, as many as the header's offset says; over the stream itself; none.
LANE, MUXED, MEMORY = "lane", "muxed", "memory"
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Part(msgspec.Struct, frozen=True):
    """What one process is to be: "receiver" or "gateway"; a receiver with a gateway hides behind it."""

    files: Files
    kind: str = "receiver"
    gateway: str = ""


def config_of(files: Files, gateway: str = "") -> NodeConfig:
    """Return a node's configuration on a free loopback port; with a gateway, one that is reached through it only."""
    return NodeConfig(
        cert_pem=files.cert_pem,
        key_pem=files.key_pem,
        trust_pem=files.trust_pem,
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        gateway_addresses=(gateway,) if gateway else (),
        exclude_cidr=WALLS if gateway else (),
        relay_circuit=bool(gateway),
    )


def memory_mib(key: str) -> float:
    """Return VmRSS or VmHWM (the most since `forget_peak`) of this process in MiB."""
    (line,) = [each for each in _STATUS.read_text().splitlines() if each.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Start VmHWM anew (proc(5), clear_refs)."""
    _CLEAR.write_text("5")


async def swallow(stream: Stream, header: FetchSlice) -> None:
    """Take everything and say so; or say what memory was taken since this was last asked."""
    if header.slice == LANE:
        async with lane_of(stream, Terms(sending=False), header.offset) as lane:
            assert lane is not None, "peers on one machine can dial each other"
            await lane.receive(len, header.offset)
    elif header.slice == MUXED:
        while await stream.receive_some(PIECE_BYTES):
            pass
    else:
        await stream.send_message(FileHeader(bytes=round(memory_mib("VmHWM") * 2**20), digest="0" * 64))
        forget_peak()
    await stream.send_message(Ack())


async def _health(_peer: Peer, _message: Health) -> HealthReport:
    await trio.lowlevel.checkpoint()
    return HealthReport(peer_id="receiver", role="worker", version="0", uptime_s=0.0)


async def receive(part: Part) -> None:
    """Print how to reach us, then swallow streams until standard input closes."""
    files, config = part.files, config_of(part.files, part.gateway)
    async with open_network(files.identity(), config, role="worker", runtime=RealRuntime()) as network:
        network.accept_streams(FetchSlice, swallow)
        network.serve(Health, _health)
        if part.gateway:
            await reserved(network)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            print(f"{network.peer_id} {network.signed_addresses().hex()} {listener.getsockname()[1]}", flush=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.to_thread.run_sync, abandon_on_cancel=True), _swallow, listener, files)
                await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()


async def reserved(network: Libp2pNetwork) -> None:
    """Return once a gateway keeps a place for this node."""
    with trio.fail_after(RESERVED_WITHIN_S):
        while not network._relay.circuits():  # noqa: ASYNC110 - the network has no event for it
            await trio.sleep(0.05)


async def relay(part: Part) -> None:
    """Print where we listen, then relay until standard input closes."""
    async with open_network(
        part.files.identity(), config_of(part.files), role="gateway", runtime=RealRuntime()
    ) as network:
        print(network.listen_addresses()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


def _swallow(listener: socket.socket, files: Files) -> None:
    """Swallow blocking TLS connections, one after the other, until the process ends."""
    context = files.identity().server_context()
    buffer = memoryview(bytearray(PIECE_BYTES))
    while True:
        plain, _address = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection:
            while connection.recv_into(buffer):
                pass
            connection.sendall(b"\x01")


if __name__ == "__main__":
    told = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Part, dec_hook=lambda kind, at: kind(at))
    trio.run(relay if told.kind == "gateway" else receive, told)
