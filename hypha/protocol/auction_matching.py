"""Which offer serves which ask: a bipartite matching, built one offer at a time.

    offers            asks (count)          an offer finds a free place at an ask it could serve, or somebody there
    A ── train        train      (2)        who can move to another ask, and so on: an augmenting path (Kuhn 1955).
    B ─┬ train        aggregate  (1)        Offers once placed stay placed, so the first ones given are the ones kept.
       └ aggregate

The sets of offers that can all be placed are the independent sets of a transversal matroid: taking offers best first
and keeping each that can be placed yields as many as possible, and among those the best (Edmonds 1971).
"""

from collections.abc import Sequence

from hypha.errors import LocalProtocolError


class Matching:
    """Offers, known by any string, placed at asks, known by their number; `places` says how many each ask takes."""

    def __init__(self, places: Sequence[int]) -> None:
        self._places = tuple(places)
        self._at: list[list[str]] = [[] for _ in places]
        self._wishes: dict[str, tuple[int, ...]] = {}

    def add(self, offer: str, wishes: Sequence[int]) -> bool:
        """Place an offer at one of the asks in `wishes`, the first preferred; False where that cannot be done."""
        if offer in self._wishes:
            raise LocalProtocolError(f"offer {offer} is placed already")
        if self.is_full:
            return False
        reached: dict[int, tuple[int, str] | None] = dict.fromkeys(wishes)
        queue = list(reached)
        for ask in queue:  # grows on the way: breadth first
            if len(self._at[ask]) < self._places[ask]:
                self._wishes[offer] = tuple(wishes)
                self._shift(offer, ask, reached)
                return True
            for resident in self._at[ask]:
                for other in self._wishes[resident]:
                    if other not in reached:
                        reached[other] = (ask, resident)
                        queue.append(other)
        return False

    def widen(self, places: Sequence[int]) -> None:
        """Let the asks take more, never fewer; who is placed stays placed."""
        assert all(new >= old for new, old in zip(places, self._places, strict=True)), "places may only grow"
        self._places = tuple(places)

    @property
    def is_full(self) -> bool:
        """Whether every ask has all it takes."""
        return len(self._wishes) == sum(self._places)

    def filled(self) -> tuple[int, ...]:
        """Return how many each ask has."""
        return tuple(len(at) for at in self._at)

    def placed(self) -> dict[str, int]:
        """Return where each placed offer is."""
        return {offer: ask for ask, at in enumerate(self._at) for offer in at}

    def _shift(self, offer: str, free: int, reached: dict[int, tuple[int, str] | None]) -> None:
        ask = free
        while (step := reached[ask]) is not None:
            left, mover = step
            self._at[left].remove(mover)
            self._at[ask].append(mover)
            ask = left
        self._at[ask].append(offer)
