"""What an executor owes its worker, and for how long it has said nothing although it owes something (`stall_s`).

    owe(key) ──▶ the clock runs ──heard from it──▶ runs from zero ──settle(last key)──▶ stands
                      └── while one of its own questions is being answered, the clock stands, too

An executor speaks from several threads: a question that ends in one of them changes nothing about what another owes.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from hypha.runtime import Runtime

# What every executor owes from its start: the first word.
WORD = "a word"


class Owed:
    """The debts of one executor, and the clock over them."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._debts: set[Hashable] = {WORD}
        self._questions = 0
        self._heard = runtime.now()

    def owe(self, key: Hashable = WORD) -> None:
        """From now on it owes this; what it owed already is not forgiven by it."""
        if not self._debts:
            self._heard = self._runtime.now()
        self._debts.add(key)

    def settle(self, key: Hashable = WORD) -> None:
        """It has given this, or waits for us now."""
        self._debts.discard(key)
        self.heard()

    def heard(self) -> None:
        """It lives: the clock starts again."""
        self._heard = self._runtime.now()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While this is open we owe it an answer, and its silence means nothing."""
        self._questions += 1
        try:
            yield
        finally:
            self._questions -= 1
            self.heard()

    def silent_s(self) -> float:
        """Seconds without a word from it although it owes one; 0 while it owes none."""
        if not self._debts or self._questions:
            return 0.0
        return self._runtime.now() - self._heard
