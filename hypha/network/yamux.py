"""Stream multiplexer: the yamux wire protocol (hashicorp/yamux, spec.md) as libp2p's muxer interface wants it.

    ┌─────────┬──────┬───────┬───────────┬────────┐
    │ version │ type │ flags │ stream id │ length │  12 bytes, big endian: 1 1 2 4 4
    └─────────┴──────┴───────┴───────────┴────────┘
      DATA: `length` bytes follow · WINDOW: `length` more may be sent · PING · GO_AWAY
      flags: SYN opens, ACK confirms, FIN ends one direction, RST both

    reading loop ─▶ chunks per stream ─▶ reader ─▶ WINDOW ─▶ writer goes on (waits without limit: back-pressure)
    control frames ─▶ queue ─▶ its own task, so that the reading loop never waits for a peer that does not read
    small requests ─────────▶ at most two frames of bulk before them, each as large as passes in 0.1 s (see `drain`)

py-libp2p's own Yamux resets a writer after 5 s without window, polls every 10 ms, copies every frame three times,
takes cancelled reads for lost events and notices no frozen peer; so this one is written anew. Every stream may have
4 MiB under way; a connection on which nothing arrives for 12.5 s, although pings were sent, is closed.
"""

import struct
from collections import deque
from contextlib import suppress
from typing import cast

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from multiaddr import Multiaddr

from hypha.network.drain import FRAME_BYTES_MAX
from hypha.network.mtls import SecureConn
from hypha.network.tls_pipe import take
from hypha.network.yamux_stream import LEFT_OVER_BYTES_MAX, WINDOW_BYTES, YamuxStream
from hypha.telemetry import get_logger

PROTOCOL_ID = "/hypha/yamux/1.0.0"
HEADER = struct.Struct("!BBHII")
DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
# Streams open at once on one connection, either side's: far above what a busy scheduler needs of one peer.
STREAMS_MAX = 2048
# Streams the peer opened and nobody accepted yet; beyond it they are reset.
BACKLOG_MAX = 256
# Control frames waiting to be sent; a peer that provokes more (pings, SYNs) and does not read breaks the rules.
CONTROL_FRAMES_MAX = 8192
# A connection is pinged when nothing arrived for two ticks, and given up after five, 12.5 s: well inside half of the
# usual lease, so that a renewal still finds a new connection.
TICK_S = 2.5
SILENT_TICKS_PING = 2
SILENT_TICKS_MAX = 5
# A goodbye is a courtesy, and closing waits for nobody's answer.
GOODBYE_S = 0.2
CLOSE_S = 3.0

log = get_logger("network.yamux")


class _Violation(BaseLibp2pError):
    """The peer broke the multiplexer's rules; the connection ends."""


class Yamux(IMuxedConn):
    """All streams of one connection."""

    def __init__(self, secured_conn: ISecureConn, peer_id: ID) -> None:
        self.secured_conn = cast(SecureConn, secured_conn)
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: object = None  # py-libp2p sets it; `accept_stream` tells it the same
        self._initiator = secured_conn.is_initiator
        self._next_id = 1 if self._initiator else 2
        self._streams: dict[int, YamuxStream] = {}
        self._backlog_in, self._backlog_out = trio.open_memory_channel[YamuxStream](BACKLOG_MAX)
        self._control: deque[bytes] = deque()
        self._control_ready = trio.Event()
        self._write_lock = trio.Lock()
        self._bulk_turn = trio.Lock()
        self._heard = False
        self._scope = trio.CancelScope()

    # --- what py-libp2p asks ----------------------------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self._initiator

    @property
    def is_established(self) -> bool:
        """Started and not closed."""
        return self.event_started.is_set() and not self.event_closed.is_set()

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self.event_closed.is_set()

    def rtt(self) -> float:
        """Not measured: 0."""
        return 0.0

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Where the other end is."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the other end."""
        return self.secured_conn.get_remote_address()

    async def start(self) -> None:
        """Run the connection until it ends."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read_frames)
                    nursery.start_soon(self._send_control)
                    nursery.start_soon(self._keep_alive)
                    self.event_started.set()
        finally:
            await self._end("stopped")

    async def open_stream(self) -> YamuxStream:
        """Open a stream. Raises MuxedStreamError when the connection is closed or full."""
        await trio.lowlevel.checkpoint()
        if self.is_closed:
            raise MuxedStreamError("the connection is closed")
        if len(self._streams) >= STREAMS_MAX:
            raise MuxedStreamError(f"{STREAMS_MAX} streams are open already")
        stream = YamuxStream(self, self._next_id)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self._queue(WINDOW, SYN, stream.stream_id, 0)
        return stream

    async def accept_stream(self) -> YamuxStream:
        """Return the next stream that the peer opens. Raises MuxedConnUnavailable when the connection ends."""
        try:
            return await self._backlog_out.receive()
        except trio.EndOfChannel as error:
            raise MuxedConnUnavailable("the connection is closed") from error

    async def close(self) -> None:
        """Say goodbye where that does not wait, and end every stream."""
        if not self.is_closed:
            with trio.move_on_after(GOODBYE_S) as scope, suppress(BaseLibp2pError, OSError):
                scope.shield = True
                await self._write(HEADER.pack(0, GO_AWAY, 0, 0, 0))
        await self._end("closed here")

    # --- what streams ask -------------------------------------------------------------------------------------------

    async def send_data(self, stream_id: int, part: memoryview, *, last: bool, urgent: bool) -> None:
        """Send one DATA frame; waits for the connection. Raises IOException or RawConnError when it broke.

        All that are not urgent wait in a queue of their own, whose first alone waits among the urgent ones: so these
        never stand behind more than two large frames, however many transfers are under way, and bulk never starves.
        """
        header = HEADER.pack(0, DATA, FIN if last else 0, stream_id, len(part))
        if urgent:
            await self._write(header, part)
            return
        await take(self._bulk_turn)
        try:
            await self._write(header, part)
        finally:
            self._bulk_turn.release()

    async def send_fin(self, stream_id: int) -> None:
        """End our direction, behind all data sent so far."""
        await self._write(HEADER.pack(0, WINDOW, FIN, stream_id, 0))

    def grant(self, stream_id: int, count: int) -> None:
        """Let the peer send so many bytes more."""
        self._queue(WINDOW, 0, stream_id, count)

    def send_reset(self, stream_id: int) -> None:
        """Tell the peer that the stream is dead."""
        self._queue(WINDOW, RST, stream_id, 0)

    def forget(self, stream_id: int) -> None:
        """The stream is over in both directions."""
        self._streams.pop(stream_id, None)

    # --- tasks ------------------------------------------------------------------------------------------------------

    async def _read_frames(self) -> None:
        reason = "the peer said goodbye"
        try:
            while await self._read_frame():
                self._heard = True
        except _Violation as violation:
            reason = str(violation)
            log.warn("A peer broke the multiplexer's rules", peer_id=str(self.peer_id), reason=reason)
        except (IOException, RawConnError, OSError) as error:
            reason = str(error)
        await self._end(reason)

    async def _read_frame(self) -> bool:
        version, kind, flags, stream_id, length = HEADER.unpack(await self.secured_conn.read_exact(HEADER.size))
        if version != 0 or kind > GO_AWAY:
            raise _Violation(f"frame of version {version}, type {kind}")
        if kind == GO_AWAY:
            return False
        if kind == PING:
            if flags & SYN:
                self._queue(PING, ACK, 0, length)
            return True
        if flags & SYN:
            self._accept(stream_id)
        await self._take_in(kind, stream_id, length)
        stream = self._streams.get(stream_id)
        if stream is not None and flags & FIN:
            stream.finish_receiving()
        if stream is not None and flags & RST:
            stream.abort()
        return True

    async def _take_in(self, kind: int, stream_id: int, length: int) -> None:
        stream = self._streams.get(stream_id)
        if kind == WINDOW:
            if stream is not None:
                stream.widen(length)
            return
        if length > WINDOW_BYTES:
            raise _Violation(f"DATA frame of {length} bytes")
        body = await self.secured_conn.read_exact(length)
        # The stream may have been reset here while its bytes were on their way.
        if length and stream is not None and not stream.receive(body):
            raise _Violation(f"{length} bytes beyond the window or behind the end")

    def _accept(self, stream_id: int) -> None:
        if stream_id in self._streams or stream_id % 2 == self._next_id % 2:
            raise _Violation(f"stream {stream_id} opened twice or with our parity")
        stream = YamuxStream(self, stream_id)
        backlog = self._backlog_out.statistics().current_buffer_used
        if len(self._streams) >= STREAMS_MAX or backlog >= BACKLOG_MAX or self.is_closed:
            self.send_reset(stream_id)
            return
        self._streams[stream_id] = stream
        self._queue(WINDOW, ACK, stream_id, 0)
        self._backlog_in.send_nowait(stream)

    def _queue(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if len(self._control) >= CONTROL_FRAMES_MAX:
            log.warn("A peer provokes more control frames than it reads", peer_id=str(self.peer_id))
            self._scope.cancel()
            return
        self._control.append(HEADER.pack(0, kind, flags, stream_id, length))
        self._control_ready.set()

    async def _send_control(self) -> None:
        while True:
            await self._control_ready.wait()
            self._control_ready = trio.Event()
            if not self._control:
                continue  # they went along with data
            try:
                await self._write()
            except (IOException, RawConnError, OSError) as error:
                await self._end(str(error))
                return

    async def _write(self, *parts: bytes | memoryview) -> None:
        """Send the control frames that wait, then the parts: what was queued first is sent first."""
        await take(self._write_lock)
        try:
            frames = b"".join(self._control)
            self._control.clear()
            try:
                await self.secured_conn.write_parts(frames, *parts)
            except trio.Cancelled:
                self._control.appendleft(frames)  # nothing was sent
                raise
        finally:
            self._write_lock.release()

    async def _keep_alive(self) -> None:
        # Ticks and not a clock: after a suspend the peer's answers lie in the socket, and the first tick reads them.
        silent = 0
        while silent < SILENT_TICKS_MAX:
            await trio.sleep(TICK_S)
            silent = 0 if self._heard else silent + 1
            self._heard = False
            if silent >= SILENT_TICKS_PING:
                self._queue(PING, SYN, 0, 0)
        log.info("Connection given up: nothing was heard", peer_id=str(self.peer_id), silent_s=silent * TICK_S)
        await self._end("silent")

    async def _end(self, reason: str) -> None:
        if self.is_closed:
            return
        self.event_closed.set()
        log.debug("Connection over", peer_id=str(self.peer_id), reason=reason)
        for stream in list(self._streams.values()):
            stream.abort()
        self._streams.clear()
        self._backlog_in.close()
        with trio.move_on_after(CLOSE_S) as scope:
            scope.shield = True
            await self.secured_conn.close()
        self._scope.cancel()


assert FRAME_BYTES_MAX + LEFT_OVER_BYTES_MAX <= WINDOW_BYTES
