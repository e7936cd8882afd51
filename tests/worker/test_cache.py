"""The slice cache: one transfer for many, bounded, never wrong bytes, links that outlive it."""

import hashlib
import stat
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from hypha.errors import PeerUnreachable, StoreError
from hypha.network.transfer import partial_path
from hypha.protocol.messages import SliceRef
from hypha.worker.cache import PARTS_MAX, SliceCache
from tests.sim.virtual import VirtualRuntime


def content(number: int, size: int = 1000) -> bytes:
    return bytes([number]) * size


def ref(number: int, size: int = 1000) -> SliceRef:
    return SliceRef(name=f"s-{number}", samples=1, bytes=size, digest=hashlib.sha256(content(number, size)).hexdigest())


def arrive(path: Path, data: bytes) -> None:
    """As a transfer ends: a new file takes the place."""
    part = partial_path(path)
    part.write_bytes(data)
    part.replace(path)


class Source:
    """Where slices come from: counts transfers, each of which takes a second."""

    def __init__(self) -> None:
        self.brought: list[int] = []
        self.fails: Exception | None = None

    def of(self, number: int, size: int = 1000):
        async def fetch(path: Path) -> None:
            await trio.sleep(1)
            if self.fails is not None:
                partial_path(path).write_bytes(b"half")
                raise self.fails
            self.brought.append(number)
            arrive(path, content(number, size))

        return fetch


class Shelf:
    """A cache with a job's directory beside it."""

    def __init__(self, directory: Path, bytes_max: int = 2500) -> None:
        self.root = directory / "cache"
        self.job = directory / "job"
        self.job.mkdir(exist_ok=True)
        self.source = Source()
        self.cache = SliceCache(self.root, bytes_max=bytes_max, runtime=VirtualRuntime(1, "w", blocking_s=0.01))

    async def link(self, number: int, size: int = 1000) -> bytes:
        relative = await self.cache.link(ref(number, size), self.job, self.source.of(number, size))
        return (self.job / relative).read_bytes()

    def held(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


async def test_two_jobs_that_want_one_slice_wait_for_one_transfer(autojump_clock, shelf):
    await shelf.cache.open()
    got = []

    async def want() -> None:
        got.append(await shelf.link(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(want)
        nursery.start_soon(want)
    assert got == [content(1), content(1)]
    assert shelf.source.brought == [1]


async def test_the_least_recently_used_goes_first_and_its_links_stay(autojump_clock, shelf):
    await shelf.cache.open()
    for number in (1, 2, 1, 3):
        await shelf.link(number)
    assert shelf.held() == sorted([ref(1).digest, ref(3).digest])
    assert (shelf.job / "slices" / ref(2).digest).read_bytes() == content(2)
    assert shelf.source.brought == [1, 2, 3]


async def test_one_slice_larger_than_the_bound_is_kept_until_the_next(autojump_clock, shelf):
    await shelf.cache.open()
    assert await shelf.link(1, 9000) == content(1, 9000)
    assert shelf.held() in ([], [ref(1, 9000).digest])
    await shelf.link(2)
    assert shelf.held() == [ref(2).digest]


async def test_many_at_once_under_a_small_bound_all_get_their_bytes(autojump_clock, tmp_path):
    shelf = Shelf(tmp_path, bytes_max=1000)
    await shelf.cache.open()
    got: dict[tuple[int, int], bytes] = {}

    async def want(number: int, turn: int) -> None:
        await trio.sleep(0.3 * turn)
        got[number, turn] = await shelf.link(number)

    async with trio.open_nursery() as nursery:
        for turn in range(8):
            for number in range(4):
                nursery.start_soon(want, number, turn)
    assert got == {(number, turn): content(number) for number in range(4) for turn in range(8)}
    assert sum(path.stat().st_size for path in shelf.root.iterdir()) <= 1000


async def test_what_an_earlier_run_left_is_used_after_a_look_at_every_byte(autojump_clock, tmp_path):
    await Shelf(tmp_path).cache.open()
    (tmp_path / "cache" / ref(1).digest).write_bytes(content(1))
    shelf = Shelf(tmp_path)
    await shelf.cache.open()
    assert await shelf.link(1) == content(1)
    assert shelf.source.brought == []


@pytest.mark.parametrize("damage", [content(1)[:-1] + b"\x00", content(1)[:-1], b"", content(1) + b"x"])
async def test_a_damaged_slice_of_an_earlier_run_is_never_used(autojump_clock, tmp_path, caplog, damage):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ref(1).digest).write_bytes(damage)
    shelf = Shelf(tmp_path)
    await shelf.cache.open()
    assert await shelf.link(1) == content(1)
    assert shelf.source.brought == [1]
    assert [record.message for record in caplog.records] == ["Cached slice is damaged, fetching it again"]


async def test_the_digest_is_by_the_algorithm_of_the_manifest(autojump_clock, tmp_path):
    (tmp_path / "cache").mkdir()
    digest = blake3(content(1)).hexdigest()
    (tmp_path / "cache" / digest).write_bytes(content(1))
    shelf = Shelf(tmp_path)
    await shelf.cache.open()
    wanted = SliceRef(name="s", samples=1, bytes=1000, digest=digest, digest_algorithm="blake3")
    await shelf.cache.link(wanted, shelf.job, shelf.source.of(1))
    assert shelf.source.brought == []


async def test_a_slice_that_vanished_from_the_disk_is_fetched_again(autojump_clock, shelf):
    await shelf.cache.open()
    await shelf.link(1)
    (shelf.root / ref(1).digest).unlink()
    (shelf.job / "slices" / ref(1).digest).unlink()
    assert await shelf.link(1) == content(1)
    assert shelf.source.brought == [1, 1]


async def test_cached_slices_are_read_only_since_jobs_share_them(autojump_clock, shelf):
    await shelf.cache.open()
    await shelf.link(1)
    assert stat.S_IMODE((shelf.root / ref(1).digest).stat().st_mode) == 0o400
    assert stat.S_IMODE(shelf.root.stat().st_mode) == 0o700


async def test_a_failed_transfer_is_the_callers_and_its_beginning_stays_for_the_next_attempt(autojump_clock, shelf):
    await shelf.cache.open()
    shelf.source.fails = PeerUnreachable("nobody provides it")
    with pytest.raises(PeerUnreachable, match="nobody provides it"):
        await shelf.link(1)
    assert shelf.held() == [f"{ref(1).digest}.part"]
    shelf.source.fails = None
    assert await shelf.link(1) == content(1)


async def test_beginnings_do_not_pile_up(autojump_clock, shelf):
    await shelf.cache.open()
    shelf.source.fails = PeerUnreachable("nobody provides it")
    for number in range(PARTS_MAX + 3):
        with pytest.raises(PeerUnreachable):
            await shelf.link(number)
    assert shelf.held() == sorted(f"{ref(number).digest}.part" for number in range(3, PARTS_MAX + 3))
    again = Shelf(shelf.job.parent)
    await again.cache.open()
    assert again.held() == []


async def test_a_cache_that_cannot_be_is_named(autojump_clock, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StoreError, match=r"cache: File exists"):
        await Shelf(tmp_path).cache.open()
