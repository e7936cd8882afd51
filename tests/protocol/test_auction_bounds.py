"""Offers and prices at the edges of what an auction may be sent."""

import pytest

from hypha.protocol.auction import price_per_unit
from hypha.protocol.resources import Resources
from tests.protocol.test_auction_scheduler import auction, offer, want


def test_a_choice_just_beyond_the_asks_is_not_had_and_nothing_breaks():
    sale = auction(want(count=1))
    assert sale.offer(offer({1: 100}), peer="a", now=0) == f"{Resources(cpu=1, gpu=1)} is not enough for what was asked"
    assert sale.offer(offer({0: 100, 1: 100}, lease_id="l2"), peer="a", now=0) is None


def test_less_than_a_unit_has_a_price_too():
    tiny = Resources(cpu=0.001)
    assert 0 < tiny.units() < 1
    assert price_per_unit(2, tiny) == pytest.approx(2 / tiny.units())
