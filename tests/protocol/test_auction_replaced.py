"""A newer offer of the same worker may serve other asks than the one it replaces."""

from tests.protocol.test_auction_scheduler import auction, offer, want, won


def test_an_ask_that_only_the_newer_offer_serves_counts_as_filled_at_once():
    sale = auction(want(count=1), want("aggregate", count=1))
    sale.offer(offer({0: 100}, lease_id="l1"), peer="a", now=0)
    sale.offer(offer({0: 100}, lease_id="l1"), peer="b", now=0)
    assert sale.decide(0).reason == "1 of 1 train workers, 0 of 1 aggregate workers"
    sale.offer(offer({1: 100}, lease_id="l2", fence=2), peer="b", now=0.5)
    waiting = sale.decide(0.5)
    assert (waiting.reason, waiting.next_at) == ("1 of 1 train workers, 1 of 1 aggregate workers", 0.55)
    assert sorted(won(sale.decide(0.55))) == [("a", 0), ("b", 1)]
