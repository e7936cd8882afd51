"""One bulk transfer's socket: TLS without a thread until the peer is known, then blocking calls in threads of its own.

    sender    read ─▶ buffer ─sendall─▶ ══ TLS ══ ─recv_into─▶ buffer ─ queue ─▶ write (digest, disk)    receiver
                      one thread                  one thread             another, where a core is free
              ◀──────────────────────────────── 0x01 once all of it has come

Blocking `ssl` calls move bytes at twice the speed of a multiplexed stream. What trio keeps is the decision to end them:
a socket that is shut down under its thread makes the call return. An end that is not the good one is an RST, since a
sender that faces a closed window would never notice a FIN.
"""

import errno
import queue
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import trio
from libp2p.abc import IRawConnection
from libp2p.security.exceptions import HandshakeFailure

from hypha.errors import HyphaError, PeerUnreachable
from hypha.network.lane import Read, Write
from hypha.network.tcp import stream_of
from hypha.telemetry import metrics
from hypha.telemetry.instruments import Counter

# From one thread to another, and in one call where a core is to spare. Smaller costs speed, larger gains none, and a
# sender that is given up after 120 s may then be as slow as 9 kB/s.
CHUNK_BYTES = 1 << 20
# Between the thread that receives and the one that writes: a disk may be late by so many chunks.
BUFFERS = 4
# Where transfers take turns on a core: read, hashed, encrypted while its own cache holds it.
PIECE_BYTES = 256 << 10
# The watch looks this often at whether bytes move, and counts them.
WATCH_S = 0.5
RECEIVED = b"\x01"
_BACK, _OVER = "a buffer came back", "none will come back"
_ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s
# Not on every system: there the kernel's defaults hold.
_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", None)

R = TypeVar("R")


def take_socket(raw: IRawConnection) -> socket.socket:
    """Take the socket out of a raw connection, whose `close` does nothing any more. Raises HandshakeFailure."""
    stream = stream_of(raw)
    if stream is None:
        raise HandshakeFailure("bulk needs a TCP connection of its own")
    return plain_of(stream)


def plain_of(stream: trio.SocketStream) -> socket.socket:
    """Take the socket out of a stream, which holds none any more."""
    taken = socket.socket(fileno=stream.socket.detach())
    # The descriptor does not block, but the new object believes that it does, and ssl would spin on it.
    taken.settimeout(0.0)
    if _NOTSENT_LOWAT is not None:
        taken.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, 0)  # trio's 16 KiB cost a fifth of the speed
    return taken


class _Secured(ssl.SSLSocket):
    """One that is closed where the peer was gone before it was made: `ssl` then drops it open, its descriptor with it.

    Seen with CPython 3.11.7: `wrap_socket` detaches the plain socket, finds the new one not connected, reads
    from it, and lets any error but two of that read pass.
    """

    def getpeername(self) -> object:
        """Return the peer's address. Raises ConnectionResetError when there is none."""
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, "the peer is gone") from error


async def handshake(plain: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> ssl.SSLSocket:
    """Shake hands in trio, cancellably; the socket is closed where that fails. Raises ssl.SSLError, OSError."""
    context.sslsocket_class = _Secured
    try:
        secured = context.wrap_socket(
            plain, server_side=server_side, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
    except OSError:
        plain.close()
        raise
    try:
        await step(secured, secured.do_handshake)
    except BaseException:
        secured.close()
        raise
    return secured


async def step(secured: ssl.SSLSocket, call: Callable[..., R], *arguments: object) -> R:
    """Await one non-blocking call."""
    while True:
        try:
            return call(*arguments)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(secured)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(secured)


async def receive_exactly(secured: ssl.SSLSocket, count: int) -> bytes:
    """Return so many bytes of a header. Raises ssl.SSLError, OSError."""
    gathered = b""
    while len(gathered) < count:
        more = await step(secured, secured.recv, count - len(gathered))
        if not more:
            raise ssl.SSLEOFError("ended within the header")
        gathered += more
    return gathered


def abort(connection: socket.socket) -> None:
    """Close with an RST."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    connection.close()


class _Buffers:
    """What goes round between the thread that receives and the one that writes; both end when told that it is over.

    The buffer that came back last is taken first, and one is made where none came back: while the writer keeps up, few
    are in use, and the cache holds them.
    """

    def __init__(self) -> None:
        self._spare: list[bytearray] = []
        self._returned: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._returned.put(_BACK)

    def take(self) -> bytearray | None:
        """Wait for a free one; None when the writer has failed."""
        if self._returned.get() is _OVER:
            return None
        return self._spare.pop() if self._spare else bytearray(CHUNK_BYTES)

    def fill(self, view: memoryview) -> None:
        """Hand over what was received."""
        self._full.put(view)

    def filled(self) -> Iterator[memoryview]:
        """Yield what was received, for as long as more comes; a buffer is free again when the next one is asked for."""
        while (view := self._full.get()) is not None:
            yield view
            assert isinstance(view.obj, bytearray)
            self._spare.append(view.obj)
            self._returned.put(_BACK)

    def no_more(self) -> None:
        """Nothing more will be received."""
        self._full.put(None)

    def nobody_writes(self) -> None:
        """Nothing will come back."""
        self._returned.put(_OVER)


class BulkSocket:
    """A secured socket whose header is done, for one transfer in one direction. Used once; closed by its transfer."""

    def __init__(
        self,
        secured: ssl.SSLSocket,
        limiter: trio.CapacityLimiter,
        ended: Callable[[], Awaitable[None]],
        *,
        stall_s: float,
        count: Callable[[int], None],
        core_to_spare: bool = True,
    ) -> None:
        # Nagle would have cost the header 40 ms; the bytes to come are better off with it.
        secured.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        secured.settimeout(None)
        self._socket = secured
        self._stall_s = stall_s
        self._limiter = limiter
        self._ended = ended
        self._count = count
        self._core_to_spare = core_to_spare
        self._moved = self._counted = 0
        self._writing = False
        self._stopped = ""

    async def send(self, read: Read, length: int) -> None:
        """Send `length` bytes; returns when the peer has them. `read` is called in a thread.

        Raises PeerUnreachable, also once `ended` returns, and what `read` raises.
        """
        await self._run(metrics.NETWORK_BYTES_SENT, lambda: self._send(read, length))

    async def receive(self, write: Write, length: int) -> None:
        """Receive `length` bytes; `write` is called in a thread and has taken all that came, also before an error.

        Raises PeerUnreachable, also once `ended` returns, and what `write` raises.
        """
        if not self._core_to_spare:
            await self._run(metrics.NETWORK_BYTES_RECEIVED, lambda: self._receive_and_write(write, length))
            return
        buffers = _Buffers()
        await self._run(
            metrics.NETWORK_BYTES_RECEIVED, lambda: self._receive(buffers, length), lambda: self._write(buffers, write)
        )

    # --- in threads -------------------------------------------------------------------------------------------------

    def _send(self, read: Read, length: int) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES if self._core_to_spare else PIECE_BYTES))
        while self._moved < length:
            self._require_running()
            filled = read(buffer[: min(len(buffer), length - self._moved)])
            self._socket.sendall(buffer[:filled])
            self._moved += filled
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # pushes the tail out
        if self._socket.recv(1) != RECEIVED:
            raise ssl.SSLError("the end was not confirmed")

    def _receive(self, buffers: _Buffers, length: int) -> None:
        try:
            while self._moved < length:
                self._writing = True
                buffer = buffers.take()
                self._writing = False
                if buffer is None:
                    return  # whoever writes has failed and says why
                self._fill(memoryview(buffer)[: min(CHUNK_BYTES, length - self._moved)], buffers.fill)
            self._socket.sendall(RECEIVED)
        finally:
            buffers.no_more()

    def _receive_and_write(self, write: Write, length: int) -> None:
        def put(view: memoryview) -> None:
            self._writing = True
            write(view)
            self._writing = False

        buffer = memoryview(bytearray(PIECE_BYTES))
        while self._moved < length:
            self._fill(buffer[: min(PIECE_BYTES, length - self._moved)], put)
        self._socket.sendall(RECEIVED)

    def _fill(self, view: memoryview, put: Write) -> None:
        """Receive until the view is full, and pass on what came, also when the rest does not."""
        filled, wanted = 0, len(view)
        try:
            while filled < wanted:
                self._require_running()
                came = self._socket.recv_into(view[filled:], wanted - filled)  # finding out the length costs time
                if not came:
                    raise ssl.SSLEOFError("ended before the last byte")
                filled += came
                self._moved += came
        finally:
            put(view[:filled])

    def _write(self, buffers: _Buffers, write: Write) -> None:
        try:
            for view in buffers.filled():
                write(view)
        except BaseException:
            self._stop("it could not be written")
            raise
        finally:
            buffers.nobody_writes()

    def _require_running(self) -> None:
        if self._stopped:
            raise ConnectionAbortedError(self._stopped)

    def _stop(self, reason: str) -> None:
        """End whatever call a thread is in; the first reason counts."""
        self._stopped = self._stopped or reason
        # Not SSLSocket.shutdown: it drops the TLS layer, and the thread would read ciphertext.
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    # --- in trio ----------------------------------------------------------------------------------------------------

    async def _run(self, bytes_moved: Counter, *work: Callable[[], None]) -> None:
        failures: list[BaseException] = []
        whole = False
        try:
            async with trio.open_nursery() as watch:
                watch.start_soon(self._watch, bytes_moved)
                watch.start_soon(self._stop_when_ended)
                async with trio.open_nursery() as threads:
                    for each in work:
                        threads.start_soon(self._in_thread, each, failures)
                watch.cancel_scope.cancel()
            await trio.lowlevel.checkpoint_if_cancelled()
            if failures:
                raise self._verdict(failures)
            whole = True
        finally:
            if whole:
                self._socket.close()
            else:
                abort(self._socket)

    async def _in_thread(self, work: Callable[[], None], failures: list[BaseException]) -> None:
        try:
            # Shielded, so that both sides of a queue run, or neither: cancelled, the watch makes them return.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(work, limiter=self._limiter)
        except (HyphaError, OSError) as error:
            failures.append(error)

    async def _watch(self, bytes_moved: Counter) -> None:
        """Count what moves, and stop what does not. Cancelled, it stops the threads."""
        still_s, interval_s = 0.0, min(WATCH_S, self._stall_s / 4)
        try:
            while still_s < self._stall_s:
                await trio.sleep(interval_s)
                still_s = 0.0 if self._count_moved(bytes_moved) or self._writing else still_s + interval_s
            self._stop(f"nothing moved for {self._stall_s:g} s")
        finally:
            self._stop("it was given up")
            self._count_moved(bytes_moved)

    def _count_moved(self, bytes_moved: Counter) -> int:
        """Count what has moved since the last time, and return it."""
        fresh, self._counted = self._moved - self._counted, self._moved
        bytes_moved.add(fresh)
        self._count(fresh)
        return fresh

    async def _stop_when_ended(self) -> None:
        await self._ended()
        self._stop("the stream that it belongs to ended")

    def _verdict(self, failures: list[BaseException]) -> BaseException:
        for failure in failures:
            if isinstance(failure, HyphaError):
                return failure
        return PeerUnreachable(f"a bulk transfer broke: {self._stopped or failures[0]}")
