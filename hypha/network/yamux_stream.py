"""One stream of a yamux connection: two windows, a queue of received chunks, and how it ends.

              we finished?  they finished?
    open           no            no        ──FIN──▶ half closed ──FIN──▶ over
    aborted    RST from either side, or the connection ended: readers and writers raise MuxedStreamReset

A clean end (`read` returns b"") is only ever reported after the peer's FIN, so a truncated transfer never looks whole.
Chunks are handed to the reader as they were decrypted; a window's worth of them is the most that is ever held.
"""

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from hypha.network.tls_pipe import take

if TYPE_CHECKING:
    from hypha.network.yamux import Yamux

# What a stream may send before the peer has said anything (yamux, spec.md).
INITIAL_WINDOW_BYTES = 256 << 10
# What may be under way on one stream: 1 GB/s at 4 ms, 40 MB/s at 100 ms.
WINDOW_BYTES = 4 << 20
# What is left over that is smaller than this goes along: a relayed frame is a little more than a frame, by its TLS.
LEFT_OVER_BYTES_MAX = 16 << 10
# Frames up to this size do not queue behind bulk: a renewal is a few hundred bytes, a round's view a few KiB.
SMALL_BYTES_MAX = 8 << 10


class YamuxStream(IMuxedStream):
    """Bytes both ways. One reader and one writer at a time; cancelling either leaves the connection whole."""

    def __init__(self, connection: "Yamux", stream_id: int) -> None:
        self.muxed_conn = connection
        self.stream_id = stream_id
        self.connection = connection
        self._chunks: deque[bytearray | memoryview] = deque()
        self._may_send = INITIAL_WINDOW_BYTES
        self._may_receive = INITIAL_WINDOW_BYTES
        self._grown = False
        self._consumed = 0
        self._sent_all = self._received_all = self._aborted = False
        self._wake_reader, self._wake_writer = trio.Event(), trio.Event()
        self._truncated: trio.Event | None = None
        self._write_lock = trio.Lock()

    # --- used by whoever holds the stream ---------------------------------------------------------------------------

    async def read(self, n: int | None = None) -> bytes:
        """Return some bytes, at most `n`. Raises MuxedStreamEOF after the peer's FIN, MuxedStreamReset when aborted."""
        chunk = await self.receive_chunk(WINDOW_BYTES if n is None or n < 0 else n)
        if not chunk and n != 0:
            raise MuxedStreamEOF("the peer has finished sending")
        return bytes(chunk)

    async def receive_chunk(self, bytes_max: int) -> bytearray:
        """Return what arrived, at most `bytes_max` bytes and without copying whole chunks; empty after the FIN."""
        await trio.lowlevel.checkpoint()
        if bytes_max <= 0:
            return bytearray()
        while not self._chunks:
            if self._received_all:
                return bytearray()
            if self._aborted:
                raise MuxedStreamReset("the stream was reset or its connection ended")
            self._wake_reader = trio.Event()
            await self._wake_reader.wait()
        chunk = self._take(bytes_max)
        self._account(len(chunk))
        return chunk

    @property
    def has_buffered(self) -> bool:
        """Whether a read would return at once."""
        return bool(self._chunks)

    @property
    def has_finished(self) -> bool:
        """Whether our direction is finished."""
        return self._sent_all

    async def until_truncated(self) -> None:
        """Return when the stream is aborted before the peer has finished sending; one waiter at a time."""
        if self._aborted and not self._received_all:
            await trio.lowlevel.checkpoint()
            return
        self._truncated = trio.Event()
        await self._truncated.wait()

    def unread(self, data: bytes | bytearray) -> None:
        """Put back the tail of what was just received."""
        if data:
            self._chunks.appendleft(memoryview(data))

    async def write(self, data: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """Send it all, waiting for the peer's window as long as it takes; `last` finishes our direction with it.

        Raises MuxedStreamReset or MuxedStreamClosed.
        """
        view = memoryview(data).cast("B")
        await take(self._write_lock)
        try:
            while view:
                count = await self._write_frame(view, last=last)
                view = view[count:]
            if last:
                self._sent_all = True
                self._forget_when_over()
        finally:
            self._write_lock.release()

    async def _write_frame(self, view: memoryview, *, last: bool) -> int:
        while self._may_send <= 0 and not self._aborted:
            self._wake_writer = trio.Event()
            await self._wake_writer.wait()
        self._require_open()
        frame_bytes = self.connection.secured_conn.frame_bytes
        whole = len(view) <= frame_bytes + LEFT_OVER_BYTES_MAX
        part = view[: min(self._may_send, len(view) if whole else frame_bytes)]
        count = len(part)
        urgent = not self._grown and len(view) <= SMALL_BYTES_MAX
        try:
            await self.connection.send_data(self.stream_id, part, last=last and count == len(view), urgent=urgent)
        except (IOException, RawConnError, OSError) as error:
            self.abort()
            raise MuxedStreamReset(str(error)) from error
        self._may_send -= count
        return count

    async def close(self) -> None:
        """Finish our direction; the peer's stays open."""
        if self._sent_all or self._aborted:
            return
        async with self._write_lock:
            self._sent_all = True
            try:
                await self.connection.send_fin(self.stream_id)
            except (IOException, RawConnError, OSError):
                self.abort()
        self._forget_when_over()

    close_write = close

    def expect_much(self) -> None:
        """Give the peer the whole window: a transfer is beginning, or going on. Until then it has 256 KiB."""
        more = self._consumed + (0 if self._grown else WINDOW_BYTES - INITIAL_WINDOW_BYTES)
        self._grown, self._consumed = True, 0
        self._may_receive += more
        self.connection.grant(self.stream_id, more)

    async def reset(self) -> None:
        """End both directions at once."""
        self.reset_now()
        await trio.lowlevel.checkpoint()

    def reset_now(self) -> None:
        """End both directions at once, without waiting for anything."""
        if not self._aborted and not self.is_over:
            self.connection.send_reset(self.stream_id)
        self.abort()

    @property
    def is_over(self) -> bool:
        """Whether both directions finished cleanly."""
        return self._sent_all and self._received_all

    def set_deadline(self, ttl: int) -> None:
        """Deadlines are the caller's cancel scopes."""
        raise NotImplementedError("use a trio cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the other end."""
        return self.connection.get_remote_address()

    async def __aenter__(self) -> "YamuxStream":
        """Itself."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Finish our direction."""
        await self.close()

    # --- used by the connection -------------------------------------------------------------------------------------

    def receive(self, body: bytearray) -> bool:
        """Take a DATA frame's body; False when the peer had no right to send so much."""
        self._may_receive -= len(body)
        if self._may_receive < 0 or self._received_all:
            return False
        if not self._aborted:
            self._chunks.append(body)
            self._wake_reader.set()
        return True

    def widen(self, count: int) -> None:
        """The peer lets us send so many bytes more."""
        self._may_send += count
        if self._may_send > 0:
            self._wake_writer.set()

    def finish_receiving(self) -> None:
        """The peer has sent everything."""
        self._received_all = True
        self._wake_reader.set()
        self._forget_when_over()

    def abort(self) -> None:
        """The stream is dead; what was received and not read yet is dropped, unless it is whole."""
        if not self._received_all:
            self._chunks.clear()
            if self._truncated is not None:
                self._truncated.set()
        self._aborted = True
        self._wake_reader.set()
        self._wake_writer.set()
        self.connection.forget(self.stream_id)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._aborted:
            raise MuxedStreamReset("the stream was reset or its connection ended")
        if self._sent_all:
            raise MuxedStreamClosed("our direction is finished")

    def _take(self, bytes_max: int) -> bytearray:
        chunk = self._chunks.popleft()
        if len(chunk) <= bytes_max:
            return chunk if isinstance(chunk, bytearray) else bytearray(chunk)
        view = memoryview(chunk)
        self._chunks.appendleft(view[bytes_max:])
        return bytearray(view[:bytes_max])

    def _account(self, count: int) -> None:
        # Updates in quarters of the window: rare enough to cost nothing, early enough never to stall a sender.
        self._consumed += count
        window = WINDOW_BYTES if self._grown else INITIAL_WINDOW_BYTES
        if self._consumed >= window // 4 and not self._received_all and not self._aborted:
            self.expect_much()

    def _forget_when_over(self) -> None:
        if self.is_over:
            self.connection.forget(self.stream_id)
