"""The worker's side of an auction: what is gathered, what is answered, and in which order."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.protocol import auction_worker as rules
from hypha.protocol.auction import OfferConfig, OfferWeights, answers, fraction_for, fraction_of, price_per_unit
from hypha.protocol.auction_worker import Gather, rank
from hypha.protocol.messages import Ask, Choice, TaskAdvertisement
from hypha.protocol.resources import NOTHING, Resources

CAPACITY = Resources(cpu=4, memory=16, gpu=1)
EXECUTORS = (("train", "diloco-transformer"), ("aggregate", "parameter-server"))
TRAIN = Ask(work="train", executor="diloco-transformer", resources=Resources(cpu=1, gpu=1), count=2, bid=100)
AGGREGATE = Ask(work="aggregate", executor="parameter-server", resources=Resources(cpu=2, memory=8), count=1, bid=60)


def advertisement(name="ad-1", *asks, scheduler="sched-1", welcome_s=2.0, fraction=1.0):
    return TaskAdvertisement(
        advertisement_id=name,
        scheduler=scheduler,
        addresses=b"",
        job_id="job",
        job_epoch=1,
        asks=asks or (TRAIN, AGGREGATE),
        welcome_s=welcome_s,
        fraction=fraction,
    )


def asking(name, bid, *, scheduler="sched-1", **resources):
    ask = Ask(work="train", executor="diloco-transformer", resources=Resources(**resources), count=1, bid=bid)
    return advertisement(name, ask, scheduler=scheduler)


def plans(*advertisements, free=CAPACITY, capacity=CAPACITY, executors=EXECUTORS, **config):
    ranked = rank(advertisements, free=free, capacity=capacity, executors=executors, config=OfferConfig(**config))
    return [(plan.advertisement.advertisement_id, plan.choices, plan.resources) for plan in ranked]


def test_the_first_advertisement_opens_the_window_and_the_rest_joins_it():
    gather = Gather()
    assert gather.closes_at() is None
    assert gather.hear(advertisement("a"), hash_fraction=0, now=10) is None
    assert gather.hear(advertisement("b"), hash_fraction=0, now=10.19) is None
    assert gather.closes_at() == 10.2
    assert gather.close(10.1) == ()
    assert [each.advertisement_id for each in gather.close(10.2)] == ["a", "b"]
    assert gather.closes_at() is None
    assert gather.close(11) == ()


def test_what_was_answered_or_is_waiting_is_passed_over_the_rest_may_come_again():
    gather = Gather()
    gather.hear(advertisement("a"), hash_fraction=0, now=0)
    assert gather.hear(advertisement("a"), hash_fraction=0, now=0.1) == "advertisement a is known"
    gather.close(0.2)
    assert gather.hear(advertisement("a"), hash_fraction=0, now=0.3) is None
    gather.close(0.5)
    gather.answered("a")
    assert gather.hear(advertisement("a"), hash_fraction=0, now=0.6) == "advertisement a is known"


def test_an_offer_nobody_welcomes_any_more_is_not_made():
    gather = Gather()
    gather.hear(advertisement("brief", welcome_s=0.1), hash_fraction=0, now=0)
    gather.hear(advertisement("patient"), hash_fraction=0, now=0)
    assert [each.advertisement_id for each in gather.close(0.2)] == ["patient"]


def test_only_the_asked_fraction_answers_and_a_wider_repetition_is_heard():
    gather = Gather()
    passed_over = gather.hear(advertisement("a", fraction=0.25), hash_fraction=0.4, now=0)
    assert passed_over == "only 0.25 of the workers are asked; this one is at 0.400"
    assert gather.closes_at() is None
    assert gather.hear(advertisement("a", fraction=0.5), hash_fraction=0.4, now=0) is None


def test_a_flood_is_bounded(monkeypatch):
    monkeypatch.setattr(rules, "GATHERED_MAX", 2)
    monkeypatch.setattr(rules, "ANSWERED_MAX", 2)
    gather = Gather()
    assert [gather.hear(advertisement(name), hash_fraction=0, now=0) for name in "abc"] == [
        None,
        None,
        "2 advertisements wait already",
    ]
    gather.close(1)
    for name in "ab":
        gather.answered(name)
    assert gather.hear(advertisement("a"), hash_fraction=0, now=2) == "advertisement a is known"
    gather.answered("c")
    assert gather.hear(advertisement("a"), hash_fraction=0, now=2) is None
    assert gather.hear(advertisement("c"), hash_fraction=0, now=2) == "advertisement c is known"


def test_one_offer_names_every_ask_it_could_serve_and_holds_enough_for_any():
    both = (Choice(ask=0, price=100), Choice(ask=1, price=60))
    assert plans(advertisement()) == [("ad-1", both, Resources(cpu=2, memory=8, gpu=1))]


def test_an_ask_without_executor_resources_or_a_fair_bid_is_not_offered():
    train, aggregate = (Choice(ask=0, price=100),), (Choice(ask=1, price=60),)
    assert plans(advertisement(), executors=EXECUTORS[:1]) == [("ad-1", train, TRAIN.resources)]
    assert plans(advertisement(), free=Resources(cpu=4, memory=16)) == [("ad-1", aggregate, AGGREGATE.resources)]
    assert plans(advertisement(), floor=61) == [("ad-1", train, TRAIN.resources)]
    assert plans(advertisement(), floor=100) == [("ad-1", train, TRAIN.resources)]
    assert plans(advertisement(), floor=101) == []
    assert plans(asking("nothing", 100)) == []


def test_the_whole_machine_is_offered_for_one_job_at_the_higher_price():
    higher = (Choice(ask=0, price=100), Choice(ask=1, price=80))
    assert plans(advertisement(), advertisement("ad-2"), strategy="whole", price=80) == [("ad-1", higher, CAPACITY)]
    assert plans(advertisement(), free=Resources(cpu=3, memory=16, gpu=1), strategy="whole", price=80) == []


def test_profit_comes_first_then_a_good_fit_then_preferred_schedulers():
    low, high = asking("a", 50, cpu=1), asking("b", 90, cpu=1)
    assert [name for name, _, _ in plans(low, high)] == ["b", "a"]
    small, big = asking("a", 50, cpu=1), asking("b", 50, cpu=2)
    assert [name for name, _, _ in plans(small, big)] == ["b", "a"]
    a_little_more, much_fuller = asking("a", 1001, cpu=1), asking("b", 1000, cpu=4)
    assert [name for name, _, _ in plans(a_little_more, much_fuller)] == ["b"]
    stranger, friend = asking("a", 50, cpu=1), asking("b", 50, scheduler="sched-2", cpu=1)
    assert [name for name, _, _ in plans(stranger, friend)] == ["a", "b"]
    assert [name for name, _, _ in plans(stranger, friend, preferred_schedulers=("sched-2",))] == ["b", "a"]
    loyal = OfferWeights(profit=0, utilisation=0, affinity=1)
    assert [name for name, _, _ in plans(high, low, weights=loyal)] == ["a", "b"]


def test_each_offer_takes_from_what_the_better_ones_left():
    first, second, third = asking("a", 90, gpu=1), asking("b", 80, gpu=1), asking("c", 70, cpu=4)
    assert [name for name, _, _ in plans(third, second, first)] == ["a", "c"]


def test_floor_and_price_rise_with_load():
    half = Resources(cpu=4)
    capacity = Resources(cpu=8)
    rising = {"floor": 50, "utilisation_slope": 1.0}
    assert plans(asking("a", 75, cpu=1), free=half, capacity=capacity, **rising) != []
    assert plans(asking("a", 74, cpu=1), free=half, capacity=capacity, **rising) == []
    assert OfferConfig(price=80, utilisation_slope=0.5).price_at(1.0) == 120


@given(st.permutations([asking("a", 50, cpu=1), asking("b", 50, cpu=1), asking("c", 90, gpu=1), advertisement("d")]))
def test_the_order_of_hearing_does_not_matter(heard):
    assert plans(*heard) == plans(*sorted(heard, key=lambda each: each.advertisement_id))


def test_nothing_is_offered_by_a_machine_with_nothing():
    assert plans(advertisement(), free=NOTHING, capacity=NOTHING) == []
    assert plans() == []


def test_configuration_refuses_what_it_does_not_know():
    with pytest.raises(msgspec.ValidationError, match="unknown field `flor`"):
        msgspec.convert({"flor": 1}, OfferConfig)
    with pytest.raises(msgspec.ValidationError, match="strategy"):
        msgspec.convert({"strategy": "half"}, OfferConfig)
    assert msgspec.convert({"weights": {"affinity": 2}}, OfferConfig).weights.affinity == 2


def test_fractions_double_with_every_retry_until_all_are_asked():
    assert [fraction_of(retry, 0.3) for retry in range(4)] == [0.3, 0.6, 1.0, 1.0]
    assert fraction_of(10_000, 0.001) == 1.0
    assert answers(0.0, 0.25)
    assert not answers(0.25, 0.25)


def test_prices_compare_per_unit_of_what_is_offered():
    assert price_per_unit(32, Resources(gpu=2)) == 1.0
    assert price_per_unit(1, NOTHING) == float("inf")


def test_in_a_large_network_a_few_more_are_asked_than_are_wanted():
    asked = fraction_for(16, offers=10_000, fraction=1.0)
    assert 16 * 3 < asked * 10_000 < 16 * 6
    assert fraction_for(16, offers=round(asked * 10_000), fraction=asked) == pytest.approx(asked)
    assert fraction_for(1, offers=10_000, fraction=1.0) * 10_000 > 10


def test_in_a_small_network_everybody_is_asked_and_where_nobody_answers_twice_as_many():
    assert fraction_for(16, offers=40, fraction=1.0) == 1.0
    assert fraction_for(4, offers=0, fraction=0.1) == 0.2
    assert fraction_for(4, offers=0, fraction=0.8) == 1.0
