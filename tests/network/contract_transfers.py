"""What large file transfers must do on every network, and on each way that a network may send them."""

import errno
import hashlib
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from hypha.errors import HyphaError, PeerUnreachable, Refused, RemoteProtocolError, StoreError
from hypha.network import transfer
from hypha.network.lane import LANE_BYTES_MIN
from hypha.network.seam import Network, Stream
from hypha.network.transfer import partial_path, partial_size, receive_file, send_file
from hypha.protocol.messages import Accepted, Ack, FetchSlice, JobStatus
from hypha.runtime import RealRuntime
from tests.network.cast import DIGEST, ack, fetch, opened, status, two

SIZE = LANE_BYTES_MIN + 17
# More than anything between two disks holds back, sockets' buffers included: sending it all takes a writer.
MORE_THAN_ANY_BUFFER = 64 << 20


class Files:
    """One file at the sender, and where it is to appear."""

    def __init__(self, directory: Path, size: int = SIZE) -> None:
        self.source, self.copy, self.size = directory / "source", directory / "copy", size
        data = random.Random(size).randbytes(1 << 20) * (size >> 20) + bytes(size % (1 << 20))
        self.source.write_bytes(data)
        self.digest = hashlib.sha256(data).hexdigest()
        self.runtime = RealRuntime()

    def arrived(self) -> bool:
        return self.copy.exists() and hashlib.sha256(self.copy.read_bytes()).hexdigest() == self.digest

    async def send(self, stream: Stream, *, offset: int = 0) -> None:
        await send_file(stream, self.source, offset=offset, length=self.size - offset, runtime=self.runtime)
        await stream.send_eof()

    async def receive(
        self,
        stream: Stream,
        *,
        offset: int = 0,
        digest: str = "",
        copy: Path | None = None,
        algorithm: str = "sha256",
    ) -> None:
        await receive_file(
            stream,
            copy or self.copy,
            size=self.size,
            digest=digest or self.digest,
            algorithm=algorithm,
            offset=offset,
            runtime=self.runtime,
        )


@asynccontextmanager
async def served(network: Network, server: Network, serve: object) -> AsyncIterator[Stream]:
    server.accept_streams(FetchSlice, serve)
    async with opened(network, server.peer_id, fetch()) as stream:
        yield stream


class TransferContract:
    @pytest.mark.parametrize("opener", ["dialled the other", "was dialled"])
    @pytest.mark.parametrize("sender", ["opens the stream", "accepts it"])
    async def test_a_file_arrives_whole_whoever_dialled_and_whoever_sends(self, make_network, tmp_path, opener, sender):
        files = Files(tmp_path)
        async with two(make_network) as (a, b):
            b.serve(JobStatus, ack)
            await a.request(b.peer_id, status())
            asker, server = (a, b) if opener == "dialled the other" else (b, a)

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await (files.receive(stream) if sender == "opens the stream" else files.send(stream))
                await stream.send_message(Ack()) if sender == "opens the stream" else None

            async with served(asker, server, serve) as stream:
                if sender == "opens the stream":
                    await files.send(stream)
                    assert await stream.receive_message(Ack) == Ack()
                else:
                    await files.receive(stream)
            assert files.arrived()
            assert await a.request(b.peer_id, status()) == Ack()

    async def test_a_transfer_goes_on_where_another_stopped(self, make_network, tmp_path):
        files = Files(tmp_path, SIZE + 5)
        partial_path(files.copy).write_bytes(files.source.read_bytes()[:5] + b"rubbish")
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await files.send(stream, offset=5)

            async with served(a, b, serve) as stream:
                await files.receive(stream, offset=5)
            assert files.arrived()

    async def test_wrong_bytes_are_named_by_their_digest_and_deleted(self, make_network, tmp_path):
        files = Files(tmp_path)
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await files.send(stream)

            async with served(a, b, serve) as stream:
                with pytest.raises(RemoteProtocolError, match=f"digest {files.digest}, not {DIGEST}"):
                    await files.receive(stream, digest=DIGEST)
            assert sorted(os.listdir(tmp_path)) == ["source"]

    @pytest.mark.parametrize("offset", [0, 5, (1 << 20) + 1])
    async def test_a_blake3_is_that_of_all_the_bytes_also_where_a_transfer_goes_on(
        self, make_network, tmp_path, offset
    ):
        files = Files(tmp_path, SIZE + offset)
        data = files.source.read_bytes()
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await files.send(stream, offset=offset)

            async with served(a, b, serve) as stream:
                partial_path(files.copy).write_bytes(data[:offset])
                await files.receive(stream, offset=offset, digest=blake3(data).hexdigest(), algorithm="blake3")
            assert files.copy.read_bytes() == data
            async with opened(a, b.peer_id, fetch()) as stream:
                partial_path(files.copy).write_bytes(data[:offset])
                with pytest.raises(RemoteProtocolError, match=f"digest {blake3(data).hexdigest()}, not {DIGEST}"):
                    await files.receive(stream, offset=offset, digest=DIGEST, algorithm="blake3")

    async def test_a_receiver_that_gives_up_ends_the_sender_and_keeps_what_came(self, make_network, tmp_path):
        files = Files(tmp_path, MORE_THAN_ANY_BUFFER)
        async with two(make_network) as (a, b):
            b.serve(JobStatus, ack)
            ended = Outcome()

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await ended.of(files.send(stream))

            async with served(a, b, serve) as stream:
                with trio.CancelScope() as scope, until_written(files, scope.cancel):
                    await files.receive(stream)
            assert scope.cancelled_caught
            assert isinstance(await ended.wait(), PeerUnreachable)
            assert 0 < partial_size(files.copy) < files.size
            assert await a.request(b.peer_id, status()) == Ack()

    async def test_a_sender_that_gives_up_ends_the_receiver_who_keeps_what_came(self, make_network, tmp_path):
        files = Files(tmp_path, MORE_THAN_ANY_BUFFER)
        async with two(make_network) as (a, b):
            b.serve(JobStatus, ack)
            ended = Outcome()

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await ended.of(files.receive(stream))

            async with served(a, b, serve) as stream:
                with trio.CancelScope() as scope, until_written(files, scope.cancel):
                    await files.send(stream)
                    await trio.sleep_forever()
            assert isinstance(await ended.wait(), PeerUnreachable)
            assert 0 < partial_size(files.copy) < files.size
            assert await a.request(b.peer_id, status()) == Ack()

    async def test_a_sender_waits_for_a_disk_that_is_slow(self, make_network, tmp_path, monkeypatch):
        files = Files(tmp_path, MORE_THAN_ANY_BUFFER)
        slow, read = threading.Event(), [0]
        write = transfer.Part.write

        def hold(part: transfer.Part, pieces: list[bytes]) -> None:
            slow.wait()
            write(part, pieces)

        monkeypatch.setattr(transfer.Part, "write", hold)
        count_reads(monkeypatch, read)
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await files.send(stream)

            async with served(a, b, serve) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(files.receive, stream)
                stuck_at = -1
                while stuck_at != read[0] or not read[0]:
                    stuck_at = read[0]
                    await trio.sleep(0.5)
                slow.set()
                assert stuck_at < files.size
            assert files.arrived()
            assert read[0] == files.size

    @pytest.mark.parametrize("answer", [Accepted(digest=DIGEST), Refused("seen it")])
    async def test_a_receiver_that_answers_without_the_bytes_is_heard(self, make_network, tmp_path, answer):
        files = Files(tmp_path)
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                if isinstance(answer, Refused):
                    raise answer
                await stream.send_message(answer)

            async with served(a, b, serve) as stream:
                await files.send(stream)
                if isinstance(answer, Refused):
                    with pytest.raises(Refused, match="seen it"):
                        await stream.receive_message(Accepted)
                else:
                    assert await stream.receive_message(Accepted) == answer

    async def test_a_receiver_may_have_finished_its_own_direction(self, make_network, tmp_path):
        files = Files(tmp_path)
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await files.send(stream)

            async with served(a, b, serve) as stream:
                await stream.send_eof()
                await files.receive(stream)
            assert files.arrived()

    async def test_a_source_that_is_too_short_is_named_and_breaks_the_stream(self, make_network, tmp_path):
        files = Files(tmp_path)
        os.truncate(files.source, files.size - 1)
        async with two(make_network) as (a, b):
            ended = Outcome()

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await ended.of(files.send(stream))

            async with served(a, b, serve) as stream:
                with pytest.raises(PeerUnreachable):
                    await files.receive(stream)
            failed = await ended.wait()
            assert isinstance(failed, StoreError)
            assert f"ends at {files.size - 1} bytes" in str(failed)

    async def test_a_full_disk_is_named_and_ends_the_sender(self, make_network, tmp_path, monkeypatch):
        files = Files(tmp_path, MORE_THAN_ANY_BUFFER)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwritev", full)
        async with two(make_network) as (a, b):
            ended = Outcome()

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await ended.of(files.send(stream))

            async with served(a, b, serve) as stream:
                with pytest.raises(StoreError, match=r"copy\.part: No space left"):
                    await files.receive(stream)
            assert isinstance(await ended.wait(), PeerUnreachable)

    async def test_more_at_once_than_there_are_places_all_arrive(self, make_network, tmp_path):
        files = Files(tmp_path)
        copies = [tmp_path / f"copy-{number}" for number in range(10)]
        async with two(make_network) as (a, b):

            async def serve(stream: Stream, _: FetchSlice) -> None:
                await files.send(stream)

            b.accept_streams(FetchSlice, serve)

            async def bring(copy: Path) -> None:
                async with opened(a, b.peer_id, fetch()) as stream:
                    await files.receive(stream, copy=copy)

            async with trio.open_nursery() as nursery:
                for copy in copies:
                    nursery.start_soon(bring, copy)
            assert {copy.stat().st_size for copy in copies} == {files.size}


class Outcome:
    """How a transfer in a handler ended."""

    def __init__(self) -> None:
        self._known = trio.Event()
        self._error: HyphaError | None = None

    async def of(self, work: object) -> None:
        try:
            await work
        except HyphaError as error:
            self._error = error
            raise PeerUnreachable("told to the test") from error
        finally:
            self._known.set()

    async def wait(self) -> HyphaError | None:
        await self._known.wait()
        return self._error


class until_written:
    """Call back, in trio's thread, when the first bytes are on the disk; they are the last to get there for a while."""

    def __init__(self, files: Files, call: object) -> None:
        self._call, self._token, self._go_on = call, None, threading.Event()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        token, write, go_on = trio.lowlevel.current_trio_token(), transfer.Part.write, self._go_on

        def hold(part: transfer.Part, pieces: list[bytes]) -> None:
            write(part, pieces)
            if part.size > 2 << 20 and not go_on.is_set():
                token.run_sync_soon(self._call)
                go_on.wait(0.2)
                go_on.set()

        self._patch.setattr(transfer.Part, "write", hold)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._patch.undo()


def count_reads(monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    """Count what is read through both calls that transfers use."""
    pread, preadv = os.pread, os.preadv

    def counted_pread(descriptor: int, count: int, offset: int) -> bytes:
        data = pread(descriptor, count, offset)
        read[0] += len(data)
        return data

    def counted_preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        read[0] += count
        return count

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)
