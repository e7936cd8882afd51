"""What a simulated cluster is said to have done wrong: the invariant, and how it did not hold."""


class Broken(Exception):
    """An invariant that did not hold, and how."""

    def __init__(self, invariant: str, how: str) -> None:
        super().__init__(f"{invariant}: {how}")
        self.invariant = invariant
        self.how = how
