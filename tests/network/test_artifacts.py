"""A job's tensor files by digest: whole, resumed after a break, and never made of wrong bytes."""

import random
from dataclasses import dataclass, field

import pytest
import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.artifacts import fetch_artifact, serve_artifact
from hypha.network.memory import MemoryFabric
from hypha.network.transfer import partial_path
from hypha.protocol.messages import FetchModel, FileHeader
from tests.sim.virtual import VirtualRuntime
from tests.worker.cast import digest_of

DATA = random.Random(7).randbytes(3_000_000)
WANTED = FetchModel(job_id="j", job_epoch=1, part="model", round=3, digest=digest_of(DATA))


@dataclass
class Scene:
    """`a` fetches what `b` holds; `headers` are the questions, `lie` replaces the answer."""

    fabric: MemoryFabric
    a: object
    path: object
    held: object
    runtime: VirtualRuntime = field(default_factory=lambda: VirtualRuntime(1, "b"))
    headers: list = field(default_factory=list)
    lie: object = None

    async def serve(self, stream, header):
        self.headers.append(header)
        if self.lie is not None:
            await self.lie(stream, header)
        else:
            await serve_artifact(stream, header, self.held, size=len(DATA), runtime=self.runtime)

    async def fetch(self):
        return await fetch_artifact(self.a, "b", WANTED, self.path, runtime=self.runtime, patience_s=10.0)


@pytest.fixture
async def scene(nursery, tmp_path):
    fabric = MemoryFabric(1)
    (tmp_path / "held").write_bytes(DATA)
    async with fabric.node("a") as a, fabric.node("b") as b:
        made = Scene(fabric, a, tmp_path / "copy", tmp_path / "held")
        b.accept_streams(FetchModel, made.serve)
        yield made


async def test_a_file_comes_whole_and_says_its_size(autojump_clock, scene):
    assert await scene.fetch() == len(DATA)
    assert scene.path.read_bytes() == DATA
    assert [header.offset for header in scene.headers] == [0]


async def test_a_broken_transfer_goes_on_where_it_broke(autojump_clock, scene):
    async def half(stream, header):
        await stream.send_message(FileHeader(bytes=len(DATA), digest=header.digest))
        await stream.send_all(DATA[:1_000_000])
        await trio.sleep(1)
        raise PeerUnreachable("the connection broke")

    scene.lie = half
    with pytest.raises(PeerUnreachable):
        await scene.fetch()
    kept = partial_path(scene.path).stat().st_size
    assert 0 < kept <= 1_000_000
    scene.lie = None
    assert await scene.fetch() == len(DATA)
    assert scene.headers[-1].offset == kept
    assert scene.path.read_bytes() == DATA


@pytest.mark.parametrize("garbage", [b"\x00" * 10, b"\x00" * (len(DATA) + 10)])
async def test_a_wrong_beginning_is_given_up_so_that_the_next_attempt_succeeds(autojump_clock, scene, garbage):
    partial_path(scene.path).write_bytes(garbage)
    with pytest.raises(RemoteProtocolError):
        await scene.fetch()
    assert not partial_path(scene.path).exists()
    assert await scene.fetch() == len(DATA)


async def test_another_digest_than_asked_for_is_refused_before_its_bytes(autojump_clock, scene):
    async def other(stream, _header):
        await stream.send_message(FileHeader(bytes=3, digest="1" * 64))
        await stream.send_all(b"abc")

    scene.lie = other
    with pytest.raises(RemoteProtocolError, match=f"b sent {'1' * 64} where {WANTED.digest} was asked for"):
        await scene.fetch()
    assert not scene.path.exists()


async def test_a_holder_that_does_not_have_it_says_why_and_what_has_come_stays(autojump_clock, scene):
    async def no(_stream, _header):
        raise Refused("model 3 is not held here", "retry")

    partial_path(scene.path).write_bytes(DATA[:100])
    scene.lie = no
    with pytest.raises(Refused, match="model 3 is not held here"):
        await scene.fetch()
    assert partial_path(scene.path).read_bytes() == DATA[:100]


async def test_silence_before_the_header_is_unreachable(autojump_clock, scene):
    scene.fabric.partition("a", "b")
    with pytest.raises(PeerUnreachable):
        await scene.fetch()


async def test_an_offset_beyond_the_file_is_the_fetchers_fault(autojump_clock, scene):
    partial_path(scene.path).write_bytes(DATA + b"more")
    with pytest.raises(RemoteProtocolError, match=f"offset {len(DATA) + 4} lies beyond the {len(DATA)} bytes of model"):
        await scene.fetch()
