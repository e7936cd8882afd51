"""Patience: how waits grow, what is asked again, and what is not."""

import pytest
import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.memory import MemoryFabric
from hypha.network.retry import Backoff, attempt, insist
from hypha.protocol.messages import Ack, JobStatus
from tests.network.cast import status
from tests.sim.virtual import VirtualRuntime


def backoff(seed: int = 1) -> Backoff:
    return Backoff(VirtualRuntime(seed, "a"), base_s=0.25, max_s=8.0)


def test_waits_double_up_to_the_longest_and_lie_in_the_upper_half():
    waits = [pause.next_s() for pause in [backoff()] for _ in range(50)]
    ceilings = [min(8.0, 0.25 * 2**n) for n in range(50)]
    assert all(ceiling / 2 <= wait <= ceiling for wait, ceiling in zip(waits, ceilings, strict=True))
    assert len(set(waits)) == 50


def test_waits_start_over_after_a_success():
    pause = backoff()
    for _ in range(10):
        pause.next_s()
    pause.reset()
    assert pause.next_s() <= 0.25


class Scene:
    """`a` asks, `b` answers what the script says: a message, or an exception."""

    def __init__(self, fabric: MemoryFabric, a, b) -> None:
        self.fabric, self.a = fabric, a
        self.script: list[object] = []
        self.asked = 0
        b.serve(JobStatus, self._answer)

    async def _answer(self, _peer, _message):
        self.asked += 1
        answer = self.script.pop(0) if self.script else Ack()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def insist(self, still_wanted=lambda: True):
        return await insist(self.a, "b", status(), backoff=backoff(), patience_s=5.0, still_wanted=still_wanted)


@pytest.fixture
async def scene(nursery):
    fabric = MemoryFabric(1)
    async with fabric.node("a", {"worker"}) as a, fabric.node("b", {"scheduler"}) as b:
        yield Scene(fabric, a, b)


async def test_silence_is_unreachable_after_the_patience(autojump_clock, scene):
    scene.fabric.partition("a", "b")
    before = trio.current_time()
    with pytest.raises(PeerUnreachable, match="b did not answer JobStatus within 2 s"):
        await attempt(scene.a, "b", status(), patience_s=2.0)
    assert trio.current_time() - before == 2.0


async def test_it_asks_until_there_is_an_answer(autojump_clock, scene):
    scene.script = [Refused("not yet", "retry"), Refused("too many", "busy"), Refused("not yet", "retry"), Ack()]
    assert await scene.insist() == Ack()
    assert scene.asked == 4


async def test_it_asks_again_when_the_network_is_back(autojump_clock, scene):
    scene.fabric.partition("a", "b")

    async def heal() -> None:
        await trio.sleep(20)
        scene.fabric.heal()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal)
        started = trio.current_time()
        assert await scene.insist() == Ack()
    assert 20 <= trio.current_time() - started < 35


@pytest.mark.parametrize("final", [Refused("no such lease"), Refused("old", "stale")])
async def test_a_no_that_will_not_change_is_raised(autojump_clock, scene, final):
    scene.script = [final]
    with pytest.raises(Refused, match=str(final)):
        await scene.insist()
    assert scene.asked == 1


async def test_a_broken_answer_is_raised(autojump_clock, scene):
    scene.script = [status()]
    with pytest.raises(RemoteProtocolError):
        await scene.insist()


async def test_it_stops_when_nobody_wants_the_answer_any_more(autojump_clock, scene):
    scene.script = [Refused("not yet", "retry")] * 100
    assert await scene.insist(lambda: scene.asked < 3) is None
    assert scene.asked == 3
