"""Circuit breakers: when a peer is left alone, who tries it first, and what closes them."""

import pytest
import trio

from hypha.network.breaker import PEERS_MAX, Breaker, BreakerLimits, Breakers
from hypha.network.memory import MemoryFabric
from hypha.network.outbox import Outbox
from hypha.network.retry import Backoff
from hypha.protocol.messages import Ack, JobStatus
from tests.network.cast import status
from tests.sim.virtual import VirtualRuntime

LIMITS = BreakerLimits(failures=3, open_s=10.0)


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(LIMITS)
    assert [breaker.failed(at) for _ in range(3)] == [False, False, True]
    return breaker


def test_it_opens_after_so_many_failures_in_a_row():
    breaker = Breaker(LIMITS)
    breaker.failed(1.0)
    breaker.failed(2.0)
    assert breaker.admit(2.0) == 0.0
    assert breaker.failed(3.0)
    assert breaker.admit(4.0) == 9.0


def test_half_open_lets_one_through_and_the_others_wait_for_it():
    breaker = opened(at=0.0)
    assert breaker.admit(10.0) == 0.0
    assert breaker.admit(10.0) == 10.0
    # Nothing was heard of the one that went: another may go.
    assert breaker.admit(20.0) == 0.0


def test_a_failure_while_half_open_opens_it_again_at_once_and_is_no_news():
    breaker = opened(at=0.0)
    breaker.admit(10.0)
    assert not breaker.failed(12.0)
    assert breaker.admit(12.0) == 10.0


@pytest.mark.parametrize("limits", [{"failures": 0}, {"open_s": 0.0}])
def test_limits_are_bounded(limits):
    import msgspec

    with pytest.raises(msgspec.ValidationError, match=next(iter(limits))):
        msgspec.convert(limits, BreakerLimits)


async def test_whoever_waits_goes_as_soon_as_the_peer_is_heard_from(autojump_clock, nursery):
    breakers = Breakers(VirtualRuntime(1, "a"), LIMITS)
    for _ in range(3):
        breakers.failed("b")
    went = []

    async def go() -> None:
        await breakers.admitted("b")
        went.append(trio.current_time())

    began = trio.current_time()
    nursery.start_soon(go)
    nursery.start_soon(go)
    await trio.sleep(4.0)
    assert went == []
    breakers.worked("b")
    await trio.sleep(0.1)
    assert went == [began + 4.0] * 2


async def test_other_peers_are_not_concerned_and_their_number_is_bounded():
    breakers = Breakers(VirtualRuntime(1, "a"), BreakerLimits(failures=1, open_s=10.0))
    for number in range(PEERS_MAX + 1):
        breakers.failed(f"peer-{number}")
    assert breakers.admit("somebody else") == 0.0
    assert breakers.admit(f"peer-{PEERS_MAX}") > 0.0
    assert breakers.admit("peer-0") == 0.0


async def test_an_outbox_leaves_a_silent_peer_alone_whatever_the_kind_and_reaches_it_once_it_is_back(
    autojump_clock, nursery
):
    runtime, fabric = VirtualRuntime(1, "a"), MemoryFabric(1)
    tried, took = [], []
    fabric.on_event(lambda event: tried.append(event) if "JobStatus" in str(event) else None)

    async def take(_peer, message):
        took.append(message.reason)
        return Ack()

    async with fabric.node("a", {"worker"}) as a:
        outbox = Outbox(
            a,
            backoff=lambda: Backoff(runtime, base_s=0.1, max_s=0.2),
            patience_s=1.0,
            breakers=Breakers(runtime, BreakerLimits(failures=4, open_s=30.0)),
        )
        nursery.start_soon(outbox.run)
        outbox.put("b", "one", status("one"))
        outbox.put("b", "two", status("two"))
        await trio.sleep(60.0)
        assert 4 <= len(tried) <= 8
        async with fabric.node("b") as b:
            b.serve(JobStatus, take)
            await trio.sleep(31.0)
            assert sorted(took) == ["one", "two"]
