"""Messages to the scheduler that must arrive, where only the newest of each kind matters.

    put("collected", A) ─▶ sending A, no answer ─▶ put("collected", B) ─▶ A is given up, B is sent ─▶ answered

Each key has its own sender, so a Ready that is not answered holds up no Progress.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hypha.errors import Refused
from hypha.protocol.messages import Message, Request
from hypha.telemetry import get_logger

log = get_logger("worker.outbox")

Insist = Callable[[str, Request[Any], Callable[[], bool]], Awaitable[Message | None]]
Answered = Callable[[Request[Any], Message], None]


class Outbox:
    """The newest message under each key, repeated until answered. Keys are few: kinds, and rounds being evaluated."""

    def __init__(self, peer_id: str, insist: Insist, *, answered: Answered | None = None) -> None:
        self._peer_id = peer_id
        self._insist = insist
        self._answered = answered
        self._newest: dict[str, Request[Any]] = {}
        self._fresh = trio.Event()

    def put(self, key: str, message: Request[Any]) -> None:
        """Send this; what was waiting under the same key is superseded."""
        self._newest[key] = message
        self._fresh.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        sending: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for key in [key for key in self._newest if key not in sending]:
                    sending.add(key)
                    nursery.start_soon(self._deliver, key, sending)
                self._fresh = trio.Event()
                await self._fresh.wait()

    async def _deliver(self, key: str, sending: set[str]) -> None:
        while (message := self._newest.get(key)) is not None:
            await self._send(key, message)
            if self._newest.get(key) is message:
                del self._newest[key]
        sending.discard(key)

    async def _send(self, key: str, message: Request[Any]) -> None:
        try:
            answer = await self._insist(self._peer_id, message, lambda: self._newest.get(key) is message)
        except Refused as refusal:
            log.info("Report refused", kind=type(message).__name__, reason=str(refusal))
            return
        if answer is not None and self._answered is not None:
            self._answered(message, answer)
