"""The other processes of the slices benchmark: nodes that obey one JSON line on standard input after the other.

    serve    a gateway, a data node, and a plain blocking TLS socket that sends as many bytes as it is asked for
    fetch    workers, each a node of its own, that fetch slices from that data node with the role's own code

Each answers a command with one JSON line, `cpu_s` being the processor time that its process took for it. They end with
standard input.
"""

import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from benchmarks.certificates import Files
from hypha.config import NodeConfig
from hypha.data_node import DataNode, open_datasets
from hypha.errors import HyphaError
from hypha.network.fetch import Providers, fetch_manifest, fetch_slice
from hypha.network.host import Libp2pNetwork, open_network
from hypha.protocol.messages import SliceRef
from hypha.runtime import RealRuntime

PIECE_BYTES = 1 << 20
SIZE_BYTES = 8
# One line of a few paths and names.
LINE_BYTES_MAX = 1 << 20


class Role(msgspec.Struct, frozen=True):
    """What one process is to be; for fetchers, `gateway` and `tls_port` are what the server answered."""

    kind: str
    nodes: list[Files]
    datasets: list[Path] = []
    gateway: str = ""
    tls_port: int = 0


class Command(msgspec.Struct, frozen=True):
    """What to do, and its arguments.

    `cpu`; `blocking`: receive `bytes`; `file`: write as many into `names[0]`, which come from nowhere; `slices`: fetch
    `names` in order, at each of so many `nodes`. Without names, the nodes find out who provides the dataset, one after
    the other.
    """

    do: str
    dataset: str = ""
    names: list[str] = []
    directory: str = ""
    nodes: int = 1
    bytes: int = 0


class Done(msgspec.Struct, frozen=True):
    """The answer: seconds per node that took part; `path` is set where one slice of several is done."""

    seconds: list[float] = []
    cpu_s: float = 0.0
    path: str = ""


def config_of(files: Files, *gateways: str) -> NodeConfig:
    """Return a node's configuration that listens on a free loopback port."""
    return NodeConfig(
        cert_pem=files.cert_pem,
        key_pem=files.key_pem,
        trust_pem=files.trust_pem,
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        gateway_addresses=gateways,
        relay_circuit=False,
    )


def say(answer: msgspec.Struct) -> None:
    """Answer with one line."""
    print(msgspec.json.encode(answer).decode(), flush=True)


def cpu_s() -> float:
    """Return the processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def commands() -> AsyncIterator[Command]:
    """Yield what comes on standard input until it ends."""
    while line := await trio.to_thread.run_sync(sys.stdin.readline, LINE_BYTES_MAX, abandon_on_cancel=True):
        yield msgspec.json.decode(line, type=Command)


# --- the server ------------------------------------------------------------------------------------------------------


class Serving(msgspec.Struct, frozen=True):
    """Where the server is found."""

    gateway: str
    tls_port: int


async def serve(role: Role) -> None:
    """Serve until standard input ends."""
    runtime = RealRuntime()
    at_gateway, at_data = role.nodes
    datasets = open_datasets(role.datasets)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(
            open_network(at_gateway.identity(), config_of(at_gateway), role="gateway", runtime=runtime)
        )
        address = gateway.listen_addresses()[0]
        network = await stack.enter_async_context(
            open_network(at_data.identity(), config_of(at_data, address), role="data", runtime=runtime)
        )
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(DataNode(network, runtime, datasets, streams_max=16).run)
        nursery.start_soon(partial(trio.to_thread.run_sync, abandon_on_cancel=True), _send_blocking, listener, at_data)
        say(Serving(address, listener.getsockname()[1]))
        async for _ in commands():
            say(Done(cpu_s=cpu_s()))
        nursery.cancel_scope.cancel()


def _send_blocking(listener: socket.socket, files: Files) -> None:
    """Send each connection as many bytes as its first eight say, until the process ends."""
    context, piece = files.identity().server_context(), bytes(PIECE_BYTES)
    while True:
        plain, _address = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection:
            for _ in range(int.from_bytes(connection.recv(SIZE_BYTES)) // PIECE_BYTES):
                connection.sendall(piece)
            connection.recv(1)


# --- the fetchers ----------------------------------------------------------------------------------------------------


async def fetch(role: Role) -> None:
    """Fetch as told until standard input ends."""
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(_worker(files, role.gateway)) for files in role.nodes]
        say(Done())
        async for command in commands():
            before = cpu_s()
            if command.do == "blocking":
                seconds = [await trio.to_thread.run_sync(_receive_blocking, role, command.bytes)]
            elif command.do == "file":
                path = Path(command.directory) / command.names[0]
                seconds = [await trio.to_thread.run_sync(_write_file, path, command.bytes)]
            else:
                chosen = workers[: command.nodes]
                seconds = (
                    await _all_at_once(chosen, command)
                    if command.names
                    else [await worker.slices(command, "") for worker in chosen]
                )
            say(Done(seconds, cpu_s() - before))


class Known(msgspec.Struct, frozen=True):
    """What a node has found out about a dataset."""

    providers: Providers
    refs: dict[str, SliceRef]
    digest: str


class Worker(msgspec.Struct, frozen=True):
    """One node that fetches."""

    network: Libp2pNetwork
    runtime: RealRuntime
    known: dict[str, Known]

    async def find(self, dataset: str) -> Known:
        """Find out who provides a dataset, and what is in it."""
        providers = Providers(self.network, self.runtime, dataset)
        manifest, digest = await fetch_manifest(self.network, self.runtime, providers)
        await providers.ranked(digest)
        return Known(providers, {ref.name: ref for ref in manifest.train}, digest)

    async def slices(self, command: Command, prefix: str) -> float:
        """Fetch the slices in order; returns the seconds that took, without finding out who has them."""
        if command.dataset not in self.known:
            self.known[command.dataset] = await self.find(command.dataset)
        at = self.known[command.dataset]
        started = time.perf_counter()
        for name in command.names:
            path = Path(command.directory) / f"{prefix}{name}"
            await fetch_slice(self.network, self.runtime, at.providers, at.refs[name], path, manifest_digest=at.digest)
            if len(command.names) > 1:
                say(Done(path=str(path)))
        return time.perf_counter() - started


@asynccontextmanager
async def _worker(files: Files, gateway: str) -> AsyncIterator[Worker]:
    runtime = RealRuntime()
    async with open_network(files.identity(), config_of(files, gateway), role="worker", runtime=runtime) as network:
        yield Worker(network, runtime, {})


async def _all_at_once(workers: list[Worker], command: Command) -> list[float]:
    seconds = [0.0] * len(workers)

    async def one(index: int) -> None:
        try:
            seconds[index] = await workers[index].slices(command, f"{index}-" if len(workers) > 1 else "")
        except HyphaError as error:
            # Further up nobody would find it in a tower of groups.
            print(f"a fetch failed: {error}", file=sys.stderr, flush=True)
            raise

    async with trio.open_nursery() as nursery:
        for index in range(len(workers)):
            nursery.start_soon(one, index)
    return seconds


def _receive_blocking(role: Role, size: int) -> float:
    context, buffer = role.nodes[0].identity().client_context(), memoryview(bytearray(PIECE_BYTES))
    started, left = time.perf_counter(), size
    with context.wrap_socket(socket.create_connection(("127.0.0.1", role.tls_port))) as connection:
        connection.sendall(size.to_bytes(SIZE_BYTES))
        while left:
            left -= connection.recv_into(buffer)
        connection.sendall(b"\x01")
    return time.perf_counter() - started


def _write_file(path: Path, size: int) -> float:
    piece, started = bytes(PIECE_BYTES), time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // PIECE_BYTES):
            file.write(piece)
    return time.perf_counter() - started


KINDS: dict[str, Callable[[Role], Awaitable[None]]] = {"serve": serve, "fetch": fetch}


def main() -> None:
    """Be what the JSON file named on the command line says."""
    role = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Role, dec_hook=lambda kind, text: kind(text))
    trio.run(KINDS[role.kind], role)


if __name__ == "__main__":
    main()
