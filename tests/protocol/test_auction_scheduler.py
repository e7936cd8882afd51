"""The scheduler's side of an auction: who wins, when it closes, and what it says when it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import LocalProtocolError
from hypha.protocol import auction_scheduler as rules
from hypha.protocol.auction_scheduler import Auction, Closed, Waiting, Want, below_minimum
from hypha.protocol.messages import Ask, Choice, WorkerOffer
from hypha.protocol.resources import Resources

NEED = Resources(cpu=1, gpu=1)
BOTH = {0: 100, 1: 100}


def want(work="train", count=2, price_max=120, minimum=0):
    ask = Ask(work=work, executor=work, resources=NEED, count=count, bid=100)
    return Want(ask=ask, price_max=price_max, minimum=minimum)


def auction(*wants, welcome_s=2.0, holding=()):
    wanted = wants or (want(), want("aggregate", count=1))
    return Auction(advertisement_id="ad", wants=wanted, welcome_s=welcome_s, now=0, holding=holding)


def offer(prices, *, lease_id="lease", fence=1, resources=NEED, ttl_s=5.0, advertisement_id="ad"):
    return WorkerOffer(
        advertisement_id=advertisement_id,
        choices=tuple(Choice(ask=ask, price=price) for ask, price in prices.items()),
        lease_id=lease_id,
        fence=fence,
        resources=resources,
        ttl_s=ttl_s,
        addresses=b"",
    )


def won(decision):
    return [(winner.peer, winner.ask) for winner in decision.winners]


def lost(decision):
    return [(loser.peer, loser.reason) for loser in decision.losers]


def test_three_equal_workers_fill_two_asks_and_it_closes_50_ms_after_the_last():
    sale = auction()
    assert sale.offer(offer(BOTH), peer="a", now=0.2) is None
    assert sale.offer(offer(BOTH), peer="b", now=0.2) is None
    assert sale.decide(0.2) == Waiting("2 of 2 train workers, 0 of 1 aggregate workers", 2.0)
    assert sale.offer(offer(BOTH), peer="c", now=0.25) is None
    waiting = sale.decide(0.25)
    assert waiting == Waiting("2 of 2 train workers, 1 of 1 aggregate workers", 0.25 + 0.05)
    assert isinstance(sale.decide(0.29), Waiting)
    closed = sale.decide(waiting.next_at)
    assert sorted(ask for _, ask in won(closed)) == [0, 0, 1]
    assert (closed.losers, closed.shortfall) == ((), None)
    assert sale.decide(99) is closed


def test_a_better_offer_within_the_50_ms_wins_and_the_loser_is_named():
    sale = auction(want(count=1))
    sale.offer(offer({0: 110}), peer="dear", now=0)
    sale.offer(offer({0: 90}), peer="cheap", now=0.04)
    closed = sale.decide(0.05)
    assert won(closed) == [("cheap", 0)]
    assert closed.winners[0].price == 90
    assert lost(closed) == [("dear", "another offer was better")]
    assert closed.shortfall is None


def test_price_is_compared_per_unit_of_what_is_offered():
    sale = auction(want(count=1))
    sale.offer(offer({0: 90}), peer="small", now=0)
    sale.offer(offer({0: 100}, resources=Resources(cpu=2, gpu=2)), peer="big", now=0)
    assert won(sale.decide(1)) == [("big", 0)]


def test_peers_that_hold_nothing_of_the_job_yet_come_first_and_ties_go_by_peer():
    sale = auction(want(count=2), holding=("b",))
    for peer in "cba":
        sale.offer(offer({0: 50 if peer == "b" else 100}), peer=peer, now=0)
    assert won(sale.decide(1)) == [("a", 0), ("c", 0)]


def test_too_few_are_told_in_numbers_with_the_best_refused_offer():
    sale = auction(want(count=4, price_max=120))
    for peer in "abc":
        sale.offer(offer({0: 100}), peer=peer, now=0)
    assert sale.offer(offer({0: 150}), peer="d", now=0) == "price 150 is more than we pay"
    assert sale.offer(offer({0: 140}), peer="e", now=0) == "price 140 is more than we pay"
    assert sale.offer(offer({0: 160}), peer="f", now=0) == "price 160 is more than we pay"
    assert isinstance(sale.decide(1.99), Waiting)
    closed = sale.decide(2.0)
    assert won(closed) == [("a", 0), ("b", 0), ("c", 0)]
    assert closed.shortfall == "3 of 4 train workers; best refused offer 140 > max 120"


def test_a_set_below_the_minimum_is_released_whole():
    sale = auction(want(count=3, minimum=3), want("aggregate", count=1, minimum=1))
    for peer in "abc":
        sale.offer(offer({0: 100}), peer=peer, now=0)
    closed = sale.decide(2.0)
    assert closed.winners == ()
    assert closed.shortfall == "0 of 1 aggregate workers"
    assert lost(closed) == [(peer, "too few to start: 0 of 1 aggregate workers") for peer in "abc"]


def test_the_minimum_of_each_ask_is_met_before_any_ask_is_filled():
    sale = auction(want(count=3, minimum=1), want("aggregate", count=1, minimum=1))
    for peer in "ab":
        sale.offer(offer({0: 10, 1: 100}), peer=peer, now=0)
    assert sorted(ask for _, ask in won(sale.decide(2.0))) == [0, 1]


def test_nobody_at_all_is_a_shortfall_too():
    closed = auction(want(count=2, minimum=1)).decide(2)
    assert closed == Closed(winners=(), losers=(), shortfall="0 of 2 train workers")


def test_it_closes_while_the_oldest_placed_offer_can_still_be_accepted():
    sale = auction(want(count=2), welcome_s=60)
    sale.offer(offer({0: 100}, ttl_s=5), peer="a", now=1)
    waiting = sale.decide(1)
    assert waiting.next_at == 1 + 0.7 * 5
    assert isinstance(sale.decide(4.49), Waiting)
    assert won(sale.decide(4.5)) == [("a", 0)]


def test_an_offer_too_old_to_be_accepted_is_not():
    sale = auction(want(count=2), welcome_s=60)
    sale.offer(offer({0: 100}, ttl_s=5), peer="a", now=1)
    closed = sale.decide(5.0)
    assert closed.winners == ()
    assert lost(closed) == [("a", "too old to be accepted")]


def test_an_extra_offer_that_lapses_does_not_close_the_auction():
    sale = auction(want(count=1), want("aggregate", count=1), welcome_s=60)
    sale.offer(offer({0: 100}, ttl_s=50), peer="a", now=0)
    sale.offer(offer({0: 90}, ttl_s=5), peer="extra", now=0)
    assert isinstance(sale.decide(10), Waiting)
    assert sale.offer(offer({1: 90}, ttl_s=50), peer="b", now=10) is None
    closed = sale.decide(11)
    assert won(closed) == [("b", 1), ("a", 0)]
    assert lost(closed) == [("extra", "too old to be accepted")]


def test_a_repeated_offer_changes_nothing_a_newer_one_replaces():
    sale = auction(want(count=2))
    first = offer({0: 100}, lease_id="l1", fence=1)
    assert sale.offer(first, peer="a", now=0) is None
    assert sale.offer(first, peer="a", now=0.5) is None
    assert sale.decide(0.5).reason == "1 of 2 train workers"
    assert sale.offer(offer({0: 80}, lease_id="l2", fence=2), peer="a", now=0.6) is None
    assert sale.decide(0.6).reason == "1 of 2 train workers"
    late = sale.offer(first, peer="a", now=0.7)
    assert late == "there is a newer offer of the same worker"
    closed = sale.decide(2)
    assert [(winner.offer.lease_id, winner.price) for winner in closed.winners] == [("l2", 80)]
    assert lost(closed) == [("a", "replaced by a newer offer of the same worker")]


def test_replacing_an_offer_does_not_start_the_50_ms_again():
    sale = auction(want(count=1))
    sale.offer(offer({0: 100}, lease_id="l1", fence=1), peer="a", now=0)
    sale.offer(offer({0: 100}, lease_id="l2", fence=2), peer="a", now=0.03)
    assert won(sale.decide(0.05)) == [("a", 0)]


def test_an_offer_that_could_do_either_does_what_it_is_cheaper_for():
    sale = auction(want(count=1), want("aggregate", count=1))
    sale.offer(offer({0: 100, 1: 60}), peer="a", now=0)
    closed = sale.decide(2)
    assert won(closed) == [("a", 1)]
    assert closed.winners[0].price == 60


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (offer(BOTH, advertisement_id="other"), "not for advertisement ad"),
        (offer({7: 100}), "cpu 1, gpu 1 is not enough for what was asked"),
        (offer(BOTH, resources=Resources(cpu=8)), "cpu 8 is not enough for what was asked"),
    ],
)
def test_an_offer_of_something_else_is_refused(bad, reason):
    sale = auction()
    assert sale.offer(bad, peer="a", now=0) == reason
    assert sale.decide(0).reason == "0 of 2 train workers, 0 of 1 aggregate workers"


def test_offers_that_come_late_or_are_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(rules, "OFFERS_KEPT_MAX", 1)
    sale = auction()
    assert sale.offer(offer(BOTH), peer="a", now=0) is None
    assert sale.offer(offer(BOTH), peer="b", now=0) == "1 offers are enough"
    assert sale.offer(offer(BOTH), peer="c", now=2.0) == "offers are not welcome any more"
    sale.decide(2.0)
    assert sale.offer(offer(BOTH, lease_id="new", fence=2), peer="a", now=2.0) == "the auction is closed"


def test_only_the_affordable_part_of_an_offer_counts():
    sale = auction(want(price_max=90), want("aggregate", count=1, price_max=120))
    assert sale.offer(offer(BOTH), peer="a", now=0) is None
    closed = sale.decide(2)
    assert won(closed) == [("a", 1)]
    assert closed.shortfall == "0 of 2 train workers"


def test_a_minimum_beyond_the_count_is_our_bug():
    with pytest.raises(LocalProtocolError):
        auction(want(count=2, minimum=3))
    assert below_minimum([want(minimum=2)], [1])
    assert not below_minimum([want(minimum=2)], [2])


PRICES = st.sampled_from([{0: 90}, {0: 100}, {1: 100}, {0: 100, 1: 60}, {0: 130}, {0: 130, 1: 110}])


@given(st.lists(PRICES, max_size=7), st.randoms(use_true_random=False), st.integers(0, 2), st.integers(0, 1))
def test_every_offer_is_either_won_lost_or_refused_whatever_the_order_of_arrival(prices, order, trains, aggregates):
    offers = [(f"peer-{number}", offer(each)) for number, each in enumerate(prices)]
    outcomes = []
    for _ in range(2):
        sale = auction(want(count=2, minimum=trains), want("aggregate", count=1, minimum=aggregates))
        refused = [peer for peer, each in offers if sale.offer(each, peer=peer, now=0) is not None]
        closed = sale.decide(2)
        everyone = [*refused, *(peer for peer, _ in won(closed)), *(peer for peer, _ in lost(closed))]
        assert sorted(everyone) == sorted(peer for peer, _ in offers)
        asks = [ask for _, ask in won(closed)]
        assert not asks or (trains <= asks.count(0) <= 2 and aggregates <= asks.count(1) <= 1)
        outcomes.append({winner.peer for winner in closed.winners})
        order.shuffle(offers)
    assert outcomes[0] == outcomes[1]
