"""Files over streams of the in-memory network: whole or not at all, resumed, checked, with bounded memory."""

import hashlib
import os
import random
from contextlib import asynccontextmanager

import pytest
import trio
from blake3 import blake3

from hypha.errors import PeerUnreachable, RemoteProtocolError, StoreError
from hypha.network import transfer
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.network.transfer import CHUNK_BYTES, partial_path, partial_size, receive_file, send_file
from hypha.protocol.messages import FetchSlice
from hypha.runtime import RealRuntime
from tests.sim.virtual import VirtualRuntime

SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 17]


@pytest.fixture
def runtime():
    return VirtualRuntime(1, "receiver", blocking_s=0.001)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@asynccontextmanager
async def served(path, runtime, *, size: int, offset: int = 0, profile: FaultProfile | None = None):
    """A stream on which the peer sends the file from an offset to `size`."""
    fabric = MemoryFabric(1, profile)
    async with fabric.node("a") as a, fabric.node("b") as b:

        async def serve(stream, header) -> None:
            await send_file(stream, path, offset=header.offset, length=size - header.offset, runtime=runtime)

        b.accept_streams(FetchSlice, serve)
        stream = await a.open_stream("b", FetchSlice(dataset="d", manifest_digest=None, slice="s", offset=offset))
        await stream.send_eof()
        yield stream
        await stream.aclose()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("algorithm", "digest_of"), [("sha256", sha256), ("blake3", lambda d: blake3(d).hexdigest())])
async def test_a_file_arrives_whole(autojump_clock, tmp_path, runtime, size, algorithm, digest_of):
    data = content(size)
    (tmp_path / "source").write_bytes(data)
    async with served(tmp_path / "source", runtime, size=size) as stream:
        await receive_file(
            stream, tmp_path / "copy", size=size, digest=digest_of(data), algorithm=algorithm, runtime=runtime
        )
    assert (tmp_path / "copy").read_bytes() == data
    assert not partial_path(tmp_path / "copy").exists()


async def test_a_file_arrives_through_real_threads(tmp_path):
    data, runtime = content(5 * CHUNK_BYTES), RealRuntime()
    (tmp_path / "source").write_bytes(data)
    async with served(tmp_path / "source", runtime, size=len(data)) as stream:
        await receive_file(stream, tmp_path / "copy", size=len(data), digest=sha256(data), runtime=runtime)
    assert (tmp_path / "copy").read_bytes() == data


async def test_what_arrives_wrong_is_named_by_its_digest_and_deleted(autojump_clock, tmp_path, runtime):
    data = content(2 * CHUNK_BYTES)
    (tmp_path / "source").write_bytes(data)
    async with served(tmp_path / "source", runtime, size=len(data)) as stream:
        with pytest.raises(RemoteProtocolError, match=f"copy came with digest {sha256(data)}, not {'0' * 64}"):
            await receive_file(stream, tmp_path / "copy", size=len(data), digest="0" * 64, runtime=runtime)
    assert sorted(os.listdir(tmp_path)) == ["source"]


async def test_a_broken_transfer_goes_on_where_it_stopped(autojump_clock, tmp_path, runtime):
    data = content(16 * CHUNK_BYTES)
    (tmp_path / "source").write_bytes(data)
    copy, offsets = tmp_path / "copy", []
    while not copy.exists():
        offset = partial_size(copy)
        offsets.append(offset)
        # Each attempt meets another fate: the first breaks on its way.
        profile = FaultProfile(stream_break=0.1 if len(offsets) == 1 else 0.0)
        async with served(tmp_path / "source", runtime, size=len(data), offset=offset, profile=profile) as stream:
            try:
                await receive_file(stream, copy, size=len(data), digest=sha256(data), offset=offset, runtime=runtime)
            except PeerUnreachable:
                assert len(offsets) == 1
    assert copy.read_bytes() == data
    assert len(offsets) == 2
    assert 0 < offsets[1] < len(data)


async def test_what_lies_there_from_before_counts_towards_the_digest(autojump_clock, tmp_path, runtime):
    data = content(3 * CHUNK_BYTES)
    (tmp_path / "source").write_bytes(data)
    partial_path(tmp_path / "copy").write_bytes(bytes(CHUNK_BYTES + 5))
    async with served(tmp_path / "source", runtime, size=len(data), offset=CHUNK_BYTES + 5) as stream:
        with pytest.raises(RemoteProtocolError, match=sha256(data)):
            await receive_file(
                stream,
                tmp_path / "copy",
                size=len(data),
                digest=sha256(data),
                offset=CHUNK_BYTES + 5,
                runtime=runtime,
            )


async def test_more_than_was_asked_to_go_on_from_is_overwritten(autojump_clock, tmp_path, runtime):
    data = content(2 * CHUNK_BYTES)
    (tmp_path / "source").write_bytes(data)
    partial_path(tmp_path / "copy").write_bytes(data[:100] + bytes(4 * CHUNK_BYTES))
    async with served(tmp_path / "source", runtime, size=len(data), offset=100) as stream:
        await receive_file(stream, tmp_path / "copy", size=len(data), digest=sha256(data), offset=100, runtime=runtime)
    assert (tmp_path / "copy").read_bytes() == data


async def test_an_end_before_the_last_byte_is_an_error_and_keeps_what_came(autojump_clock, tmp_path, runtime):
    data = content(2 * CHUNK_BYTES)
    (tmp_path / "source").write_bytes(data)
    async with served(tmp_path / "source", runtime, size=CHUNK_BYTES + 9) as stream:
        with pytest.raises(RemoteProtocolError, match="ended before the file"):
            await receive_file(stream, tmp_path / "copy", size=len(data), digest=sha256(data), runtime=runtime)
    assert partial_path(tmp_path / "copy").read_bytes() == data[: CHUNK_BYTES + 9]
    assert not (tmp_path / "copy").exists()


async def test_a_full_disk_is_named_and_stops_the_transfer(autojump_clock, tmp_path, runtime):
    (tmp_path / "source").write_bytes(content(CHUNK_BYTES))
    # /dev/full takes nothing: every write fails as on a full disk.
    partial_path(tmp_path / "copy").symlink_to("/dev/full")
    async with served(tmp_path / "source", runtime, size=CHUNK_BYTES) as stream:
        with pytest.raises(StoreError, match=r"copy\.part: No space left"):
            await receive_file(stream, tmp_path / "copy", size=CHUNK_BYTES, digest="0" * 64, runtime=runtime)


async def test_an_offset_that_is_not_there_is_refused_before_anything_is_lost(autojump_clock, tmp_path, runtime):
    partial_path(tmp_path / "copy").write_bytes(b"12345")
    async with MemoryFabric(1).node("a"):
        with pytest.raises(StoreError, match="5 bytes, not the 6"):
            await receive_file(None, tmp_path / "copy", size=10, digest="0" * 64, offset=6, runtime=runtime)
        with pytest.raises(RemoteProtocolError, match="offset 11"):
            await receive_file(None, tmp_path / "copy", size=10, digest="0" * 64, offset=11, runtime=runtime)
        with pytest.raises(RemoteProtocolError, match="md5"):
            await receive_file(None, tmp_path / "copy", size=10, digest="0" * 32, algorithm="md5", runtime=runtime)
    assert partial_path(tmp_path / "copy").read_bytes() == b"12345"


async def test_a_source_that_is_missing_or_short_resets_the_stream(autojump_clock, tmp_path, runtime, caplog):
    (tmp_path / "short").write_bytes(content(10))
    for name, said in (("short", "ends at 10 bytes"), ("missing", "No such file")):
        async with served(tmp_path / name, runtime, size=20) as stream:
            with pytest.raises(PeerUnreachable):
                await receive_file(stream, tmp_path / "copy", size=20, digest="0" * 64, runtime=runtime)
        assert said in caplog.text


async def test_a_slow_reader_holds_the_sender_to_a_few_chunks(autojump_clock, tmp_path, runtime):
    size, read = 40 * CHUNK_BYTES, [0]
    with (tmp_path / "source").open("wb") as file:
        file.truncate(size)

    class Counting(VirtualRuntime):
        async def run_blocking(self, function, *args):
            read[0] += function is transfer._read
            return await super().run_blocking(function, *args)

    async with served(tmp_path / "source", Counting(1, "sender"), size=size) as stream:
        await stream.receive_some(1)
        await trio.sleep(100)
        assert read[0] <= 2 + transfer.CHUNKS_QUEUED_MAX + 1


async def test_slivers_do_not_pile_up(autojump_clock, tmp_path, runtime):
    data = content(5000)

    class Slivers:
        def __init__(self) -> None:
            self.at = 0

        async def receive_some(self, _bytes_max: int) -> bytes:
            await trio.lowlevel.checkpoint()
            self.at += 1
            return data[self.at - 1 : self.at]

    await receive_file(Slivers(), tmp_path / "copy", size=5000, digest=sha256(data), runtime=runtime)
    assert (tmp_path / "copy").read_bytes() == data


async def test_a_cancelled_transfer_leaves_the_file_system_as_an_aborted_one(autojump_clock, tmp_path, runtime):
    (tmp_path / "source").write_bytes(content(8 * CHUNK_BYTES))
    profile = FaultProfile(bandwidth=float(CHUNK_BYTES))
    async with served(tmp_path / "source", runtime, size=8 * CHUNK_BYTES, profile=profile) as stream:
        with trio.move_on_after(4.5) as patience:
            await receive_file(stream, tmp_path / "copy", size=8 * CHUNK_BYTES, digest="0" * 64, runtime=runtime)
    assert patience.cancelled_caught
    assert not (tmp_path / "copy").exists()
    assert 0 < partial_size(tmp_path / "copy") < 8 * CHUNK_BYTES
