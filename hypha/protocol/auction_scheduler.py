"""The scheduler's side of an auction: collect offers, decide when to close, say who wins and who is released.

    offer ──▶ kept, or why not            decide ──▶ Waiting(reason, next_at)
                                                 └─▶ Closed(winners, losers, shortfall)

    opened ─── offers come ─── enough ── 50 ms ──▶ closed            the usual way
                     └─ the welcome ends, or a placed offer nears its end ──▶ closed with what is there

    received ─────────── 0.7 ttl: close for it ─ 0.8: it cannot be accepted any more ─ 0.9 ─ 1.0 ttl

Offers are scored by price per weighted unit; peers that hold nothing of this job yet come first. Below the minimum of
any ask the whole set is released, so that two schedulers never starve each other holding halves. Times are in seconds
of the scheduler's clock, prices per lease-hour.
"""

from collections.abc import Collection, Sequence

from msgspec import Struct

from hypha.errors import LocalProtocolError
from hypha.protocol.auction import SETTLE_S, price_per_unit
from hypha.protocol.auction_matching import Matching
from hypha.protocol.holder import ACCEPT_ATTEMPTS_MAX, ATTEMPT_SHARE, HOLDER_SHARE
from hypha.protocol.messages import Ask, Choice, WorkerOffer
from hypha.protocol.resources import DEFAULT_WEIGHTS, ResourceWeights

# The holder's share of the ttl, less the attempts that accepting may take; the share after which one does not fit.
CLOSE_SHARE = HOLDER_SHARE - ACCEPT_ATTEMPTS_MAX * ATTEMPT_SHARE
USELESS_SHARE = HOLDER_SHARE - ATTEMPT_SHARE
# Large networks are asked in fractions; workers beyond this many are told no at once and are free again.
OFFERS_KEPT_MAX = 4096


class Want(Struct, frozen=True, kw_only=True):
    """An ask as advertised, what stays private about it, and how few of it are too few (0: any number will do)."""

    ask: Ask
    price_max: float
    minimum: int = 0


class Winner(Struct, frozen=True, kw_only=True):
    """Renew this lease now and dispatch the work of ask number `ask` to it."""

    peer: str
    offer: WorkerOffer
    ask: int
    price: float


class Loser(Struct, frozen=True, kw_only=True):
    """Release this lease now, for this reason."""

    peer: str
    offer: WorkerOffer
    reason: str


class Waiting(Struct, frozen=True):
    """Not yet: why, and when to ask again at the latest."""

    reason: str
    next_at: float


class Closed(Struct, frozen=True, kw_only=True):
    """The outcome; `shortfall` says in numbers what is missing, None where everything was found."""

    winners: tuple[Winner, ...]
    losers: tuple[Loser, ...]
    shortfall: str | None


class _Kept(Struct, frozen=True, kw_only=True):
    peer: str
    offer: WorkerOffer
    choices: tuple[Choice, ...]  # those it covers and we can pay, cheapest first
    score: float
    received_at: float

    @property
    def wishes(self) -> tuple[int, ...]:
        return tuple(choice.ask for choice in self.choices)

    @property
    def close_at(self) -> float:
        return self.received_at + CLOSE_SHARE * self.offer.ttl_s

    @property
    def useless_at(self) -> float:
        return self.received_at + USELESS_SHARE * self.offer.ttl_s


class Auction:
    """One advertisement's offers. `holding` names the peers that hold leases of this job: others are preferred."""

    def __init__(
        self,
        *,
        advertisement_id: str,
        wants: Sequence[Want],
        welcome_s: float,
        now: float,
        holding: Collection[str] = (),
        weights: ResourceWeights = DEFAULT_WEIGHTS,
    ) -> None:
        for want in wants:
            if not 0 <= want.minimum <= want.ask.count:
                raise LocalProtocolError(f"minimum {want.minimum} of {want.ask.count} {want.ask.work} workers")
        self.advertisement_id = advertisement_id
        self._wants = tuple(wants)
        self._welcome_until = now + welcome_s
        self._holding = holding
        self._weights = weights
        self._kept: dict[str, _Kept] = {}
        self._losers: list[Loser] = []
        self._best_refused: list[float | None] = [None] * len(wants)
        self._matching = Matching([want.ask.count for want in wants])
        self._enough_since: float | None = None
        self._closed: Closed | None = None

    def offer(self, offer: WorkerOffer, *, peer: str, now: float) -> str | None:
        """Keep an offer, or return why not: then its lease has to be released at once. Repeating changes nothing."""
        known = self._kept.get(peer)
        if known is not None and known.offer.lease_id == offer.lease_id:
            return None
        if (refusal := self._unwelcome(offer, known, now)) is not None:
            return refusal
        covered = [choice for choice in offer.choices if self._covers(offer, choice)]
        if not covered:
            return f"{offer.resources} is not enough for what was asked"
        affordable = [choice for choice in covered if choice.price <= self._wants[choice.ask].price_max]
        if not affordable:
            return self._too_dear(covered)
        if known is not None:
            self._lose(known, "replaced by a newer offer of the same worker")
            self._keep(offer, peer, affordable, now)
            self._rematch(now)
        else:
            self._place(self._keep(offer, peer, affordable, now), now)
        return None

    def decide(self, now: float) -> Waiting | Closed:
        """Say whether to go on waiting; once closed, the same answer for ever."""
        if self._closed is not None:
            return self._closed
        close_at = self._close_at()
        # A placed one is useless only after its own close_at: the matching needs no repair.
        for each in [each for each in self._kept.values() if each.useless_at <= now]:
            self._lose(each, "too old to be accepted")
        if now >= close_at:
            self._closed = self._close()
            return self._closed
        return Waiting(self._counts(self._matching.filled()), close_at)

    def _unwelcome(self, offer: WorkerOffer, known: _Kept | None, now: float) -> str | None:
        refusals = (
            (offer.advertisement_id != self.advertisement_id, f"not for advertisement {self.advertisement_id}"),
            (self._closed is not None, "the auction is closed"),
            (now >= self._welcome_until, "offers are not welcome any more"),
            (known is not None and offer.fence < known.offer.fence, "there is a newer offer of the same worker"),
            (known is None and len(self._kept) >= OFFERS_KEPT_MAX, f"{OFFERS_KEPT_MAX} offers are enough"),
        )
        return next((reason for applies, reason in refusals if applies), None)

    def _covers(self, offer: WorkerOffer, choice: Choice) -> bool:
        return choice.ask < len(self._wants) and self._wants[choice.ask].ask.resources.fits_in(offer.resources)

    def _too_dear(self, choices: Sequence[Choice]) -> str:
        for choice in choices:
            best = self._best_refused[choice.ask]
            self._best_refused[choice.ask] = choice.price if best is None else min(best, choice.price)
        least = min(choices, key=lambda choice: (choice.price - self._wants[choice.ask].price_max, choice.ask))
        return f"price {least.price:g} is more than we pay"

    def _keep(self, offer: WorkerOffer, peer: str, affordable: Sequence[Choice], now: float) -> _Kept:
        cheapest_first = tuple(sorted(affordable, key=lambda choice: (choice.price, choice.ask)))
        score = price_per_unit(cheapest_first[0].price, offer.resources, self._weights)
        kept = _Kept(peer=peer, offer=offer, choices=cheapest_first, score=score, received_at=now)
        self._kept[peer] = kept
        return kept

    def _place(self, kept: _Kept, now: float) -> None:
        self._matching.add(kept.peer, kept.wishes)
        if self._matching.is_full and self._enough_since is None:
            self._enough_since = now

    def _lose(self, kept: _Kept, reason: str) -> None:
        del self._kept[kept.peer]
        self._losers.append(Loser(peer=kept.peer, offer=kept.offer, reason=reason))

    def _rematch(self, now: float) -> None:
        self._matching = Matching([want.ask.count for want in self._wants])
        since, self._enough_since = self._enough_since, None
        for kept in self._kept.values():
            self._place(kept, now)
        if self._enough_since is not None and since is not None:
            self._enough_since = since

    def _close_at(self) -> float:
        placed = [self._kept[peer].close_at for peer in self._matching.placed()]
        settled = [] if self._enough_since is None else [self._enough_since + SETTLE_S]
        return min([self._welcome_until, *placed, *settled])

    def _close(self) -> Closed:
        matching = Matching([want.minimum for want in self._wants])
        best_first = sorted(self._kept.values(), key=self._rank)
        # The minima first: an offer that could do either must not leave an ask below its minimum.
        waiting = [each for each in best_first if not matching.add(each.peer, each.wishes)]
        matching.widen([want.ask.count for want in self._wants])
        for each in waiting:
            matching.add(each.peer, each.wishes)
        filled = matching.filled()
        shortfall = self._shortfall(filled)
        placed = {} if below_minimum(self._wants, filled) else matching.placed()
        reason = "another offer was better" if placed else f"too few to start: {shortfall}"
        for each in best_first:
            if each.peer not in placed:
                self._lose(each, reason)
        winners = [self._winner(each, placed[each.peer]) for each in best_first if each.peer in placed]
        return Closed(winners=tuple(winners), losers=tuple(self._losers), shortfall=shortfall)

    def _rank(self, kept: _Kept) -> tuple[bool, float, str, int]:
        return kept.peer in self._holding, kept.score, kept.peer, kept.offer.fence

    def _winner(self, kept: _Kept, ask: int) -> Winner:
        price = next(choice.price for choice in kept.choices if choice.ask == ask)
        return Winner(peer=kept.peer, offer=kept.offer, ask=ask, price=price)

    def _counts(self, filled: Sequence[int]) -> str:
        return ", ".join(
            f"{have} of {want.ask.count} {want.ask.work} workers"
            for have, want in zip(filled, self._wants, strict=True)
        )

    def _shortfall(self, filled: Sequence[int]) -> str | None:
        parts = []
        for have, want, refused in zip(filled, self._wants, self._best_refused, strict=True):
            if have < want.ask.count:
                dear = "" if refused is None else f"; best refused offer {refused:g} > max {want.price_max:g}"
                parts.append(f"{have} of {want.ask.count} {want.ask.work} workers{dear}")
        return "; ".join(parts) or None


def below_minimum(wants: Sequence[Want], filled: Sequence[int]) -> bool:
    """Return whether some ask has too few: then the whole set is released before backing off."""
    return any(have < want.minimum for want, have in zip(wants, filled, strict=True))
