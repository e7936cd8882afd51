"""Why nothing happens, if nothing happens: one reason per subject, logged when it changes, shown in the health report.

note("dataset", "…") ─▶ log, once per change ─▶ words(): "nobody provides dataset 'text'; 1 of 2 train workers; …"
warn("store", "…")   ─▶ the same as a warning: somebody has to do something
clear("dataset")     ─▶ that subject is in order again
"""

import logging

from hypha.telemetry import ChangeLogger, get_logger

log = get_logger("scheduler")


class Standing:
    """The open troubles of one scheduler, by subject: dataset, workers, store, round."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._said = ChangeLogger(log)
        self._warned = ChangeLogger(log, level=logging.WARNING)

    def note(self, subject: str, what: str, detail: str = "") -> None:
        """Something waits, and why; a `detail` that differs each time is no news."""
        self._say(self._said, subject, what, detail)

    def warn(self, subject: str, what: str, detail: str) -> None:
        """Something does not work that should: warned of once until it is cleared."""
        self._say(self._warned, subject, what, detail)

    def _say(self, said: ChangeLogger, subject: str, what: str, detail: str) -> None:
        self._reasons[subject] = f"{what}: {detail}" if detail else what
        if detail:
            said.log_when_changed(subject, what, reason=detail)
        else:
            said.log_when_changed(subject, what)

    def clear(self, subject: str) -> bool:
        """It waits no longer; returns whether it did."""
        self._said.forget(subject)
        self._warned.forget(subject)
        return self._reasons.pop(subject, None) is not None

    def reason(self, subject: str) -> str:
        """Return what is noted about a subject, "" where it is in order."""
        return self._reasons.get(subject, "")

    def words(self) -> str:
        """Return all reasons in the order in which they came up."""
        return "; ".join(self._reasons.values())
