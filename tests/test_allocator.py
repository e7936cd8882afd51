"""The allocator leases what was asked for, or says in numbers what is missing and holds nothing; in virtual time."""

from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio

from hypha.errors import Refused
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.network.retry import Backoff
from hypha.protocol.auction import GATHER_S, SETTLE_S, OfferConfig
from hypha.protocol.messages import TOPIC_WORKER
from hypha.protocol.resources import Resources
from hypha.scheduler.allocator import Allocation, Allocator, Wanted
from hypha.telemetry import inject, span_from, start
from hypha.telemetry.logs import FIELDS
from tests.lease_cast import AGGREGATE, ONE_CPU, TRAIN, Cast, Scheduler, offered
from tests.telemetry.conftest import Config as TelemetryConfig

WELCOME_S = 2.0
RETRY_S = 1.0
DEAR = OfferConfig(strategy="whole", price=140)


@pytest.fixture
def cast() -> Cast:
    return Cast(MemoryFabric("allocator"))


def allocator(scheduler: Scheduler, **options: Any) -> Allocator:
    return Allocator(
        scheduler.network,
        scheduler.runtime,
        scheduler.pool,
        job_id=f"job of {scheduler.network.peer_id}",
        job_epoch=1,
        welcome_s=WELCOME_S,
        retry_s=RETRY_S,
        **options,
    )


def wanted(work: str = "train", count: int = 1, *, minimum: int = 0, bid: float = 100, limit: float = 120) -> Wanted:
    executor = {"train": TRAIN.name, "aggregate": AGGREGATE.name}[work]
    return Wanted(work=work, executor=executor, resources=ONE_CPU, count=count, minimum=minimum, bid=bid, limit=limit)


def leased(allocation: Allocation) -> list[tuple[str, str, float]]:
    return sorted((each.work, each.member.peer_id, each.price) for each in allocation.workers)


async def workers(cast: Cast, stack: AsyncExitStack, *names: str, **options):
    return [await stack.enter_async_context(cast.worker(name, **options)) for name in names]


async def test_training_workers_and_parameter_servers_come_from_one_auction(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        (server,) = await workers(cast, stack, "ps", executors=(AGGREGATE,))
        trainers = await workers(cast, stack, "w-1", "w-2", "w-3")
        scheduler = await stack.enter_async_context(cast.scheduler())
        began = trio.current_time()
        allocation = await allocator(scheduler).allocate([wanted("train", 3), wanted("aggregate")])
        took_s = trio.current_time() - began
        assert leased(allocation) == [
            ("aggregate", "ps", 100),
            ("train", "w-1", 100),
            ("train", "w-2", 100),
            ("train", "w-3", 100),
        ]
        assert allocation.shortfall is None
        assert scheduler.pool.live() == list(allocation.workers)
        assert all(worker.leases() == [("s", "renewable")] for worker in [server, *trainers])
        # Nothing on the path waits but the workers' window and the scheduler's last moment for a better offer.
        assert took_s == pytest.approx(GATHER_S + SETTLE_S, abs=0.02)


async def test_losers_are_free_again_at_once(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        everybody = await workers(cast, stack, "w-1", "w-2", "w-3")
        scheduler = await stack.enter_async_context(cast.scheduler())
        allocation = await allocator(scheduler).allocate([wanted("train", 1)])
        await trio.sleep(0.05)
        assert len(allocation.workers) == 1
        assert sum((worker.free == Resources(cpu=1)) for worker in everybody) == 2


async def test_an_offer_from_a_fence_counter_that_went_back_is_refused_with_what_to_do(cast, autojump_clock, caplog):
    async with AsyncExitStack() as stack:
        went_back, sound = await workers(cast, stack, "w-1", "w-2", executors=(TRAIN,))
        scheduler = await stack.enter_async_context(cast.scheduler())
        before = {"w-1": 10**6, "w-2": 0, "w-9": 10**6}
        allocation = await allocator(scheduler, fences=lambda: before).allocate([wanted("train", 2)])
        assert leased(allocation) == [("train", "w-2", 100)]
        assert (went_back.leases(), sound.leases()) == ([], [("s", "renewable")])
    said = [getattr(r, FIELDS) for r in caplog.records if r.getMessage() == "A worker's fences went back"]
    assert [(each["worker"], "is not above 1000000" in each["reason"]) for each in said] == [("w-1", True)]
    assert "new key" in said[0]["reason"]


async def test_what_is_missing_is_said_in_numbers(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        await workers(cast, stack, "w-1", executors=(TRAIN,))
        (dear,) = await workers(cast, stack, "w-2", executors=(TRAIN,), offer=DEAR)
        scheduler = await stack.enter_async_context(cast.scheduler())
        allocation = await allocator(scheduler).allocate([wanted("train", 2), wanted("aggregate")])
        assert allocation.shortfall == (
            "1 of 2 train workers; best refused offer 140 > max 120; 0 of 1 aggregate workers"
        )
        assert leased(allocation) == [("train", "w-1", 100)]
        assert dear.leases() == []


async def test_below_the_minimum_nothing_stays_leased(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        everybody = await workers(cast, stack, "w-1", "w-2", executors=(TRAIN,))
        scheduler = await stack.enter_async_context(cast.scheduler())
        asks = [wanted("train", 2, minimum=2), wanted("aggregate", minimum=1)]
        allocation = await allocator(scheduler).allocate(asks)
        await trio.sleep(0.05)
        assert (allocation.workers, allocation.shortfall) == ((), "0 of 1 aggregate workers")
        assert [worker.leases() for worker in everybody] == [[], []]


async def test_winners_are_released_when_another_winner_falls_away(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        everybody = await workers(cast, stack, "w-1", "w-2")
        scheduler = await stack.enter_async_context(cast.scheduler())
        allocation = None

        async def allocate():
            nonlocal allocation
            allocation = await allocator(scheduler).allocate([wanted("train", 2, minimum=2)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(allocate)
            await trio.sleep(GATHER_S + SETTLE_S / 2)  # both have offered
            (offer,) = everybody[1].ledger.leases(everybody[1].runtime.now())
            everybody[1].ledger.revoke(offer.lease_id, reason="shutting down", now=everybody[1].runtime.now())
        assert allocation.workers == ()
        assert allocation.shortfall == "train worker w-2 not leased: revoked: shutting down"
        assert everybody[0].leases() == []
        assert (scheduler.pool.live(), scheduler.deaths) == ([], [])


async def test_without_anybody_it_gives_up_when_offers_are_not_welcome_any_more(cast, autojump_clock):
    async with cast.scheduler() as scheduler:
        began = trio.current_time()
        allocation = await allocator(scheduler).allocate([wanted("train", 2)])
        assert allocation == Allocation(workers=(), shortfall="0 of 2 train workers")
        assert trio.current_time() - began == pytest.approx(WELCOME_S, abs=0.01)


@pytest.mark.parametrize("early", [(), ("early",)], ids=["nobody heard", "one heard"])
async def test_an_advertisement_not_heard_by_enough_is_repeated_in_the_same_auction(cast, autojump_clock, early):
    async with AsyncExitStack() as stack:
        await workers(cast, stack, *early)
        scheduler = await stack.enter_async_context(cast.scheduler())
        outcome = []

        async def allocate():
            outcome.append(await allocator(scheduler).allocate([wanted("train", 1 + len(early))]))
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(allocate)
            await trio.sleep(0.1)
            async with cast.worker("late"):
                await trio.sleep_forever()
        assert leased(outcome[0]) == [("train", name, 100) for name in (*early, "late")]


async def test_distinct_peers_are_preferred_over_those_held_already(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        await workers(cast, stack, "a", cpu=2)
        scheduler = await stack.enter_async_context(cast.scheduler())
        auctions = allocator(scheduler)
        first = await auctions.allocate([wanted("train")])
        await workers(cast, stack, "b")
        second = await auctions.allocate([wanted("train")])
        assert (leased(first), leased(second)) == ([("train", "a", 100)], [("train", "b", 100)])


async def test_an_auction_given_up_at_any_moment_leaves_nothing_leased(autojump_clock):
    cast = Cast(MemoryFabric("given up", FaultProfile(latency_s=0.002, jitter_s=0.008)))
    async with AsyncExitStack() as stack:
        everybody = await workers(cast, stack, "w-1", "w-2")
        scheduler = await stack.enter_async_context(cast.scheduler())
        auctions = allocator(scheduler)
        half_done = 0
        for after_ms in range(190, 290):
            with trio.move_on_after(after_ms / 1000) as scope:
                await auctions.allocate([wanted("train", 2)])
            half_done += [worker.leases() for worker in everybody].count([("s", "renewable")]) == 1
            if not scope.cancelled_caught:
                await scheduler.pool.release_all("done")
            await trio.sleep(0.1)
            assert [worker.leases() for worker in everybody] == [[], []]
            assert scheduler.pool.live() == []
        assert half_done > 0


async def test_offers_come_from_workers_and_to_auctions_only(cast, autojump_clock):
    async with (
        cast.worker("w", cpu=2) as worker,
        cast.scheduler() as scheduler,
        cast.fabric.node("x", {"data"}) as stranger,
    ):
        await allocator(scheduler).allocate([wanted("train")])
        offer = offered(worker, "s")
        with pytest.raises(Refused, match="WorkerOffer is for the role worker"):
            await stranger.request("s", offer)
        with pytest.raises(Refused, match="advertisement none is over"):
            await worker.network.request("s", offer)
        assert len(scheduler.pool.live()) == 1


async def test_an_offer_repeated_while_it_is_being_accepted_changes_nothing(autojump_clock):
    # The second copy of each message comes one latency after the first: the offer's after the auction has closed.
    cast = Cast(MemoryFabric("twice", FaultProfile(latency_s=1.2 * SETTLE_S, duplication=1.0)))
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        allocation = await allocator(scheduler).allocate([wanted("train")])
        await trio.sleep(1)
        assert scheduler.pool.live() == list(allocation.workers) != []
        assert worker.leases() == [("s", "renewable")]


@pytest.mark.parametrize("seed", range(5))
async def test_two_schedulers_that_need_all_workers_do_not_starve_each_other(autojump_clock, seed):
    cast = Cast(MemoryFabric(f"rivals-{seed}"))
    async with AsyncExitStack() as stack:
        await workers(cast, stack, "w-1", "w-2")
        rivals = [await stack.enter_async_context(cast.scheduler(name)) for name in ("s-1", "s-2")]
        served = []

        async def job(scheduler):
            auctions, backoff = allocator(scheduler), Backoff(scheduler.runtime, base_s=RETRY_S, max_s=8 * RETRY_S)
            while not (allocation := await auctions.allocate([wanted("train", 2, minimum=2)])).workers:
                await backoff.wait()
            served.append(len(allocation.workers))
            await trio.sleep(1)
            await scheduler.pool.release_all("the job is done")

        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 120
            for rival in rivals:
                nursery.start_soon(job, rival)
        assert served == [2, 2]


async def test_the_fraction_asked_doubles_until_it_suffices(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(cast.scheduler())
        heard = []
        listener = await stack.enter_async_context(cast.fabric.node("ear", {"worker"}))
        announcements = await stack.enter_async_context(listener.subscribe(TOPIC_WORKER))
        nursery = await stack.enter_async_context(trio.open_nursery())

        async def listen():
            async for _, message in announcements:
                heard.append((message.advertisement_id, message.fraction))

        nursery.start_soon(listen)
        auctions = allocator(scheduler, first_fraction=0.2)
        for _ in range(4):
            await auctions.allocate([wanted("train")])
        nursery.cancel_scope.cancel()
        assert list(dict(heard).values()) == [0.2, 0.4, 0.8, 1.0]


async def test_after_one_auction_only_as_many_are_asked_as_are_needed(cast, autojump_clock):
    async with AsyncExitStack() as stack:
        everybody = await workers(cast, stack, *(f"w-{number}" for number in range(80)))
        scheduler = await stack.enter_async_context(cast.scheduler())
        auctions, offers = allocator(scheduler), []
        cast.fabric.on_event(lambda event: offers.append(event) if event[3:] == ("WorkerOffer", "arrived") else None)
        for _ in range(2):
            before = len(offers)
            allocation = await auctions.allocate([wanted("train", 2)])
            assert len(allocation.workers) == 2
            await trio.sleep(1)
            await scheduler.pool.release_all("done")
        assert before == len(everybody)
        assert 2 < len(offers) - before < len(everybody) / 2


async def test_one_trace_leads_from_the_advertisement_to_the_accepted_offer(cast, autojump_clock, monkeypatch):
    running = start("hypha-scheduler", TelemetryConfig(), environ={})
    try:
        traces = {}
        async with cast.worker("w") as worker, cast.scheduler() as scheduler:
            for network in (worker.network, scheduler.network):
                monkeypatch.setattr(network, "request", _noting(network.request, traces))
            monkeypatch.setattr(scheduler.network, "publish", _noting(scheduler.network.publish, traces))
            with span_from(None, "something else") as other:
                allocation = await allocator(scheduler).allocate([wanted("train")])
            assert len(allocation.workers) == 1
        assert set(traces) == {"TaskAdvertisement", "WorkerOffer", "RenewLease"}
        assert len(set(traces.values())) == 1
        assert other.traceparent.split("-")[1] not in traces.values()
    finally:
        running.shutdown()


def _noting(send, traces):
    async def noted(to, message):
        traces[type(message).__name__] = inject().split("-")[1]
        return await send(to, message)

    return noted
