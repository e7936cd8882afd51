"""The socket under a TCP connection, read and written by bare system calls while trio does the waiting.

A call of trio's own gives way to other tasks each time and allocates what it returns; at a frame per call that is a
quarter of what a multiplexed transfer costs. Here it gives way once per call that did not wait, and bytes land in a
buffer that all connections of a node share.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection


class TcpSocket:
    """One end of a TCP connection; one reader and one writer at a time. Closed by whoever made the connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._hurried = False

    def bound_unsent(self, bytes_max: int) -> None:
        """Let so much wait in the kernel before it asks for more; trio's 16 KiB make many sends of a large frame."""
        with suppress(OSError, AttributeError):  # not on every system, and not once it is closed
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, bytes_max)

    async def receive_into(self, buffer: memoryview) -> int:
        """Fill some of the buffer, 0 bytes at the end; nothing else runs between the last byte's coming and the return.

        Raises ConnectionClosedError.
        """
        with _broken():
            if self._hurried:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            self._hurried = True
            while True:
                try:
                    return os.readv(self._socket.fileno(), (buffer,))
                except BlockingIOError:
                    self._hurried = False
                    await trio.lowlevel.wait_readable(self._socket)

    def send_now(self, data: bytes) -> int:
        """Send what the kernel takes at once, and say how much that is. Raises ConnectionClosedError."""
        with _broken():
            try:
                return os.write(self._socket.fileno(), data)
            except BlockingIOError:
                return 0

    async def send_all(self, data: memoryview) -> None:
        """Send it all. Cancelled, some of it may have been sent. Raises ConnectionClosedError."""
        with _broken():
            while data:
                await trio.lowlevel.wait_writable(self._socket)
                with suppress(BlockingIOError):
                    data = data[os.write(self._socket.fileno(), data) :]


def stream_of(raw: IRawConnection) -> trio.SocketStream | None:
    """Return the socket under a connection, past four layers of py-libp2p's; None where a relay's stream carries it."""
    tcp = raw.stream if isinstance(raw, RawConnection) else None
    return tcp.stream if isinstance(tcp, TrioTCPStream) else None


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (OSError, trio.ClosedResourceError) as error:
        raise ConnectionClosedError("the connection broke") from error
