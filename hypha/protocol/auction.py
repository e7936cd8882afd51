"""What both sides of an auction agree on, and the worker's terms (leases.md).

scheduler ──TaskAdvertisement(asks, fraction)──▶ gossip ──▶ workers: gather 200 ms, rank, grant a temporary lease
scheduler ◀──WorkerOffer(choices, lease)──────────────────  (auction_worker)
collect, match offers to asks (auction_matching), close: renew the winners, release the losers (auction_scheduler)
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from hypha.protocol.messages import PRICE_MAX, PeerId
from hypha.protocol.resources import DEFAULT_WEIGHTS, Resources, ResourceWeights

GATHER_S = 0.2
# After enough offers are there: time for a better one that is on its way.
SETTLE_S = 0.05

# How many offers an advertisement in a large network should bring.
OFFERS_PER_PLACE = 4
OFFERS_BESIDES = 12

NotNegative = Annotated[float, Meta(ge=0, le=PRICE_MAX)]


class OfferWeights(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much each reason to prefer one advertisement counts. Each reason is between 0 and 1.

    profit       the gain over the floor, relative to the best in the same window
    utilisation  the part of the free resources that it fills
    affinity     whether its scheduler is a preferred one
    """

    profit: NotNegative = 1.0
    utilisation: NotNegative = 0.1
    affinity: NotNegative = 0.01


class OfferConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The worker's terms, `[offer]` in its configuration; prices are per lease-hour.

    price                 what the whole machine costs at least, where `strategy` is "whole"
    floor                 bids below it are not answered
    strategy              "flexible": the asked bundle at the bid; "whole": the whole machine for one job
    utilisation_slope     price and floor rise by this share of themselves as the machine fills up; 0: they do not
    weights               which advertisements are answered first
    preferred_schedulers  peer ids
    """

    price: NotNegative = 0.0
    floor: NotNegative = 0.0
    strategy: Literal["flexible", "whole"] = "flexible"
    utilisation_slope: NotNegative = 0.0
    weights: OfferWeights = OfferWeights()
    preferred_schedulers: Annotated[tuple[PeerId, ...], Meta(max_length=1024)] = ()

    def floor_at(self, load: float) -> float:
        """Return the floor of a machine of which the share `load` (0 to 1) is leased."""
        return self.floor * (1 + self.utilisation_slope * load)

    def price_at(self, load: float) -> float:
        """Return the price of a machine of which the share `load` (0 to 1) is leased."""
        return self.price * (1 + self.utilisation_slope * load)


def answers(hash_fraction: float, fraction: float) -> bool:
    """Return whether a worker is among those asked; `hash_fraction` in [0, 1) is its hash with the advertisement."""
    return hash_fraction < fraction


def fraction_of(retry: int, first: float) -> float:
    """Return the share of workers asked by advertisement number `retry` (0: the first one); it doubles every time."""
    # Beyond 60 doublings every positive fraction that matters is 1.
    return float(min(1.0, first * 2.0 ** min(retry, 60)))


def fraction_for(wanted: int, *, offers: int, fraction: float) -> float:
    """Return the share of workers to ask for `wanted` of them, after `offers` came when the share `fraction` was asked.

    About offers / fraction workers could answer. Four for each place and a dozen besides leave a choice,
    and with chance deciding who is asked too few are rare: one auction in ten million for one place. Where nobody
    answered, twice as many.
    """
    enough = OFFERS_PER_PLACE * wanted + OFFERS_BESIDES
    return min(1.0, fraction * enough / offers if offers else 2 * fraction)


def price_per_unit(price: float, resources: Resources, weights: ResourceWeights = DEFAULT_WEIGHTS) -> float:
    """Return what offers are compared by: price per lease-hour and weighted unit of what is offered."""
    units = resources.units(weights)
    return price / units if units > 0 else float("inf")
