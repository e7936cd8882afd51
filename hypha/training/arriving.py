"""Files that are read while they still arrive.

    whoever receives ── appends ─▶ PATH.part ── whole, digest right ─▶ PATH       one file, renamed
                                       └── until(stop): waits until the bytes before `stop` are there

What is read this way has not been verified: nothing that follows from it may be used before the file is at PATH.
"""

import os
import threading
import time
from pathlib import Path

from hypha.errors import RemoteProtocolError

# A look costs microseconds. The first ones follow fast: what is awaited is often a piece that is on its way already.
LOOK_S, LOOK_S_MAX = 0.001, 0.032
# So long nothing need come before it is given up. Whoever receives finds out sooner, and removes the file.
STALL_S = 60.0


class Arriving:
    """One file of `size` bytes, open from its first byte on; `given_up` ends every wait. Close it."""

    def __init__(self, path: Path, size: int, given_up: threading.Event) -> None:
        self.path, self.size = path, size
        self._given_up = given_up
        self._descriptor = -1
        self._have = 0

    def until(self, stop: int) -> int:
        """Wait until the bytes before `stop` are there, and return a descriptor to read them from.

        Raises RemoteProtocolError: they will not come.
        """
        look_s, stalled_at = LOOK_S, time.monotonic() + STALL_S
        while self._have < stop and not self._given_up.is_set():
            if self._grew():
                look_s, stalled_at = LOOK_S, time.monotonic() + STALL_S
                continue
            self._given_up.wait(look_s)
            if time.monotonic() > stalled_at:
                break
            look_s = min(2 * look_s, LOOK_S_MAX)
        if self._have < stop or self._given_up.is_set():
            raise RemoteProtocolError(f"{self.path.name} is not awaited any longer")
        return self._descriptor

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _grew(self) -> bool:
        if self._descriptor < 0 and not self._open():
            return False
        status = os.fstat(self._descriptor)
        if not status.st_nlink and status.st_size < self.size:
            raise RemoteProtocolError(f"{self.path.name} is gone after {status.st_size} of {self.size} bytes")
        grew, self._have = status.st_size > self._have, status.st_size
        return grew

    def _open(self) -> bool:
        # In this order: it may be renamed between the two.
        for path in (self.path.with_name(f"{self.path.name}.part"), self.path):
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise RemoteProtocolError(f"{path.name}: {error.strerror}") from error
            return True
        return False
