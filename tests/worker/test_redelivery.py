"""A delivered update outlives the parameter server that took it: the next one gets it while its round is open."""

import pytest
import trio

from hypha.protocol import bridge
from tests.worker.cast import SERVER, digest_of, member, stage
from tests.worker.training_play import Play, Server, opened


@pytest.fixture
async def play(tmp_path):
    async with stage(tmp_path, peers=(SERVER, "serv-2")) as here:
        yield Play(here)


async def delivered(play) -> Server:
    """Deliver one update to the first server; returns the second, which has heard of nothing."""
    second = Server(play.here.peers["serv-2"], play.here.runtime, play.here.directory / "held-2")
    play.see(opened())
    assert await play.session.send(play.update(samples=3)) == bridge.SendAccepted()
    return second


async def test_a_server_that_replaces_another_in_the_open_round_gets_the_update_again(autojump_clock, play):
    second = await delivered(play)
    play.see(opened(2, servers=(member("serv-2"),)))
    await trio.sleep(60)
    assert [push.contribution for push in second.pushed] == [play.server.pushed[0].contribution]
    assert (second.pushed[0].view, len(play.server.pushed)) == (2, 1)


async def test_an_update_of_a_round_that_is_over_is_not_sent_again(autojump_clock, play):
    second = await delivered(play)
    play.see(opened(2, round=2, base_digest=digest_of("model 1"), servers=(member("serv-2"),)))
    await trio.sleep(60)
    assert second.pushed == []
