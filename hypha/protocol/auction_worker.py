"""The worker's side of an auction: gather advertisements for a moment, rank them, plan one offer for each.

    heard ──▶ │ window of 200 ms │ ──▶ rank: executors and resources fit, the bid meets the floor
                                        best first, each from what the better ones left
                                   ──▶ OfferPlan: the asks it could serve, resources for any one of them

An offer names every ask it could serve, so that from three equal workers any two can train and the third aggregate,
whichever the scheduler likes. The caller grants a lease for each plan in turn and skips the rest on NoRoom.
"""

from collections.abc import Collection, Sequence

from msgspec import Struct

from hypha.protocol.auction import GATHER_S, OfferConfig, answers
from hypha.protocol.messages import Ask, Choice, TaskAdvertisement
from hypha.protocol.resources import NOTHING, Resources

# In one window; a flood beyond it is somebody's mistake, and what it displaces is advertised again.
GATHERED_MAX = 256
# Advertisements whose offers were made: gossip repeats within minutes, not after thousands of others.
ANSWERED_MAX = 4096


class Heard(Struct, frozen=True, kw_only=True):
    """An advertisement and when it came, in seconds of the worker's clock."""

    advertisement: TaskAdvertisement
    heard_at: float

    def welcome_at(self, now: float) -> bool:
        """Whether an offer is still welcome."""
        return now < self.heard_at + self.advertisement.welcome_s


class OfferPlan(Struct, frozen=True):
    """An offer worth making: the asks it could serve with their prices, and the resources to lease for it."""

    advertisement: TaskAdvertisement
    choices: tuple[Choice, ...]
    resources: Resources
    score: float


class Gather:
    """Collects advertisements while the window that the first of them opened is open."""

    def __init__(self, window_s: float = GATHER_S) -> None:
        self._window_s = window_s
        self._heard: dict[str, Heard] = {}
        self._answered: dict[str, None] = {}
        self._closes_at: float | None = None

    def hear(self, advertisement: TaskAdvertisement, *, hash_fraction: float, now: float) -> str | None:
        """Note an advertisement, or return why it is passed over."""
        name = advertisement.advertisement_id
        if not answers(hash_fraction, advertisement.fraction):
            return f"only {advertisement.fraction:g} of the workers are asked; this one is at {hash_fraction:.3f}"
        if name in self._answered or name in self._heard:
            return f"advertisement {name} is known"
        if len(self._heard) >= GATHERED_MAX:
            return f"{GATHERED_MAX} advertisements wait already"
        if self._closes_at is None:
            self._closes_at = now + self._window_s
        self._heard[name] = Heard(advertisement=advertisement, heard_at=now)
        return None

    def closes_at(self) -> float | None:
        """Return when `close` is due; None while nothing was heard."""
        return self._closes_at

    def close(self, now: float) -> tuple[TaskAdvertisement, ...]:
        """End the window: return what may be answered, in the order heard, nothing while the window is open."""
        if self._closes_at is None or now < self._closes_at:
            return ()
        heard, self._heard, self._closes_at = self._heard, {}, None
        return tuple(each.advertisement for each in heard.values() if each.welcome_at(now))

    def answered(self, advertisement_id: str) -> None:
        """Note that an offer was made: there is one per advertisement and worker. Others may be heard again."""
        self._answered[advertisement_id] = None
        if len(self._answered) > ANSWERED_MAX:
            del self._answered[next(iter(self._answered))]


def rank(
    advertisements: Sequence[TaskAdvertisement],
    *,
    free: Resources,
    capacity: Resources,
    executors: Collection[tuple[str, str]],
    config: OfferConfig,
) -> list[OfferPlan]:
    """Return the offers to make, best first; each takes from what the better ones left of `free`.

    `executors` holds (class, name) of what this worker can run. Equal scores go by advertisement id.
    """
    terms = _Terms(capacity=capacity, executors=executors, config=config, load=_load(free, capacity))
    gains = [_gain(terms, terms.choices(each, free)) for each in advertisements]
    best = max(gains, default=0.0)
    scores = [
        _score(terms, each, free, gain / best if best > 0 else 0.0)
        for each, gain in zip(advertisements, gains, strict=True)
    ]
    order = sorted(range(len(scores)), key=lambda at: (-scores[at], advertisements[at].advertisement_id))
    plans, left = [], free
    for at in order:
        choices = terms.choices(advertisements[at], left)
        if choices:
            resources = terms.bundle(advertisements[at], choices)
            plans.append(OfferPlan(advertisements[at], choices, resources, scores[at]))
            left = left.minus(resources)
    return plans


class _Terms(Struct, frozen=True, kw_only=True):
    capacity: Resources
    executors: Collection[tuple[str, str]]
    config: OfferConfig
    load: float

    def choices(self, advertisement: TaskAdvertisement, room: Resources) -> tuple[Choice, ...]:
        """Return the asks that could be served from `room`."""
        return tuple(
            Choice(ask=place, price=self._price(ask))
            for place, ask in enumerate(advertisement.asks)
            if self._can_serve(ask, room)
        )

    def bundle(self, advertisement: TaskAdvertisement, choices: tuple[Choice, ...]) -> Resources:
        """Return what to lease: enough for any one of the choices."""
        if self.config.strategy == "whole":
            return self.capacity
        bundle = NOTHING
        for choice in choices:
            bundle = bundle.join(advertisement.asks[choice.ask].resources)
        return bundle

    def _can_serve(self, ask: Ask, room: Resources) -> bool:
        whole_is_free = self.config.strategy != "whole" or self.capacity.fits_in(room)
        return (
            (ask.work, ask.executor) in self.executors
            and not ask.resources.is_zero
            and ask.resources.fits_in(room)
            and whole_is_free
            and ask.bid >= self.config.floor_at(self.load)
        )

    def _price(self, ask: Ask) -> float:
        return ask.bid if self.config.strategy == "flexible" else max(ask.bid, self.config.price_at(self.load))


def _load(free: Resources, capacity: Resources) -> float:
    units = capacity.units()
    return 1 - free.units() / units if units > 0 else 1.0


def _gain(terms: _Terms, choices: tuple[Choice, ...]) -> float:
    floor = terms.config.floor_at(terms.load)
    return max((choice.price - floor for choice in choices), default=0.0)


def _score(terms: _Terms, advertisement: TaskAdvertisement, free: Resources, profit: float) -> float:
    choices = terms.choices(advertisement, free)
    filled = terms.bundle(advertisement, choices).units() / free.units() if choices else 0.0
    preferred = advertisement.scheduler in terms.config.preferred_schedulers
    weights = terms.config.weights
    return weights.profit * profit + weights.utilisation * filled + weights.affinity * preferred
