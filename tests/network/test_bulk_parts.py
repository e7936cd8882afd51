"""What a bulk connection consists of: the words that it begins with, and the buffers that go round behind it."""

import tracemalloc

import pytest
import trio
import trio.testing

from hypha.network import bulk, bulk_socket
from hypha.network.mtls import HandshakeRefused
from tests.network.libp2p_nodes import Nodes

# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("answer", [b"\x13/multistream/1.0.0\n\x03na\n", b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_dialer_asks_at_once_and_soon_sees_that_the_listener_speaks_something_else(pki, answer):
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()

    async def answering_late() -> None:
        asked = trio.SocketStream((await listener.accept())[0])
        heard = b""
        while len(heard) < len(bulk._AGREEING):
            heard += await asked.receive_some(len(bulk._AGREEING) - len(heard))
        assert heard == b"\x13/multistream/1.0.0\n\x12/hypha/bulk/1.0.0\n"
        await asked.send_all(answer)
        if answer:
            assert await asked.receive_some(1) == b""
        await asked.aclose()

    async with Nodes(pki).alone("a", "worker") as a, trio.open_nursery() as nursery:
        nursery.start_soon(answering_late)
        with pytest.raises(HandshakeRefused, match=f"does not speak {bulk.PROTOCOL_ID}"):
            await a._bulk.dial(*listener.getsockname(), a.peer_id, bytes(32))
    listener.close()


async def test_a_listener_may_answer_in_slivers():
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(bulk._agree, ours)
        for each in bulk._AGREEING[:-1]:
            await theirs.send_all(bytes([each]))
            await trio.testing.wait_all_tasks_blocked()
        await theirs.send_all(bulk._AGREEING[-1:] + b"what follows is not taken")
        await trio.testing.wait_all_tasks_blocked()
        assert await ours.receive_some(4) == b"what"


# --- buffers ---------------------------------------------------------------------------------------------------------


def test_while_the_writer_keeps_up_few_buffers_are_made():
    tracemalloc.start()
    try:
        buffers = bulk_socket._Buffers()
        full = buffers.filled()
        for _ in range(2 * bulk_socket.BUFFERS):
            buffers.fill(memoryview(buffers.take()))
            next(full)
        assert tracemalloc.get_traced_memory()[1] < 3 * bulk_socket.CHUNK_BYTES
    finally:
        tracemalloc.stop()


def test_a_writer_may_be_late_by_so_many_buffers_and_no_more():
    buffers = bulk_socket._Buffers()
    buffers.nobody_writes()
    taken = [buffers.take() for _ in range(bulk_socket.BUFFERS + 1)]
    assert len({id(each) for each in taken}) == bulk_socket.BUFFERS + 1
    assert taken[-1] is None
