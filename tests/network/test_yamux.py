"""The multiplexer, on a connection in memory and virtual time: windows, ends, silence, and peers that cheat."""

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

from hypha.network.drain import FRAME_BYTES_MAX
from hypha.network.yamux import ACK, BACKLOG_MAX, DATA, HEADER, PING, RST, SYN, WINDOW, Yamux
from hypha.network.yamux_stream import (
    INITIAL_WINDOW_BYTES,
    LEFT_OVER_BYTES_MAX,
    SMALL_BYTES_MAX,
    WINDOW_BYTES,
)

PEER = ID(b"\x00\x02xy")


class Plain:
    """A secured connection without the security."""

    frame_bytes = FRAME_BYTES_MAX

    def __init__(self, stream, *, is_initiator: bool) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self.is_initiator = is_initiator

    async def read_exact(self, count: int) -> bytearray:
        while len(self._buffer) < count:
            try:
                more = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                more = b""
            if not more:
                raise ConnectionClosedError("closed")
            self._buffer += more
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    async def write_parts(self, *parts: bytes) -> None:
        try:
            await self._stream.send_all(b"".join(bytes(part) for part in parts))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("closed") from error

    async def close(self) -> None:
        await self._stream.aclose()


@pytest.fixture
async def pair(nursery):
    left, right = trio.testing.memory_stream_pair()
    ends = Yamux(Plain(left, is_initiator=True), PEER), Yamux(Plain(right, is_initiator=False), PEER)
    for end in ends:
        nursery.start_soon(end.start)
        await end.event_started.wait()
    yield ends
    for end in ends:
        await end.close()


@pytest.fixture
async def cheat(nursery):
    """A connection, and the raw stream of whoever is at its other end."""
    left, right = trio.testing.memory_stream_pair()
    end = Yamux(Plain(left, is_initiator=False), PEER)
    nursery.start_soon(end.start)
    await end.event_started.wait()
    yield end, right
    await end.close()


async def stream_pair(pair):
    a = await pair[0].open_stream()
    await a.write(b"hello")
    b = await pair[1].accept_stream()
    assert await b.read(5) == b"hello"
    return a, b


async def read_all(stream) -> bytes:
    gathered = bytearray()
    while chunk := await stream.receive_chunk(100_000):
        gathered += chunk
    return bytes(gathered)


async def test_bytes_go_both_ways_and_each_direction_ends_by_itself(pair):
    a, b = await stream_pair(pair)
    await a.write(b"last words", last=True)
    assert await read_all(b) == b"last words"
    with pytest.raises(MuxedStreamEOF):
        await b.read(1)
    with pytest.raises(MuxedStreamClosed):
        await a.write(b"more")
    await b.write(b"answer")
    await b.close()
    assert await read_all(a) == b"answer"
    await trio.testing.wait_all_tasks_blocked()
    assert pair[0]._streams == pair[1]._streams == {}


async def test_a_megabyte_arrives_whole_and_in_order(pair):
    a, b = await stream_pair(pair)
    data = bytes(range(256)) * 40_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.write, data)
        got = bytearray()
        while len(got) < len(data):
            got += await b.receive_chunk(99_991)
    assert got == data


@pytest.mark.parametrize(
    ("size", "frames"),
    [
        (FRAME_BYTES_MAX, [FRAME_BYTES_MAX]),
        (FRAME_BYTES_MAX + LEFT_OVER_BYTES_MAX, [FRAME_BYTES_MAX + LEFT_OVER_BYTES_MAX]),
        (FRAME_BYTES_MAX + LEFT_OVER_BYTES_MAX + 1, [FRAME_BYTES_MAX, LEFT_OVER_BYTES_MAX + 1]),
        (2 * FRAME_BYTES_MAX + 1, [FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1]),
    ],
)
async def test_a_little_more_than_a_frame_goes_in_one(pair, size, frames):
    a, b = await stream_pair(pair)
    b.expect_much()
    await trio.testing.wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.write, bytes(size))
        assert [len(await b.receive_chunk(WINDOW_BYTES)) for _ in frames] == frames


async def test_a_small_request_waits_for_two_large_frames_however_many_transfers_are_under_way(nursery):
    left, right = trio.testing.lockstep_stream_pair()  # nothing is sent before it is read
    end = Yamux(Plain(left, is_initiator=True), PEER)
    nursery.start_soon(end.start)
    await end.event_started.wait()
    peer = Plain(right, is_initiator=False)
    async with trio.open_nursery() as writers:
        for _ in range(8):
            stream = await end.open_stream()
            writers.start_soon(stream.write, bytes(INITIAL_WINDOW_BYTES))
        await trio.testing.wait_all_tasks_blocked()
        renewal = await end.open_stream()
        writers.start_soon(renewal.write, bytes(SMALL_BYTES_MAX))
        await trio.testing.wait_all_tasks_blocked()
        arrived: list[int] = []
        while renewal.stream_id not in arrived:
            _, kind, _, stream_id, length = HEADER.unpack(await peer.read_exact(HEADER.size))
            if kind == DATA:
                await peer.read_exact(length)
                arrived.append(stream_id)
        writers.cancel_scope.cancel()
    assert len(arrived) <= 3
    await end.close()


async def test_a_writer_waits_for_its_reader_however_long_it_takes(pair, autojump_clock):
    a, b = await stream_pair(pair)
    written = []

    async def write() -> None:
        await a.write(bytes(INITIAL_WINDOW_BYTES * 2))
        written.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.sleep(3600)
        assert written == []
        got = 0
        while got < INITIAL_WINDOW_BYTES * 2:
            got += len(await b.receive_chunk(1 << 20))
    assert written[0] >= 3600


async def test_a_cancelled_write_or_read_leaves_the_connection_whole(pair):
    a, _ = await stream_pair(pair)
    for _ in range(20):
        with trio.move_on_after(0.01):
            await a.write(bytes(WINDOW_BYTES * 2))
        with trio.move_on_after(0.01):
            await a.read(1)
    await a.reset()
    c, d = await stream_pair(pair)
    await d.write(b"alive")
    assert await c.read(5) == b"alive"


async def test_a_reset_wakes_both_ends_and_never_looks_like_the_end(pair):
    a, b = await stream_pair(pair)
    await a.write(b"half")
    await a.reset()
    for stream in (a, b):
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(MuxedStreamReset):
            await read_all(stream)
        with pytest.raises(MuxedStreamReset):
            await stream.write(b"x")


async def test_what_was_finished_before_the_connection_ended_can_still_be_read(pair):
    a, b = await stream_pair(pair)
    whole, torn = await stream_pair(pair)
    await a.write(b"whole", last=True)
    await whole.write(b"torn")
    await trio.testing.wait_all_tasks_blocked()
    await pair[0].close()
    await trio.testing.wait_all_tasks_blocked()
    assert await read_all(b) == b"whole"
    with pytest.raises(MuxedStreamReset):
        await read_all(torn)
    with pytest.raises(MuxedConnUnavailable):
        await pair[1].accept_stream()
    with pytest.raises(MuxedStreamError):
        await pair[1].open_stream()


async def test_a_healthy_silent_connection_lives_on(pair, autojump_clock):
    await trio.sleep(600)
    assert not pair[0].is_closed
    await stream_pair(pair)


async def test_a_peer_that_answers_nothing_loses_the_connection(cheat, autojump_clock):
    end, _ = cheat
    began = trio.current_time()
    await end.event_closed.wait()
    assert 10 <= trio.current_time() - began <= 15


async def test_any_sign_of_life_keeps_the_connection(cheat, autojump_clock):
    end, peer = cheat
    for _ in range(20):
        await trio.sleep(9)
        await peer.send_all(HEADER.pack(0, PING, ACK, 0, 0))
    assert not end.is_closed


async def test_a_ping_is_answered_with_its_own_number(cheat):
    _, peer = cheat
    await peer.send_all(HEADER.pack(0, PING, SYN, 0, 77))
    assert HEADER.unpack(await peer.receive_some()) == (0, PING, ACK, 0, 77)


@pytest.mark.parametrize(
    "frames",
    [
        HEADER.pack(1, DATA, 0, 1, 0),
        HEADER.pack(0, 9, 0, 1, 0),
        HEADER.pack(0, WINDOW, SYN, 2, 0),
        HEADER.pack(0, WINDOW, SYN, 1, 0) * 2,
        HEADER.pack(0, DATA, 0, 1, WINDOW_BYTES + 1),
        HEADER.pack(0, DATA, SYN, 1, INITIAL_WINDOW_BYTES + 1) + bytes(INITIAL_WINDOW_BYTES + 1),
    ],
    ids=["version", "type", "parity", "twice", "frame too long", "beyond the window"],
)
async def test_a_peer_that_breaks_the_rules_loses_the_connection(cheat, frames):
    end, peer = cheat
    await peer.send_all(frames)
    with trio.fail_after(1):
        await end.event_closed.wait()
    assert end.is_closed


async def test_streams_that_nobody_accepts_are_bounded(cheat):
    end, peer = cheat
    for number in range(BACKLOG_MAX + 10):
        await peer.send_all(HEADER.pack(0, WINDOW, SYN, 2 * number + 1, 0))
    await trio.testing.wait_all_tasks_blocked()
    answers = await peer.receive_some(1 << 20)
    flags = [HEADER.unpack_from(answers, at)[2] for at in range(0, len(answers), HEADER.size)]
    assert (flags.count(ACK), flags.count(RST)) == (BACKLOG_MAX, 10)
    assert not end.is_closed


async def test_a_peer_that_provokes_answers_and_reads_none_is_hung_up_on(nursery):
    left, right = trio.testing.lockstep_stream_pair()  # nothing is sent before it is read
    end = Yamux(Plain(left, is_initiator=False), PEER)
    nursery.start_soon(end.start)
    await end.event_started.wait()
    sent = 0
    try:
        while sent < 100_000:
            await right.send_all(HEADER.pack(0, PING, SYN, 0, 1) * 1000)
            sent += 1000
    except trio.BrokenResourceError:
        pass
    assert end.is_closed
    assert sent < 100_000
