"""Who plays in the contract suite, and what they say to each other."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from hypha.errors import PeerUnreachable
from hypha.network.seam import Network, Peer, Stream
from hypha.protocol.messages import (
    Ack,
    FetchSlice,
    JobStatus,
    TaskAdvertisement,
)
from hypha.protocol.messages import Ask as AskFor
from hypha.protocol.resources import Resources

# No step of the suite takes longer, on a slow machine with real sockets.
PATIENCE_S = 30.0
DIGEST = "0" * 64
# More than any window between two nodes: sending it all takes a reader.
MORE_THAN_A_WINDOW = 24 << 20
CHUNK = bytes(range(256)) * 4096


class MakeNetwork(Protocol):
    """See the module's docstring."""

    def __call__(self, name: str, *roles: str) -> AbstractAsyncContextManager[Network]: ...


def status(reason: str = "done", *, last_lines: tuple[str, ...] = ()) -> JobStatus:
    return JobStatus(
        job_id="j", job_epoch=1, lease_id="l", fence=1, finished=True, reason=reason, last_lines=last_lines
    )


def fetch(name: str = "s") -> FetchSlice:
    return FetchSlice(dataset="d", manifest_digest=None, slice=name)


def advertisement(number: int = 0, *, padding: int = 0) -> TaskAdvertisement:
    ask = AskFor(work="train", executor="e" * 200, resources=Resources(cpu=1), count=1, bid=1.0)
    return TaskAdvertisement(
        advertisement_id=f"ad-{number}",
        scheduler="s",
        addresses=b"x" * padding,
        job_id="j",
        job_epoch=1,
        asks=(ask,),
        welcome_s=1.0,
    )


async def ack(_peer: Peer, _message: object) -> Ack:
    return Ack()


@asynccontextmanager
async def two(make: MakeNetwork) -> AsyncIterator[tuple[Network, Network]]:
    """A scheduler and a worker, and not longer than PATIENCE_S."""
    with trio.fail_after(PATIENCE_S):
        async with make("a", "scheduler") as a, make("b", "worker") as b:
            yield a, b


@asynccontextmanager
async def opened(network: Network, peer_id: str, header: FetchSlice) -> AsyncIterator[Stream]:
    stream = await network.open_stream(peer_id, header)
    try:
        yield stream
    finally:
        await stream.aclose()


async def eventually_answers(network: Network, peer_id: str) -> Ack:
    """Ask until there is an answer: what every caller with a deadline of its own does."""
    while True:
        with trio.move_on_after(5.0):
            try:
                return await network.request(peer_id, status())
            except PeerUnreachable:
                await trio.sleep(0.1)


async def receive_all(stream: Stream) -> bytes:
    received = bytearray()
    while piece := await stream.receive_some(1 << 16):
        received += piece
    return bytes(received)
