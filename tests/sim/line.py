"""The executor's end of a simulated bridge: the calls of `hypha.training.session`, as trio tasks instead of HTTP.

fetch, send, report ─▶ JSON ─▶ the worker's real JobSession ─▶ JSON ─▶ answer, or BridgeRefused(retry)
events ◀─ JSON ◀─ JobSession.events(), one reader
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

from hypha.errors import HyphaError, Refused
from hypha.protocol.bridge import Event, Fetch, Fetched, Instruction, Report, Send, Sent
from hypha.runtime import Runtime
from hypha.worker.bridge import JobSession, may_pass

# A round trip over the Unix socket.
TRIP_S = 0.001
# While the worker says "later": first pause, then doubled up to the longest, as the real session has them.
RETRY_S = 0.1
RETRY_S_MAX = 2.0
# What an executor that computes nonsense makes of an update.
Spoil = Callable[[Send], Send]


class BridgeRefused(Refused):
    """The worker answered no. `retry`: the same request may succeed later."""

    def __init__(self, reason: str, *, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class Line:
    """One executor's connection to its worker; `run` reads the events."""

    def __init__(self, session: JobSession, runtime: Runtime, spoil: Spoil = lambda update: update) -> None:
        self._spoil = spoil
        self._session = session
        self._runtime = runtime
        self._events: deque[Event] = deque()
        self._more = trio.Event()
        self.is_sending = False

    async def run(self) -> None:
        """Read events until the job ends."""
        async for event in self._session.events():
            self._events.append(_through_json(event, Event))
            self._more.set()

    async def fetch(self, request: Fetch) -> Fetched:
        """Have the worker bring something. Raises BridgeRefused."""
        answer: Fetched = await self._call(self._session.fetch, request, Fetch, Fetched)
        return answer

    async def fetch_patiently(self, request: Fetch, *, leave: Callable[[], bool] = lambda: False) -> Fetched:
        """`fetch`, again while the worker says "later" and `leave` is false. Raises BridgeRefused."""
        pause = RETRY_S
        while True:
            try:
                return await self.fetch(request)
            except BridgeRefused as refusal:
                if not refusal.retry or leave():
                    raise
            await self._runtime.sleep(pause)
            pause = min(2 * pause, RETRY_S_MAX)

    async def send(self, request: Send) -> Sent:
        """Deliver an update. Raises BridgeRefused."""
        self.is_sending = True
        try:
            answer: Sent = await self._call(self._session.send, self._spoil(request), Send, Sent)
        finally:
            self.is_sending = False
        return answer

    async def report(self, report: Report) -> Instruction:
        """Say how it goes. Raises BridgeRefused."""
        answer: Instruction = await self._call(self._session.report, report, Report, Instruction)
        return answer

    def drain(self) -> list[Event]:
        """Return what has arrived, without waiting."""
        events = list(self._events)
        self._events.clear()
        return events

    async def next_event(self, timeout_s: float) -> Event | None:
        """Wait for one event, None after `timeout_s`."""
        with trio.move_on_after(timeout_s):
            while not self._events:
                self._more = trio.Event()
                await self._more.wait()
        return self._events.popleft() if self._events else None

    async def _call(self, call: Callable[[Any], Awaitable[Any]], message: Any, kind: Any, reply: Any) -> Any:
        await self._runtime.sleep(TRIP_S)
        try:
            return _through_json(await call(_through_json(message, kind)), reply)
        except HyphaError as error:
            raise BridgeRefused(str(error), retry=may_pass(error)) from error


def _through_json(message: Any, kind: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(message), type=kind)
