"""What the streams of every network must do: the second half of `tests.network.contract`."""

import pytest
import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.seam import Peer, Stream
from hypha.protocol.messages import Accepted, Ack, FetchSlice, FileHeader, JobStatus, NoMore
from tests.network.cast import CHUNK, DIGEST, MORE_THAN_A_WINDOW, ack, fetch, opened, receive_all, status, two


class StreamContract:
    async def test_messages_and_bytes_alternate_on_a_stream_both_ways(self, make_network):
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, header: FetchSlice) -> None:
                assert stream.peer == Peer(a.peer_id, frozenset({"scheduler"}))
                await stream.send_message(FileHeader(bytes=len(CHUNK), digest=DIGEST))
                await stream.send_all(CHUNK)
                await stream.send_message(NoMore(round=len(header.slice)))
                assert await stream.receive_message(Accepted) == Accepted(digest=DIGEST)
                assert await receive_all(stream) == CHUNK[::-1]
                await stream.send_message(Ack())

            b.accept_streams(FetchSlice, serve)
            async with opened(a, b.peer_id, fetch("four")) as stream:
                header = await stream.receive_message(FileHeader)
                received = bytearray()
                while len(received) < header.bytes:
                    received += await stream.receive_some(header.bytes - len(received))
                assert received == CHUNK
                assert await stream.receive_message(NoMore) == NoMore(round=4)
                await stream.send_message(Accepted(digest=DIGEST))
                await stream.send_all(memoryview(CHUNK[::-1]))
                await stream.send_eof()
                await stream.send_eof()
                assert await stream.receive_message(Ack) == Ack()
                assert await stream.receive_some(1) == b""

    async def test_a_refused_stream_says_why(self, make_network):
        async with two(make_network) as (a, b):

            async def refuse(_stream: Stream, header: FetchSlice) -> None:
                raise Refused(f"no slice {header.slice}")

            b.accept_streams(FetchSlice, refuse)
            a.accept_streams(FetchSlice, refuse, roles=frozenset({"data"}))
            async with opened(a, b.peer_id, fetch()) as stream:
                with pytest.raises(Refused, match="no slice s"):
                    await stream.receive_message(FileHeader)
            async with opened(b, a.peer_id, fetch()) as stream:
                with pytest.raises(Refused, match="data") as refusal:
                    await stream.receive_message(FileHeader)
            assert refusal.value.code == "forbidden"

    async def test_another_kind_than_expected_breaks_the_protocol(self, make_network):
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await stream.send_message(Ack())

            b.accept_streams(FetchSlice, serve)
            async with opened(a, b.peer_id, fetch()) as stream:
                with pytest.raises(RemoteProtocolError, match="Ack came where FileHeader"):
                    await stream.receive_message(FileHeader)

    async def test_a_truncated_transfer_never_looks_finished(self, make_network, caplog):
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await stream.send_all(CHUNK[:1000])
                raise ZeroDivisionError("half way")

            b.accept_streams(FetchSlice, serve)
            async with opened(a, b.peer_id, fetch()) as stream:
                await stream.send_eof()
                with pytest.raises(PeerUnreachable):
                    await receive_all(stream)
            assert "half way" in caplog.text

    async def test_a_sender_waits_for_its_reader(self, make_network):
        async with two(make_network) as (a, b):
            sent = [0]

            async def serve(stream: Stream, _: FetchSlice) -> None:
                for _ in range(MORE_THAN_A_WINDOW // len(CHUNK)):
                    await stream.send_all(CHUNK)
                    sent[0] += len(CHUNK)

            b.accept_streams(FetchSlice, serve)
            async with opened(a, b.peer_id, fetch()) as stream:
                await stream.send_eof()
                stuck_at = -1
                while stuck_at != sent[0] or not sent[0]:
                    stuck_at = sent[0]
                    await trio.sleep(1.0)
                assert stuck_at < MORE_THAN_A_WINDOW
                assert len(await receive_all(stream)) == MORE_THAN_A_WINDOW

    async def test_a_stream_given_up_half_way_leaves_others_working(self, make_network):
        async with two(make_network) as (a, b):
            broken = trio.Event()

            async def serve(stream: Stream, header: FetchSlice) -> None:
                try:
                    for _ in range(MORE_THAN_A_WINDOW // len(CHUNK)):
                        await stream.send_all(CHUNK)
                except PeerUnreachable:
                    broken.set()
                    raise

            b.accept_streams(FetchSlice, serve)
            b.serve(JobStatus, ack)
            async with opened(a, b.peer_id, fetch("kept")) as kept:
                await kept.send_eof()
                with trio.CancelScope() as scope:
                    async with opened(a, b.peer_id, fetch("given up")) as stream:
                        await stream.receive_some(1000)
                        scope.cancel()
                        await receive_all(stream)
                await broken.wait()
                assert await a.request(b.peer_id, status()) == Ack()
                assert len(await receive_all(kept)) == MORE_THAN_A_WINDOW

    async def test_many_streams_run_at_the_same_time(self, make_network):
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await stream.send_all(await receive_all(stream))

            b.accept_streams(FetchSlice, serve)
            echoed = []

            async def echo(number: int) -> None:
                async with opened(a, b.peer_id, fetch()) as stream:
                    await stream.send_all(bytes([number]) * 100_000)
                    await stream.send_eof()
                    echoed.append(await receive_all(stream))

            async with trio.open_nursery() as nursery:
                for number in range(16):
                    nursery.start_soon(echo, number)
            assert sorted(echoed) == [bytes([number]) * 100_000 for number in range(16)]
