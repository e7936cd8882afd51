"""Messages that must arrive: repeated until answered, superseded by newer ones, and nobody waits for anybody else."""

import logging

import pytest
import trio

from hypha.errors import Refused, RemoteProtocolError
from hypha.network.memory import MemoryFabric
from hypha.network.outbox import Outbox
from hypha.network.retry import Backoff
from hypha.protocol.messages import Ack, JobStatus
from tests.network.cast import status
from tests.sim.virtual import VirtualRuntime


class Scene:
    """`a` has an outbox; `b` and `c` take what comes, after the script's refusals."""

    def __init__(self, fabric: MemoryFabric, a) -> None:
        self.fabric = fabric
        self.took: dict[str, list[str]] = {}
        self.refusals: list[Refused] = []
        self.answers: list[tuple[str, str, object]] = []
        runtime = VirtualRuntime(1, "a")
        self.outbox = Outbox(
            a,
            backoff=lambda: Backoff(runtime, base_s=0.25, max_s=2.0),
            patience_s=5.0,
            answered=lambda peer_id, message, answer: self.answers.append((peer_id, message.reason, answer)),
        )

    def listen(self, network) -> None:
        took = self.took[network.peer_id] = []

        async def take(_peer, message):
            if self.refusals:
                raise self.refusals.pop(0)
            took.append(message.reason)
            return Ack()

        network.serve(JobStatus, take)


@pytest.fixture
async def scene(nursery):
    fabric = MemoryFabric(1)
    async with fabric.node("a", {"worker"}) as a, fabric.node("b") as b, fabric.node("c") as c:
        made = Scene(fabric, a)
        made.listen(b)
        made.listen(c)
        nursery.start_soon(made.outbox.run)
        yield made


async def test_what_is_put_arrives_once_and_its_answer_is_told(autojump_clock, scene):
    scene.outbox.put("b", "view", status("one"))
    await trio.sleep(10)
    assert scene.took["b"] == ["one"]
    assert scene.answers == [("b", "one", Ack())]


async def test_what_was_put_before_it_ran_arrives_too(autojump_clock):
    fabric = MemoryFabric(1)
    async with fabric.node("a") as a, fabric.node("b") as b, trio.open_nursery() as nursery:
        scene = Scene(fabric, a)
        scene.listen(b)
        scene.outbox.put("b", "view", status("early"))
        nursery.start_soon(scene.outbox.run)
        await trio.sleep(1)
        assert scene.took["b"] == ["early"]
        nursery.cancel_scope.cancel()


async def test_it_is_repeated_until_the_peer_can_take_it(autojump_clock, scene):
    scene.refusals = [Refused("not yet", "retry")] * 5
    scene.outbox.put("b", "view", status("one"))
    await trio.sleep(15)
    assert (scene.refusals, scene.took["b"]) == ([], ["one"])


async def test_a_newer_one_supersedes_what_waits_under_the_same_key(autojump_clock, scene):
    scene.fabric.partition("a", "b")
    for number in range(5):
        scene.outbox.put("b", "view", status(f"view {number}"))
        await trio.sleep(3)
    scene.outbox.put("b", "ready", status("ready"))
    scene.fabric.heal()
    await trio.sleep(20)
    assert sorted(scene.took["b"]) == ["ready", "view 4"]


async def test_a_peer_that_is_away_holds_up_nobody_else(autojump_clock, scene):
    scene.fabric.partition("a", "b")
    scene.outbox.put("b", "view", status("for b"))
    scene.outbox.put("c", "view", status("for c"))
    await trio.sleep(1)
    assert (scene.took["b"], scene.took["c"]) == ([], ["for c"])


async def test_what_is_for_a_dropped_peer_is_given_up(autojump_clock, scene):
    scene.fabric.partition("a", "b")
    scene.outbox.put("b", "view", status("one"))
    await trio.sleep(3)
    scene.outbox.drop("b")
    scene.fabric.heal()
    await trio.sleep(60)
    assert scene.took["b"] == []
    scene.outbox.put("b", "view", status("two"))
    await trio.sleep(1)
    assert scene.took["b"] == ["two"]


async def test_a_final_no_ends_that_message_alone(autojump_clock, scene):
    scene.refusals = [Refused("no such lease")]
    scene.outbox.put("b", "view", status("one"))
    await trio.sleep(5)
    scene.outbox.put("b", "view", status("two"))
    await trio.sleep(5)
    assert (scene.took["b"], [answer[1] for answer in scene.answers]) == (["two"], ["two"])


@pytest.mark.parametrize(("code", "level"), [("refused", logging.INFO), ("stale", logging.DEBUG)])
async def test_a_no_is_said_but_not_that_something_was_overtaken(autojump_clock, scene, caplog, code, level):
    scene.refusals = [Refused("round 3 is over", code)]
    with caplog.at_level(logging.DEBUG, logger="hypha.network.outbox"):
        scene.outbox.put("b", "view", status("one"))
        await trio.sleep(5)
    assert [record.levelno for record in caplog.records if record.message == "Message refused"] == [level]


class Broken:
    """A network on which every answer breaks the protocol."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def request(self, peer_id, _message):
        self.asked.append(peer_id)
        raise RemoteProtocolError(f"{peer_id} answered JobStatus badly")


async def test_a_broken_answer_is_logged_and_stops_nobody(autojump_clock, nursery, caplog):
    network, runtime = Broken(), VirtualRuntime(1, "a")
    outbox = Outbox(network, backoff=lambda: Backoff(runtime, base_s=0.25, max_s=2.0), patience_s=5.0)
    nursery.start_soon(outbox.run)
    outbox.put("b", "view", status("one"))
    await trio.sleep(5)
    outbox.put("c", "view", status("two"))
    await trio.sleep(5)
    assert network.asked == ["b", "c"]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "Message answered badly"
    ] * 2
