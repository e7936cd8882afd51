"""The socket under a connection: it waits, gives way, and says when the connection is over."""

import socket

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError

from hypha.network.tcp import TcpSocket

TURNS = 50


def _pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = map(trio.socket.from_stdlib_socket, socket.socketpair())
    return trio.SocketStream(one), trio.SocketStream(other)


async def test_who_always_finds_bytes_still_lets_others_run():
    near, far = _pair()
    read, turns = TcpSocket(near), []

    async def take() -> None:
        for number in range(TURNS):
            assert await read.receive_into(memoryview(bytearray(1))) == 1
            turns.append(number)

    async with near, far:
        await far.send_all(bytes(TURNS))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            while len(turns) < TURNS:
                before = len(turns)
                await trio.lowlevel.checkpoint()
                assert len(turns) - before <= 2, "it read on without giving way"


async def test_a_reader_that_waits_can_be_cancelled_and_reads_on_later():
    near, far = _pair()
    read, buffer = TcpSocket(near), memoryview(bytearray(8))
    async with near, far:
        with trio.move_on_after(0.01) as scope:
            await read.receive_into(buffer)
        assert scope.cancelled_caught
        await far.send_all(b"later")
        assert bytes(buffer[: await read.receive_into(buffer)]) == b"later"


async def test_what_the_kernel_does_not_take_is_sent_when_it_does():
    near, far = _pair()
    write, data = TcpSocket(near), bytes(range(256)) * (1 << 14)
    came = bytearray()

    async def take() -> None:
        while len(came) < len(data):
            came.extend(await far.receive_some())

    async with near, far, trio.open_nursery() as nursery:
        sent = write.send_now(data)
        assert 0 < sent < len(data)
        assert write.send_now(data[sent:]) == 0
        nursery.start_soon(take)
        await write.send_all(memoryview(data)[sent:])
    assert bytes(came) == data


@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_a_closed_connection_is_called_that(whose):
    near, far = _pair()
    both = TcpSocket(near)
    await (near if whose == "ours" else far).aclose()
    with pytest.raises(ConnectionClosedError):
        both.send_now(b"x")
    if whose == "ours":
        with pytest.raises(ConnectionClosedError):
            await both.receive_into(memoryview(bytearray(1)))
    else:
        assert await both.receive_into(memoryview(bytearray(1))) == 0
    await near.aclose()
    await far.aclose()


async def test_closing_ends_a_reader_and_a_writer_that_wait():
    near, far = _pair()
    both, ended = TcpSocket(near), []

    async def wait(call: str) -> None:
        with pytest.raises(ConnectionClosedError):
            await (both.receive_into(memoryview(bytearray(1))) if call == "read" else both.send_all(memoryview(b"x")))
        ended.append(call)

    async with far, trio.open_nursery() as nursery:
        while both.send_now(bytes(1 << 16)):
            pass
        nursery.start_soon(wait, "read")
        nursery.start_soon(wait, "write")
        await trio.testing.wait_all_tasks_blocked()
        await near.aclose()
    assert sorted(ended) == ["read", "write"]
