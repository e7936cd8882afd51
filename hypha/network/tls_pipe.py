"""TLS over any libp2p raw connection: ssl.MemoryBIO between the records and the bytes.

    plaintext ──write──▶ SSLObject ──▶ outgoing BIO ──send (shielded, bounded)──▶ raw connection
    plaintext ◀─read_into─ SSLObject ◀── incoming BIO ◀──────────pull───────────── raw connection

A write that were cancelled half way would leave a torn record and kill every stream of the connection; so the raw
write is shielded from cancellation and bounded in time instead: a peer whose kernel takes nothing for
`WRITE_STALL_S` loses the connection.
"""

import socket
import ssl
from contextlib import suppress

import trio
from libp2p.abc import IRawConnection
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection

from hypha.network.drain import Drain
from hypha.telemetry import metrics

# One read from the socket: a yamux frame's worth. More only moves bytes out of the kernel earlier.
RAW_READ_BYTES = 256 << 10
# Through a relay frames come one by one, and reading less than a whole one would copy it.
RELAYED_READ_BYTES = 1 << 20
# A frame of 16 KiB takes 15 s only on a link of 1 kB/s; a frozen peer is noticed by keep-alives before that.
WRITE_STALL_S = 15.0
# Closing needs no answer from anybody.
CLOSE_S = 1.0


class TlsPipe:
    """One TLS session. Reads and writes may run at the same time, but only one of each."""

    def __init__(self, raw: IRawConnection, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.raw = raw
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._write_lock = trio.Lock()
        self._socket = _socket_of(raw)
        self._drain = Drain()
        self._bound_unsent()
        self.closed = False

    async def handshake(self) -> None:
        """Shake hands. Raises ssl.SSLError with the alert sent, ConnectionClosedError when the peer hangs up."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._pull()
            except ssl.SSLError:
                await self._flush()  # the alert: it tells the peer why
                raise
            else:
                await self._flush()
                return

    @property
    def alpn(self) -> str | None:
        """The application protocol agreed on."""
        return self._tls.selected_alpn_protocol()

    @property
    def on_tcp(self) -> bool:
        """Whether a TCP socket of this machine carries it, and not a relay's stream."""
        return self._socket is not None

    @property
    def frame_bytes(self) -> int:
        """How large a write may be for others not to wait long behind it."""
        return self._drain.frame_bytes

    def peer_certificate(self) -> bytes:
        """The peer's verified certificate, DER."""
        der = self._tls.getpeercert(binary_form=True)
        assert der is not None, "contexts require a certificate"
        return der

    async def read_into(self, view: memoryview) -> int:
        """Fill some of `view`; returns how many bytes, at least one.

        Raises ConnectionClosedError at the end, ssl.SSLError where the peer refused us or broke TLS.
        """
        while True:
            try:
                count = self._tls.read(len(view), view)
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    async with self._write_lock:
                        await self._flush()
                await self._pull()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
                raise ConnectionClosedError("the peer closed the connection") from error
            else:
                if not count:
                    raise ConnectionClosedError("the peer closed the connection")
                return int(count)

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send the parts back to back; other writers come before or after all of them.

        Cancelled, it has sent all or nothing: only the wait for other writers can be cancelled.
        """
        await take(self._write_lock)
        try:
            if self.closed:
                raise ConnectionClosedError("the connection is closed")
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[self._tls.write(view) :]
            await self._flush()
        finally:
            self._write_lock.release()

    async def aclose(self) -> None:
        """Close the raw connection; a close-notify is sent where that does not wait."""
        if self.closed:
            return
        self.closed = True
        with suppress(ssl.SSLError, ValueError, OSError):  # unwrap wants the peer's answer, which nobody waits for
            if not self._write_lock.locked():
                self._tls.unwrap()
        with trio.move_on_after(CLOSE_S) as scope, suppress(BaseLibp2pError, OSError):
            scope.shield = True
            if not self._write_lock.locked() and self._outgoing.pending:
                await self.raw.write(self._outgoing.read())
        await self._close_raw()

    async def _flush(self) -> None:
        if not self._outgoing.pending:
            return
        record = self._outgoing.read()
        metrics.NETWORK_BYTES_SENT.add(len(record))
        with trio.move_on_after(WRITE_STALL_S) as stall:
            stall.shield = True
            began = trio.current_time()
            await self._send(record)
            if self._drain.took(len(record), began, trio.current_time()):
                self._bound_unsent()
        if stall.cancelled_caught:
            self.closed = True
            await self._close_raw()
            raise ConnectionClosedError(f"the peer took nothing for {WRITE_STALL_S:g} s")

    def _bound_unsent(self) -> None:
        """Let one frame wait in the kernel, so that a small message behind it waits for one frame only."""
        if self._socket is not None:
            with suppress(OSError, AttributeError):  # not on every system, and not once it is closed
                # trio stops at 16 KiB of unsent data, which makes many sends of a large frame.
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self._drain.frame_bytes)

    async def _pull(self) -> None:
        data = await self._receive()
        if not data:
            self._incoming.write_eof()
            raise ConnectionClosedError("the peer closed the connection")
        metrics.NETWORK_BYTES_RECEIVED.add(len(data))
        self._incoming.write(data)

    async def _send(self, record: bytes) -> None:
        if self._socket is None:
            await self.raw.write(record)
            return
        try:
            await self._socket.send_all(record)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the connection broke") from error

    async def _receive(self) -> bytes | bytearray:
        if self._socket is None:
            return await self.raw.read(RELAYED_READ_BYTES)
        try:
            return await self._socket.receive_some(RAW_READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the connection broke") from error

    async def _close_raw(self) -> None:
        with trio.move_on_after(CLOSE_S) as scope, suppress(BaseLibp2pError, OSError):
            scope.shield = True
            await self.raw.close()


async def take(lock: trio.Lock) -> None:
    """Acquire a lock; where it is free, without giving way to other tasks, which costs more than a small write."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


def _socket_of(raw: IRawConnection) -> trio.SocketStream | None:
    """Return the socket under a plain TCP connection, so that four layers need not be crossed for every record."""
    tcp = raw.stream if isinstance(raw, RawConnection) else None
    return tcp.stream if isinstance(tcp, TrioTCPStream) else None
