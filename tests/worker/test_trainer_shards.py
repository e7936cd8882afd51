"""A training session whose model two parameter servers share: each gets its part, and the executor gets the whole."""

from hashlib import sha256

import msgspec
import pytest
import trio

from hypha.errors import Refused, RemoteProtocolError
from hypha.protocol import bridge
from hypha.protocol.messages import Accepted, PartRef, Rebase
from tests.worker.cast import SCHEDULER, SERVER, Listener, digest_of, fields, file_ref, member, stage, view
from tests.worker.training_play import BASE, MODEL, UPDATE, Server, outer, send_outer

WHOLE = sha256(f"{BASE}\n{BASE}".encode()).hexdigest()


def opened(number=1, **changes):
    both = {"servers": (member(SERVER), member("serv-2")), "shards": (0, 1)}
    return view(number, **{"base_digest": WHOLE, "committed_digest": WHOLE, "parts": (BASE, BASE)} | both | changes)


class Two:
    """A session of two shards: `first` serves shard 0, `second` shard 1."""

    def __init__(self, here):
        self.here = here
        self.first = Server(here.server, here.runtime, here.directory / "held")
        self.second = Server(here.peers["serv-2"], here.runtime, here.directory / "held-2")
        self.session = here.train(shards=2)
        self.ear = Listener(here, self.session)
        here.network.accept_streams(outer().__class__, self.session.receive_update)

    def see(self, newest):
        self.session.observe(newest, SCHEDULER)

    def update(self):
        directory = self.session.context.directory
        files = (file_ref(directory, "delta-0", b"first"), file_ref(directory, "delta-1", b"second"))
        return bridge.SendUpdate(round=1, base_digest=WHOLE, files=files, samples=0, intervals=())


@pytest.fixture
async def two(tmp_path):
    async with stage(tmp_path, peers=(SERVER, "serv-2")) as here:
        yield Two(here)


async def test_each_server_gets_its_part_of_one_contribution(autojump_clock, two):
    two.see(opened())
    assert await two.session.send(two.update()) == bridge.SendAccepted()
    (first,), (second,) = two.first.pushed, two.second.pushed
    parts = (PartRef(bytes=5, digest=digest_of(b"first")), PartRef(bytes=6, digest=digest_of(b"second")))
    assert (first.parts, first.shard, first.part) == (parts, 0, parts[0])
    assert (second.parts, second.shard, second.part) == (parts, 1, parts[1])
    whole = sha256("\n".join(part.digest for part in parts).encode()).hexdigest()
    assert first.contribution == second.contribution
    assert (first.contribution.digest, first.contribution.bytes) == (whole, 11)


async def test_a_push_waits_for_the_lost_shards_server_and_spares_the_other(autojump_clock, two):
    two.see(opened(1, servers=(member(SERVER),), shards=(0,)))
    got = []

    async def send():
        got.append(await two.session.send(two.update()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(5)
        assert (got, len(two.first.pushed), two.second.pushed) == ([], 1, [])
        two.see(opened(2))
    assert (got, len(two.first.pushed), len(two.second.pushed)) == ([bridge.SendAccepted()], 1, 1)


async def test_a_replaced_server_alone_gets_the_delivered_update_again(autojump_clock, two):
    two.see(opened(1))
    await two.session.send(two.update())
    two.see(opened(2, servers=(member(SERVER), member("serv-2", fence=2))))
    await trio.sleep(5)
    assert (len(two.first.pushed), len(two.second.pushed)) == (1, 2)


async def test_one_servers_rebase_is_the_answer(autojump_clock, two):
    two.second.script = [Rebase(round=2, base_digest=digest_of("b"))]
    two.see(opened())
    assert await two.session.send(two.update()) == bridge.SendRebase(round=2, base_digest=digest_of("b"))


async def test_an_update_in_too_few_files_breaks_the_protocol(autojump_clock, two):
    two.see(opened())
    update = two.update()
    with pytest.raises(RemoteProtocolError, match="in 1 files for 2 shards"):
        await two.session.send(msgspec.structs.replace(update, files=update.files[:1]))


async def test_the_base_comes_from_both_servers(autojump_clock, two):
    two.see(opened())
    fetched = await two.session.fetch(bridge.FetchBase())
    assert (fetched.digest, [file.digest for file in fetched.files]) == (WHOLE, [BASE, BASE])
    assert [two.session.file(file.path).read_bytes() for file in fetched.files] == [MODEL, MODEL]
    assert ([asked.part for asked in two.first.fetched], [asked.part for asked in two.second.fetched]) == (
        ["model"],
        ["model-1"],
    )


async def test_outer_updates_are_handed_over_once_all_shards_name_the_same_close(autojump_clock, two):
    two.see(opened())
    first, second = two.here.server, two.here.peers["serv-2"]
    made = [digest_of("model 1a"), digest_of("model 1b")]
    taken = Accepted(digest=digest_of(UPDATE))
    assert await send_outer(first, outer(close=7, model_digest=made[0])) == taken
    assert await send_outer(second, outer(close=8, shard=1, model_digest=made[1])) == taken
    await trio.sleep(5)
    assert two.ear.kinds() == ["ViewChanged"]
    assert await send_outer(first, outer(close=8, model_digest=made[0])) == taken
    assert await send_outer(second, outer(close=7, shard=1, model_digest=made[1])) == taken, "late, and dropped"
    arrived = await two.ear.next(bridge.UpdateArrived)
    whole = sha256("\n".join(made).encode()).hexdigest()
    assert fields(arrived, "close", "base_digest", "model_digest", "parts") == (8, WHOLE, whole, tuple(made))
    await trio.sleep(5)
    assert two.ear.kinds() == ["ViewChanged", "UpdateArrived"]
    left = sorted(path.name for path in two.session.context.directory.iterdir())
    assert left == sorted(file.path for file in arrived.files), "nothing of the older close stays"


async def test_a_server_speaks_for_its_own_shard_only(autojump_clock, two):
    two.see(opened())
    with pytest.raises(Refused, match="serv does not serve shard 1 in view 1"):
        await send_outer(two.here.server, outer(shard=1))
