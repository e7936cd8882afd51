"""A link so narrow that bulk bytes fill every queue on it: a pipe between two sockets that passes so much a second.

dialer ── 127.0.0.1:port ── pipe ─ so many bytes/s each way, few waiting ─ 127.0.0.2 ── listener
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

# A home router's queue would hold as much, or more.
WAITING_BYTES = 32 << 10
PIECE_BYTES = 4 << 10
BEHIND = "127.0.0.2"


class Narrow:
    """The link; its rate may change at any time."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.passed = 0

    async def between(self, nursery: trio.Nursery, near: trio.SocketStream, port: int) -> None:
        """Pass bytes both ways, each way at the full rate, until either side ends."""
        far_socket = trio.socket.socket()
        far_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WAITING_BYTES)
        await far_socket.connect((BEHIND, port))
        far = trio.SocketStream(far_socket)
        async with near, far, trio.open_nursery() as both:
            both.start_soon(self._pass, near, far, both.cancel_scope)
            both.start_soon(self._pass, far, near, both.cancel_scope)

    async def _pass(self, come: trio.SocketStream, go: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while piece := await come.receive_some(PIECE_BYTES):
                await trio.sleep(len(piece) / self.bytes_per_s)
                await go.send_all(piece)
                self.passed += len(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side hears of it
        scope.cancel()


@asynccontextmanager
async def narrow(bytes_per_s: float, listening: list[int]) -> AsyncIterator[tuple[Narrow, int]]:
    """The link and the port of its near end, while the block runs; `listening` gets the port at its far end."""
    link = Narrow(bytes_per_s)
    near = trio.socket.socket()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WAITING_BYTES)
    await near.bind(("127.0.0.1", 0))
    near.listen(8)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            while True:
                come, _ = await near.accept()
                nursery.start_soon(link.between, nursery, trio.SocketStream(come), listening[0])

        nursery.start_soon(accept)
        with near:
            yield link, near.getsockname()[1]
        nursery.cancel_scope.cancel()
