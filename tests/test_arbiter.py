"""The arbiter offers what is asked for, once, and takes back what nobody took; in virtual time."""

import logging

import pytest
import trio

from hypha.errors import Refused
from hypha.network.memory import MemoryFabric
from hypha.protocol.auction import GATHER_S, OfferConfig
from hypha.protocol.messages import TOPIC_WORKER, Ack, Choice, RenewLease, WorkerOffer
from hypha.protocol.resources import Resources
from hypha.store.memory_disk import Fault
from hypha.worker.arbiter import HAND_OVER_SHARE, hash_fraction
from tests.lease_cast import OFFER_TTL_S, TRAIN, Cast, advertised, ask

LONG_ENOUGH_S = 1.0


@pytest.fixture
def cast() -> Cast:
    return Cast(MemoryFabric("arbiter"))


class Desk:
    """A scheduler that only notes the offers it gets, or refuses them."""

    def __init__(self, network) -> None:
        self.network = network
        self.offers: list[tuple[str, WorkerOffer]] = []
        self.times: list[float] = []
        self.refusals: list[str] = []
        network.serve(WorkerOffer, self._receive, roles=frozenset({"worker"}))

    async def _receive(self, peer, offer) -> Ack:
        self.offers.append((peer.peer_id, offer))
        self.times.append(trio.current_time())
        if self.refusals:
            raise Refused(*self.refusals)
        return Ack()

    async def advertise(self, name, *asks, **fields) -> None:
        await self.network.publish(TOPIC_WORKER, advertised(self.network, name, *asks, **fields))

    @property
    def answered(self) -> list[str]:
        return [offer.advertisement_id for _, offer in self.offers]


async def test_an_advertisement_is_answered_by_a_lease_on_what_it_asks(cast, autojump_clock):
    async with cast.worker("w", cpu=2) as worker, cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        await desk.advertise("ad", ask("train", bid=3), ask("aggregate", bid=2), job_epoch=7)
        await trio.sleep(LONG_ENOUGH_S)
        ((peer_id, offer),) = desk.offers
        (lease,) = worker.ledger.leases(worker.runtime.now())
        assert (peer_id, offer.lease_id, offer.fence) == ("w", lease.lease_id, lease.fence)
        assert offer.choices == (Choice(ask=0, price=3), Choice(ask=1, price=2))
        assert offer.resources == lease.resources == Resources(cpu=1)
        assert (lease.holder, lease.job_epoch, lease.state.value) == ("s", 7, "temporary")
        assert OFFER_TTL_S - 0.1 < offer.ttl_s <= OFFER_TTL_S
        assert worker.free == Resources(cpu=1)


@pytest.mark.parametrize("rate", [1.0, 0.95, 1.05])
async def test_the_window_is_measured_by_the_workers_own_clock(cast, autojump_clock, rate):
    async with cast.worker("w", rate=rate), cast.fabric.node("s", {"scheduler"}) as network:
        desk, began = Desk(network), trio.current_time()
        await desk.advertise("ad")
        await trio.sleep(LONG_ENOUGH_S)
        assert desk.times[0] - began == pytest.approx(GATHER_S / rate, abs=0.01)


async def test_of_the_advertisements_in_one_window_the_better_is_answered(cast, autojump_clock):
    async with cast.worker("w"), cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        await desk.advertise("poor", ask(bid=1))
        await trio.sleep(GATHER_S / 2)
        await desk.advertise("rich", ask(bid=5))
        await trio.sleep(LONG_ENOUGH_S)
        assert desk.answered == ["rich"]


async def test_one_offer_per_advertisement_however_often_it_is_heard(cast, autojump_clock):
    async with cast.worker("w", cpu=4), cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        for _ in range(3):
            await desk.advertise("ad")
            await trio.sleep(LONG_ENOUGH_S)
        await desk.advertise("next")
        await trio.sleep(LONG_ENOUGH_S)
        assert desk.answered == ["ad", "next"]


async def test_what_could_not_be_served_is_answered_once_it_can(cast, autojump_clock):
    async with cast.worker("w"), cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        await desk.advertise("first")
        await trio.sleep(LONG_ENOUGH_S)
        await desk.advertise("second")
        await trio.sleep(OFFER_TTL_S)  # the first offer lapses
        await desk.advertise("second")
        await trio.sleep(LONG_ENOUGH_S)
        assert desk.answered == ["first", "second"]
        assert desk.offers[1][1].fence > desk.offers[0][1].fence


@pytest.mark.parametrize(
    ("asked", "offer"),
    [(ask("aggregate"), OfferConfig()), (ask(cpu=2), OfferConfig()), (ask(bid=1), OfferConfig(floor=2))],
    ids=["no such executor", "too big", "below the floor"],
)
async def test_no_offer_where_there_is_no_fit_and_the_log_says_so(cast, autojump_clock, caplog, asked, offer):
    caplog.set_level(logging.INFO, "hypha")
    async with (
        cast.worker("w", executors=(TRAIN,), offer=offer) as worker,
        cast.fabric.node("s", {"scheduler"}) as network,
    ):
        desk = Desk(network)
        await desk.advertise("ad", asked)
        await trio.sleep(LONG_ENOUGH_S)
        assert (desk.offers, worker.leases()) == ([], [])
        assert [r.message for r in caplog.records if r.message.startswith("No offer")] == [
            "No offer: of what is asked nothing fits cpu 1 free, the executors here and the floor"
        ]


async def test_only_a_scheduler_may_ask_and_only_for_itself(cast, autojump_clock):
    async with (
        cast.worker("w", cpu=4) as worker,
        cast.fabric.node("s", {"scheduler"}) as network,
        cast.fabric.node("x", {"worker"}) as stranger,
        cast.fabric.node("t", {"scheduler"}) as thief,
    ):
        desk, others = Desk(network), [Desk(stranger), Desk(thief)]
        await stranger.publish(TOPIC_WORKER, advertised(stranger, "not a scheduler"))
        await thief.publish(TOPIC_WORKER, advertised(network, "in another's name"))
        await thief.publish(TOPIC_WORKER, advertised(thief, "bad addresses", addresses=b"x" * 64))
        await trio.sleep(LONG_ENOUGH_S)
        assert (desk.offers, worker.leases(), [other.offers for other in others]) == ([], [], [[], []])
        await desk.advertise("honest")
        await trio.sleep(LONG_ENOUGH_S)
        assert desk.answered == ["honest"]


async def test_what_cannot_be_answered_takes_no_room_from_what_can(cast, autojump_clock):
    async with cast.worker("w"), cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        await desk.advertise("rich but unreachable", ask(bid=1000), addresses=b"x" * 64)
        await desk.advertise("poor but honest", ask(bid=1))
        await trio.sleep(LONG_ENOUGH_S)
        assert desk.answered == ["poor but honest"]


async def test_a_refused_offer_is_taken_back_at_once(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        desk.refusals = ["price 1 is more than we pay"]
        await desk.advertise("ad")
        await trio.sleep(GATHER_S + 0.1)
        assert desk.answered == ["ad"]
        assert (worker.leases(), worker.free) == ([], Resources(cpu=1))


async def test_a_busy_scheduler_is_asked_again(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        desk.refusals = ["too many requests", "busy"]
        await desk.advertise("ad")
        await trio.sleep(GATHER_S + 0.1)
        desk.refusals = []
        await trio.sleep(LONG_ENOUGH_S)
        assert len(desk.offers) > 1
        assert len({offer.lease_id for _, offer in desk.offers}) == 1
        assert desk.offers[-1][1].ttl_s < desk.offers[0][1].ttl_s
        assert worker.leases() == [("s", "temporary")]


async def test_an_offer_that_reaches_nobody_is_taken_back_before_its_ttl(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        await desk.advertise("ad")
        await trio.sleep(GATHER_S / 2)
        cast.fabric.partition("w", "s", one_way=True)
        await trio.sleep(GATHER_S)
        assert worker.leases() == [("s", "temporary")]
        await trio.sleep(OFFER_TTL_S * (HAND_OVER_SHARE + 0.3))
        assert (worker.leases(), desk.offers) == ([], [])


async def test_what_was_accepted_stays_although_the_answer_to_the_offer_was_lost(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.fabric.node("s", {"scheduler"}) as network:

        async def accept_and_refuse(peer, offer):
            renewal = RenewLease(lease_id=offer.lease_id, fence=offer.fence, job_epoch=1, attempt=1)
            await network.request(peer.peer_id, renewal)
            raise Refused("this word overtook nothing")

        network.serve(WorkerOffer, accept_and_refuse)
        await network.publish(TOPIC_WORKER, advertised(network, "ad"))
        await trio.sleep(LONG_ENOUGH_S)
        assert worker.leases() == [("s", "renewable")]


async def test_without_a_durable_fence_nothing_is_offered_and_the_log_says_so(cast, autojump_clock, caplog):
    caplog.set_level(logging.ERROR, "hypha")
    async with cast.worker("w") as worker, cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        worker.disk.plan[worker.disk.operations] = Fault.ENOSPC
        await desk.advertise("ad")
        await trio.sleep(LONG_ENOUGH_S)
        assert (desk.offers, worker.leases()) == ([], [])
        assert [record.message.split(":")[0] for record in caplog.records] == ["No offers without a new fence"]


async def test_offers_go_on_when_the_disk_writes_again(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.fabric.node("s", {"scheduler"}) as network:
        desk = Desk(network)
        worker.disk.plan[worker.disk.operations] = Fault.ENOSPC
        for _ in range(2):
            await desk.advertise("ad")
            await trio.sleep(LONG_ENOUGH_S)
        assert desk.answered == ["ad"]


async def test_a_fraction_asks_that_part_of_the_workers(cast, autojump_clock):
    names = [f"w-{number}" for number in range(20)]
    expected = sorted(name for name in names if hash_fraction("ad", name) < 0.3)
    assert 0 < len(expected) < len(names)
    async with cast.fabric.node("s", {"scheduler"}) as network, trio.open_nursery() as nursery:

        async def play(name, *, task_status):
            async with cast.worker(name):
                task_status.started()
                await trio.sleep_forever()

        for name in names:
            await nursery.start(play, name)
        desk = Desk(network)
        await desk.advertise("ad", fraction=0.3)
        await trio.sleep(LONG_ENOUGH_S)
        nursery.cancel_scope.cancel()
    assert sorted(peer_id for peer_id, _ in desk.offers) == expected


def test_hash_fractions_spread_evenly_below_one():
    fractions = [hash_fraction("ad", f"peer-{number}") for number in range(2000)]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert sum(fraction < 0.25 for fraction in fractions) / 2000 == pytest.approx(0.25, abs=0.04)
    assert hash_fraction("ad", "peer-1") != hash_fraction("other", "peer-1")
