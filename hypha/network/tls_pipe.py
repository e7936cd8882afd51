"""TLS over any libp2p raw connection: ssl.MemoryBIO between the records and the bytes.

    plaintext ──write──▶ SSLObject ──▶ outgoing BIO ──send (shielded, bounded)──▶ raw connection
    plaintext ◀─read_into─ SSLObject ◀── incoming BIO ◀──────────pull───────────── raw connection

A write that were cancelled half way would leave a torn record and kill every stream of the connection; so the raw
write is shielded from cancellation and bounded in time instead: a peer whose kernel takes nothing for
`WRITE_STALL_S` loses the connection.
"""

import ssl
from contextlib import suppress

import trio
from libp2p.abc import IRawConnection
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError

from hypha.network.drain import Drain
from hypha.network.tcp import TcpSocket, stream_of
from hypha.telemetry import metrics

# One read from the socket: others have their turn after each. More only moves bytes out of the kernel earlier.
RAW_READ_BYTES = 256 << 10
# Through a relay frames come one by one, and reading less than a whole one would copy it.
RELAYED_READ_BYTES = 1 << 20
# A frame of 16 KiB takes 15 s only on a link of 1 kB/s; a frozen peer is noticed by keep-alives before that.
WRITE_STALL_S = 15.0
# Closing needs no answer from anybody.
CLOSE_S = 1.0


class TlsPipe:
    """One TLS session. Reads and writes may run at the same time, but only one of each.

    `landing` takes what a socket delivers for the moment until the session has it: one for all sessions of a thread.
    """

    def __init__(self, raw: IRawConnection, context: ssl.SSLContext, *, server_side: bool, landing: memoryview) -> None:
        self.raw = raw
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._write_lock = trio.Lock()
        stream = stream_of(raw)
        self._socket = None if stream is None else TcpSocket(stream)
        self._landing = landing
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

    async def read_into(self, view: memoryview, least: int = 1) -> int:
        """Fill `view`, at least its first `least` bytes; returns how many.

        Raises ConnectionClosedError at the end, ssl.SSLError where the peer refused us or broke TLS.
        """
        filled = 0
        while filled < least:  # record by record, 16 KiB at most
            try:
                count = self._tls.read(len(view) - filled, view[filled:])
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
                filled += int(count)
        return filled

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
        began = trio.current_time()
        sent = 0 if self._socket is None else self._socket.send_now(record)
        if sent < len(record):
            await self._send_rest(record, sent)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if self._drain.took(len(record), began, trio.current_time()):
            self._bound_unsent()

    async def _send_rest(self, record: bytes, sent: int) -> None:
        with trio.move_on_after(WRITE_STALL_S) as stall:
            stall.shield = True
            if self._socket is None:
                await self.raw.write(record)
            else:
                await self._socket.send_all(memoryview(record)[sent:])
        if stall.cancelled_caught:
            self.closed = True
            await self._close_raw()
            raise ConnectionClosedError(f"the peer took nothing for {WRITE_STALL_S:g} s")

    def _bound_unsent(self) -> None:
        """Let one frame wait in the kernel, so that a small message behind it waits for one frame only."""
        if self._socket is not None:
            self._socket.bound_unsent(self._drain.frame_bytes)

    async def _pull(self) -> None:
        data: bytes | memoryview
        if self._socket is None:
            data = await self.raw.read(RELAYED_READ_BYTES)
        else:
            data = self._landing[: await self._socket.receive_into(self._landing)]
        if not data:
            self._incoming.write_eof()
            raise ConnectionClosedError("the peer closed the connection")
        metrics.NETWORK_BYTES_RECEIVED.add(len(data))
        self._incoming.write(data)

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
