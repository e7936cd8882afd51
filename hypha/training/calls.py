"""A call to the worker in a thread of its own, while the main thread computes.

    main thread   Call(…) ───────── inner step ─────────▶ result()      waits only for what is not here yet
    its thread        └─▶ request ─▶ answer, or a HyphaError

`Reports` are calls one after another: a report is told while the next step is taken, and its answer heard after that.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from hypha.errors import HyphaError
from hypha.protocol.bridge import Instruction, Report

T = TypeVar("T")


class Call(Generic[T]):
    """One call, under way from the start. `over` is set once it has ended; `answer` is None where there is none."""

    def __init__(self, name: str, call: Callable[[], T]) -> None:
        self.answer: T | None = None
        self.over = threading.Event()
        self._error: HyphaError | None = None
        threading.Thread(target=self._run, args=(call,), name=name, daemon=True).start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self.answer = call()
        except HyphaError as error:
            self._error = error
        finally:
            self.over.set()

    def result(self) -> T:
        """Wait for the end; return the answer, or raise what there was instead of one."""
        self.over.wait()
        if self._error is not None:
            raise self._error
        assert self.answer is not None, "a thread that calls the worker died"
        return self.answer


class Reports:
    """What an executor says after each batch. At most one report is under way, so they arrive in their order."""

    def __init__(self, report: Callable[[Report], Instruction]) -> None:
        self._report = report
        self._told: Call[Instruction] | None = None

    def tell(self, report: Report) -> Instruction | None:
        """Say this without waiting; returns what the report before it was answered. Raises what that one raised."""
        heard = self.hear()
        self._told = Call("report", lambda: self._report(report))
        return heard

    def hear(self) -> Instruction | None:
        """Wait for the answer that is still to come; None: there is none to come. Raises what the report raised."""
        told, self._told = self._told, None
        return None if told is None else told.result()

    def end(self) -> None:
        """Let the last report arrive: all is over, and nobody minds what it is answered."""
        if self._told is not None:
            self._told.over.wait()
