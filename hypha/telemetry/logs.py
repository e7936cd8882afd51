"""Loggers that take a constant message and named fields.

    log = get_logger("network")                                    the stdlib logger `hypha.network`
    log.info("Lease renewed", lease_id=lease_id, worker_peer_id=peer)
        └─▶ {"timestamp": …, "level": "info", "component": "hypha-scheduler", "message": "Lease renewed",
             "trace_id": …, "lease_id": …, "worker_peer_id": …}

`ChangeLogger` says why something is as it is, once per change (torchft's habit); `OncePerKey` says a thing once per
peer, dataset, …; `RateLimited` says it at most once per interval. All three remember a bounded number of keys.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from hypha.telemetry.loglevels import ROOT, TRACE

# The attribute under which a record carries its fields.
FIELDS = "hypha_fields"

# Keys a change or once logger remembers: far above the peers and jobs one node deals with at a time.
KEYS_MAX = 1024


class Logger:
    """A stdlib logger with fields instead of format arguments. Disabled levels cost one comparison."""

    def __init__(self, stdlib: logging.Logger) -> None:
        self.stdlib = stdlib

    def error(self, message: str, /, **fields: object) -> None:
        """A failure that requires a human's attention."""
        self._log(logging.ERROR, message, fields)

    def warn(self, message: str, /, **fields: object) -> None:
        """An unusual condition that may point to a problem."""
        self._log(logging.WARNING, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """A change of state in normal operation."""
        self._log(logging.INFO, message, fields)

    def debug(self, message: str, /, **fields: object) -> None:
        """Detail for troubleshooting."""
        self._log(logging.DEBUG, message, fields)

    def trace(self, message: str, /, **fields: object) -> None:
        """Every step."""
        self._log(TRACE, message, fields)

    def exception(self, message: str, /, **fields: object) -> None:
        """An error with the traceback of the exception being handled."""
        self._log(logging.ERROR, message, fields, exc_info=True)

    def log(self, level: int, message: str, /, **fields: object) -> None:
        """Log at a level given as one of `loglevels.LEVELS`' numbers."""
        self._log(level, message, fields)

    def enabled(self, level: int) -> bool:
        """Whether a line of that level would be written: ask before computing costly fields."""
        return self.stdlib.isEnabledFor(level)

    def _log(self, level: int, message: str, fields: dict[str, object], *, exc_info: bool = False) -> None:
        if self.stdlib.isEnabledFor(level):
            # No positional arguments: a `%` in the message is text, never a format.
            self.stdlib.log(level, message, exc_info=exc_info, extra={FIELDS: fields}, stacklevel=3)


def get_logger(name: str) -> Logger:
    """The logger of a module of Hypha: `get_logger("network.rpc")` is filtered by `network=…`."""
    full = name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}"
    return Logger(logging.getLogger(full))


class _Remembered:
    """The newest value per key, for a bounded number of keys; the least recently used is forgotten."""

    def __init__(self, keys_max: int) -> None:
        self._values: OrderedDict[str, object] = OrderedDict()
        self._keys_max = keys_max

    def changed(self, key: str, value: object) -> bool:
        known = key in self._values
        same = known and self._values[key] == value
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._keys_max:
            self._values.popitem(last=False)
        return not same

    def forget(self, key: str) -> None:
        self._values.pop(key, None)


class ChangeLogger:
    """Logs the reason for a state under its key only when it differs from the last one logged."""

    def __init__(self, logger: Logger, *, level: int = logging.INFO, keys_max: int = KEYS_MAX) -> None:
        self._logger = logger
        self._level = level
        self._reasons = _Remembered(keys_max)

    def log_when_changed(self, key: str, reason: str, /, **fields: object) -> bool:
        """Log `reason` as the message, with `key` as field `about`; return whether it was logged."""
        changed = self._reasons.changed(key, reason)
        if changed:
            self._logger.log(self._level, reason, about=key, **fields)
        return changed

    def forget(self, key: str) -> None:
        """The state is over: the next reason for this key is logged whatever it is."""
        self._reasons.forget(key)


class OncePerKey:
    """Logs a message once for every key it still remembers."""

    def __init__(self, logger: Logger, *, level: int = logging.WARNING, keys_max: int = KEYS_MAX) -> None:
        self._logger = logger
        self._level = level
        self._seen = _Remembered(keys_max)

    def log(self, key: str, message: str, /, **fields: object) -> bool:
        """Log unless this key was logged before; return whether it was logged."""
        fresh = self._seen.changed(key, None)
        if fresh:
            self._logger.log(self._level, message, **fields)
        return fresh


class RateLimited:
    """Logs at most one line per interval, saying how many it kept back."""

    def __init__(
        self,
        logger: Logger,
        interval_s: float,
        *,
        level: int = logging.WARNING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._level = level
        self._clock = clock
        self._next_at = float("-inf")
        self._kept_back = 0

    def log(self, message: str, /, **fields: object) -> bool:
        """Log, or count it as kept back; return whether it was logged."""
        now = self._clock()
        if now < self._next_at:
            self._kept_back += 1
            return False
        self._next_at = now + self._interval_s
        if self._kept_back:
            fields["kept_back"] = self._kept_back
        self._kept_back = 0
        self._logger.log(self._level, message, **fields)
        return True
