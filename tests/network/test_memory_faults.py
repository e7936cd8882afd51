"""What the in-memory network does to those who use it: loss, repetition, partitions, crashes, stops, slowness."""

from contextlib import suppress

import pytest
import trio

from hypha.errors import LocalProtocolError, PeerUnreachable
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.protocol.messages import TOPIC_WORKER, Ack, FetchSlice
from tests.network.cast import CHUNK, ack, advertisement, fetch, receive_all, status


def counting(calls: list[str]):
    async def count(peer, message):
        calls.append(message.reason)
        await trio.lowlevel.checkpoint()
        return Ack()

    return count


async def asked(network, peer_id: str, count: int) -> int:
    """How many of so many requests, one after the other, were answered."""
    answered = 0
    for number in range(count):
        with suppress(PeerUnreachable):
            answered += await network.request(peer_id, status(str(number))) == Ack()
    return answered


async def test_a_message_takes_its_time_both_ways(autojump_clock):
    fabric = MemoryFabric(1, FaultProfile(latency_s=0.25, bandwidth=1000.0))
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), ack)
        started = trio.current_time()
        await a.request("b", status("x" * 1000))
        assert 1.5 < trio.current_time() - started < 2.0


async def test_a_lost_message_is_silence_until_the_connection_times_out(autojump_clock):
    fabric = MemoryFabric(1, FaultProfile(loss=1.0, break_after_s=7.0))
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), ack)
        started = trio.current_time()
        with pytest.raises(PeerUnreachable, match="b"):
            await a.request("b", status())
        assert trio.current_time() - started == pytest.approx(7.0)
        with trio.move_on_after(1.0) as patience:
            await a.request("b", status())
        assert patience.cancelled_caught


async def test_lost_requests_and_lost_answers_look_the_same_to_the_asker(autojump_clock):
    fabric, calls = MemoryFabric(5, FaultProfile(loss=0.3)), []
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), counting(calls))
        answered = await asked(a, "b", 100)
    assert 35 < answered < 65  # 0.7 squared
    assert len(calls) > answered  # some were handled whose answer was lost


async def test_a_repeated_request_is_handled_twice_and_answered_once(autojump_clock):
    fabric, calls = MemoryFabric(2, FaultProfile(duplication=1.0)), []
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), counting(calls))
        assert await a.request("b", status("once")) == Ack()
        await trio.sleep(10)
    assert calls == ["once", "once"]


async def test_late_messages_overtake_one_another(autojump_clock):
    fabric, calls = MemoryFabric(3, FaultProfile(reordering=0.5)), []
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), counting(calls))
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(a.request, "b", status(f"{number:02}"))
                await trio.sleep(0.01)
    assert calls != sorted(calls)
    assert len(calls) == 20


async def test_a_request_that_its_sender_gave_up_is_handled_all_the_same(autojump_clock):
    fabric, calls = MemoryFabric(4, FaultProfile(latency_s=5.0)), []
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), counting(calls))
        with trio.move_on_after(1.0):
            await a.request("b", status("late"))
        await trio.sleep(10)
    assert calls == ["late"]


async def test_a_one_way_partition_lets_requests_through_and_no_answers(autojump_clock):
    fabric, calls = MemoryFabric(6, FaultProfile(break_after_s=3.0)), []
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), counting(calls))
        fabric.partition("b", "a", one_way=True)
        assert await asked(a, "b", 2) == 0
        assert len(calls) == 2
        fabric.partition("a", "b")
        assert await asked(a, "b", 2) == 0
        assert len(calls) == 2
        fabric.heal()
        assert await asked(a, "b", 2) == 2


async def test_a_partition_takes_what_is_under_way(autojump_clock):
    fabric, calls = MemoryFabric(6, FaultProfile(latency_s=1.0)), []
    async with fabric.node("a") as a, fabric.node("b") as b, trio.open_nursery() as nursery:
        b.serve(type(status()), counting(calls))
        nursery.start_soon(asked, a, "b", 1)
        await trio.sleep(0.5)
        fabric.partition("a", "b")
        await trio.sleep(1)
        fabric.heal()
    assert calls == []


async def test_healing_may_name_whom(autojump_clock):
    fabric = MemoryFabric(6, FaultProfile(break_after_s=3.0))
    async with fabric.node("a") as a, fabric.node("b") as b, fabric.node("c") as c:
        for network in (b, c):
            network.serve(type(status()), ack)
            fabric.partition("a", network.peer_id)
        fabric.heal("a", "b")
        assert (await asked(a, "b", 1), await asked(a, "c", 1)) == (1, 0)
        fabric.heal("c")
        assert await asked(a, "c", 1) == 1


async def test_gossip_finds_a_way_round_a_partition_of_two(autojump_clock):
    fabric = MemoryFabric(7)
    async with fabric.node("a") as a, fabric.node("b") as b, b.subscribe(TOPIC_WORKER) as heard:
        fabric.partition("a", "b")
        await a.publish(TOPIC_WORKER, advertisement(1))
        async with fabric.node("c"):
            await a.publish(TOPIC_WORKER, advertisement(2))
            _, message = await anext(heard)
    assert message.advertisement_id == "ad-2"


async def test_gossip_is_lost_and_repeated_by_chance(autojump_clock):
    fabric, numbers = MemoryFabric(8, FaultProfile(gossip_loss=0.3, gossip_duplication=0.3)), []
    async with fabric.node("a", {"scheduler"}) as a, fabric.node("b") as b, b.subscribe(TOPIC_WORKER) as heard:
        for number in range(100):
            await a.publish(TOPIC_WORKER, advertisement(number))
        with trio.move_on_after(5):
            async for signer, message in heard:
                assert (signer.peer_id, signer.roles) == ("a", frozenset({"scheduler"}))
                numbers.append(message.advertisement_id)
    assert 50 < len(set(numbers)) < 90
    assert len(numbers) > len(set(numbers))


async def test_a_crash_cancels_the_node_and_is_noticed_at_once_unless_silent(autojump_clock):
    for silent, noticed_after_s in ((False, 0.002), (True, 20.0)):
        fabric, ends = MemoryFabric(9), []

        async def hold(_peer, _message, ends=ends):
            try:
                await trio.sleep_forever()
            finally:
                ends.append("handler")

        async def live(fabric=fabric, hold=hold, ends=ends, *, task_status):
            async with fabric.node("b") as b:
                b.serve(type(status()), hold)
                task_status.started()
                await trio.sleep_forever()
            ends.append("body")

        async with fabric.node("a") as a, trio.open_nursery() as nursery:
            await nursery.start(live)
            nursery.start_soon(crash_later, fabric, silent)
            with pytest.raises(PeerUnreachable):
                await a.request("b", status())
            assert sorted(ends) == ["body", "handler"]
            started = trio.current_time()
            with pytest.raises(PeerUnreachable):
                await a.request("b", status())
            assert trio.current_time() - started == pytest.approx(noticed_after_s)


async def crash_later(fabric, silent) -> None:
    await trio.sleep(1)
    fabric.crash("b", silent=silent)


async def test_a_crashed_node_starts_again_and_late_answers_do_not_confuse_it(autojump_clock):
    fabric = MemoryFabric(10, FaultProfile(latency_s=1.0))
    async with fabric.node("b") as b:
        b.serve(type(status()), ack)
        async with trio.open_nursery() as nursery:

            async def first_life():
                async with fabric.node("a") as a:
                    await a.request("b", status())

            nursery.start_soon(first_life)
            await trio.sleep(1.5)  # the answer is on its way
            fabric.crash("a")
        async with fabric.node("a") as a:
            assert await a.request("b", status()) == Ack()


async def test_only_what_is_up_crashes_and_only_what_is_down_starts(autojump_clock):
    fabric = MemoryFabric(11)
    with pytest.raises(LocalProtocolError):
        fabric.crash("a")
    async with fabric.node("a"):
        with pytest.raises(LocalProtocolError):
            async with fabric.node("a"):
                pass


async def test_a_stopped_node_answers_when_it_runs_again(autojump_clock):
    fabric, calls = MemoryFabric(12, FaultProfile(break_after_s=100.0)), []
    async with fabric.node("a") as a, fabric.node("b") as b, trio.open_nursery() as nursery:
        b.serve(type(status()), counting(calls))
        fabric.stop("b")
        nursery.start_soon(a.request, "b", status("x"))
        await trio.sleep(50)
        assert calls == []
        fabric.go("b")
        await trio.sleep(1)
        assert calls == ["x"]


async def test_a_stopped_node_can_be_killed_and_runs_when_started_again(autojump_clock):
    fabric, ended_at = MemoryFabric(12), []

    async def live():
        async with fabric.node("a") as a:
            while True:
                await a.find_providers("nobody's", wanted=1)
        ended_at.append(trio.current_time() - started)

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await trio.sleep(1)
        fabric.stop("a")
        await trio.sleep(10)
        fabric.crash("a")
    assert ended_at == [pytest.approx(11)]
    async with fabric.node("a") as a, fabric.node("b") as b:
        b.serve(type(status()), ack)
        assert await a.request("b", status()) == Ack()


async def test_a_stopped_node_does_not_notice_its_own_timeouts_until_it_runs_again(autojump_clock):
    fabric = MemoryFabric(13)
    noticed_at = []

    async def impatient(a):
        with trio.move_on_after(5):
            await a.request("b", status())
        noticed_at.append(trio.current_time() - started)

    async with fabric.node("a") as a, fabric.node("b"), trio.open_nursery() as nursery:
        started = trio.current_time()
        fabric.stop("b")
        nursery.start_soon(impatient, a)
        await trio.sleep(1)
        fabric.stop("a")
        await trio.sleep(60)
        assert noticed_at == []
        fabric.go("a")
        fabric.go("b")
    assert noticed_at == [pytest.approx(61)]


async def test_a_stream_has_the_bandwidth_of_its_link(autojump_clock):
    fabric = MemoryFabric(14, FaultProfile(bandwidth=1e6))
    async with fabric.node("a") as a, fabric.node("b") as b:

        async def serve(stream, _header):
            for _ in range(10):
                await stream.send_all(CHUNK)

        b.accept_streams(FetchSlice, serve)
        stream = await a.open_stream("b", fetch())
        await stream.send_eof()
        started = trio.current_time()
        assert len(await receive_all(stream)) == 10 * len(CHUNK)
        assert trio.current_time() - started == pytest.approx(10.49, abs=0.1)
        await stream.aclose()


async def read_until_it_breaks(fabric, disturb) -> float:
    async with fabric.node("a") as a, fabric.node("b") as b, trio.open_nursery() as nursery:

        async def serve(stream, _header):
            while True:
                await stream.send_all(CHUNK)

        b.accept_streams(FetchSlice, serve)
        stream = await a.open_stream("b", fetch())
        nursery.start_soon(disturb)
        with pytest.raises(PeerUnreachable):
            await receive_all(stream)
        nursery.cancel_scope.cancel()
        return trio.current_time()


async def test_a_partition_breaks_a_stream_after_a_while(autojump_clock):
    fabric = MemoryFabric(15, FaultProfile(bandwidth=1e6, break_after_s=5.0))

    async def cut():
        await trio.sleep(3)
        fabric.partition("a", "b", one_way=True)

    started = trio.current_time()
    assert 8 <= await read_until_it_breaks(fabric, cut) - started < 20


async def test_streams_break_by_chance(autojump_clock):
    fabric = MemoryFabric(16, FaultProfile(stream_break=0.01))
    assert await read_until_it_breaks(fabric, trio.sleep_forever) > 0


async def test_a_short_partition_only_delays_a_stream(autojump_clock):
    fabric = MemoryFabric(17, FaultProfile(break_after_s=5.0))
    async with fabric.node("a") as a, fabric.node("b") as b:

        async def serve(stream, _header):
            for _ in range(3):
                await stream.send_all(CHUNK)
                await trio.sleep(1)

        b.accept_streams(FetchSlice, serve)
        stream = await a.open_stream("b", fetch())
        await stream.send_eof()
        await stream.receive_some(1)
        fabric.partition("a", "b")
        async with trio.open_nursery() as nursery:

            async def heal():
                await trio.sleep(4)
                fabric.heal()

            nursery.start_soon(heal)
            assert len(await receive_all(stream)) == 3 * len(CHUNK) - 1
        await stream.aclose()


async def test_a_providers_record_comes_late_and_outlives_it_for_a_while(autojump_clock):
    fabric = MemoryFabric(18, FaultProfile(dht_delay_s=5.0, dht_record_s=30.0))
    async with fabric.node("a") as a, fabric.node("g"):
        async with fabric.node("b") as b:
            await b.provide("d")
            assert await a.find_providers("d", wanted=3) == []
            await trio.sleep(5)
            assert await a.find_providers("d", wanted=3) == ["b"]
        assert await a.find_providers("d", wanted=3) == ["b"]
        await trio.sleep(30)
        assert await a.find_providers("d", wanted=3) == []


async def test_who_is_cut_off_from_everybody_finds_nothing(autojump_clock):
    fabric = MemoryFabric(19)
    async with fabric.node("a") as a, fabric.node("b") as b:
        await b.provide("d")
        fabric.partition("a", "b", one_way=True)
        assert await a.find_providers("d", wanted=3) == []
        fabric.heal()
        assert await a.find_providers("d", wanted=3) == ["b"]
