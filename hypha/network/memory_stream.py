"""Byte streams of the in-memory network: two pipes, each with a window, latency, bandwidth and a way to break.

    send_all ─▶ window? ─▶ Link.transmit ─▶ segments with their times of arrival ─▶ receive_some
                 full: wait until the reader takes some            not yet: wait until then

Nothing runs in the background: a segment knows when it arrives, and the reader waits for that moment.
"""

from collections import deque

import trio

from hypha.errors import PeerUnreachable
from hypha.network.framing import MessageFraming
from hypha.network.memory_faults import Gate, Link
from hypha.network.seam import Peer

# Bytes sent and not yet read, per direction: what holds a fast sender back to the speed of a slow reader.
WINDOW_BYTES = 1 << 20
# The unit of loss, breakage and arrival.
SEGMENT_BYTES = 256 << 10


class Pipe:
    """One direction of a stream. `link` carries the bytes, `back` the acknowledgements: either one stalls it."""

    def __init__(self, link: Link, back: Link) -> None:
        self._link = link
        self._back = back
        self._segments: deque[tuple[float, memoryview]] = deque()
        self._unread = 0
        self._last_arrival = 0.0
        self._ends_at: float | None = None
        self._breaks_at: float | None = None
        self._reason = ""
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def ended(self) -> bool:
        """Whether the reader's side has been told that nothing follows."""
        return self._ends_at is not None and self._ends_at <= trio.current_time()

    @property
    def finished(self) -> bool:
        """Whether the sender has said that nothing follows."""
        return self._ends_at is not None

    def fail(self, reason: str, *, after_s: float = 0.0) -> None:
        """Break it, unless it breaks sooner: from then on both sides raise PeerUnreachable."""
        at = trio.current_time() + after_s
        if self._breaks_at is None or at < self._breaks_at:
            self._breaks_at, self._reason = at, reason
        self._changed.unpark_all()

    def finish(self) -> None:
        """Let the reader find the end after everything sent so far."""
        if self._ends_at is None:
            now = trio.current_time()
            self._ends_at = max(self._last_arrival, now + self._link.profile.latency_s)
            self._changed.unpark_all()

    async def send(self, data: memoryview) -> None:
        """Send everything, as the window allows."""
        await trio.lowlevel.checkpoint()
        while data:
            self._check()
            if self._link.blocked or self._back.blocked:
                await self._stall()
            elif (room := WINDOW_BYTES - self._unread) <= 0:
                await self._wait(until=None)
            else:
                size = min(room, SEGMENT_BYTES, len(data))
                self._put(data[:size])
                data = data[size:]

    def _put(self, data: memoryview) -> None:
        arrival = self._link.transmit(trio.current_time(), len(data))
        if arrival is None:
            self.fail("connection broke")
            return
        self._last_arrival = max(self._last_arrival, arrival)
        self._segments.append((self._last_arrival, memoryview(bytes(data))))
        self._unread += len(data)
        self._changed.unpark_all()

    async def receive(self, bytes_max: int) -> bytes:
        """Return what has arrived, waiting for the first byte or the end."""
        await trio.lowlevel.checkpoint()
        while True:
            self._check()
            due = self._segments[0][0] if self._segments else self._ends_at
            if due is not None and due <= trio.current_time():
                return self._take(bytes_max) if self._segments else b""
            await self._wait(until=due)

    def _take(self, bytes_max: int) -> bytes:
        arrival, segment = self._segments.popleft()
        taken, rest = segment[:bytes_max], segment[bytes_max:]
        if rest:
            self._segments.appendleft((arrival, rest))
        self._unread -= len(taken)
        self._changed.unpark_all()
        return bytes(taken)

    def _check(self) -> None:
        if self._breaks_at is not None and self._breaks_at <= trio.current_time():
            self._segments.clear()
            raise PeerUnreachable(self._reason)

    async def _wait(self, *, until: float | None) -> None:
        """Wait for a change, the given moment or the break; silence on a blocked link breaks it."""
        silence_ends_at = trio.current_time() + self._link.profile.break_after_s
        moments = [at for at in (until, self._breaks_at) if at is not None]
        with trio.move_on_at(min(moments, default=silence_ends_at)) as scope:
            await self._changed.park()
        if scope.cancelled_caught and not moments and (self._link.blocked or self._back.blocked):
            self.fail("connection timed out")

    async def _stall(self) -> None:
        with trio.move_on_after(self._link.profile.break_after_s) as scope:
            await self._link.opened()
            await self._back.opened()
        if scope.cancelled_caught:
            self.fail("connection timed out")


class MemoryStream(MessageFraming):
    """One end of a stream between two in-memory nodes."""

    def __init__(self, peer: Peer, outgoing: Pipe, incoming: Pipe, gate: Gate, *, latency_s: float) -> None:
        self.peer = peer
        self._outgoing = outgoing
        self._incoming = incoming
        self._gate = gate
        self._latency_s = latency_s
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `seam.Stream`."""
        async with self._gate:
            self._check()
            assert not self._outgoing.finished, "nothing can be sent after send_eof"
            await self._outgoing.send(memoryview(data).cast("B"))

    async def receive_some(self, bytes_max: int) -> bytes:
        """See `seam.Stream`."""
        async with self._gate:
            self._check()
            return await self._incoming.receive(bytes_max)

    async def send_eof(self) -> None:
        """See `seam.Stream`; a second time does nothing."""
        async with self._gate:
            self._check()
            self._outgoing.finish()

    async def aclose(self) -> None:
        """See `seam.Stream`."""
        clean = self._outgoing.finished and self._incoming.ended
        if not clean and not self.closed:
            self.snap("stream was reset", after_s=self._latency_s)
        self.closed = True

    def snap(self, reason: str, *, after_s: float) -> None:
        """Break both directions: this end at once, the other when it learns of it."""
        self.closed = True
        self._outgoing.fail(reason, after_s=after_s)
        self._incoming.fail(reason, after_s=after_s)

    def _check(self) -> None:
        if self.closed:
            raise PeerUnreachable("this end of the stream is closed")
