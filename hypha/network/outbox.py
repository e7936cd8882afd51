"""Messages that must arrive, where only the newest of each kind to each peer matters.

    put(peer, "view", A) ─▶ sending A, no answer ─▶ put(peer, "view", B) ─▶ A is given up, B is sent ─▶ answered

Each (peer, key) has its own sender: a peer that is away holds up nobody else, and no Ready holds up a Progress.
"""

from collections.abc import Callable
from typing import Any

import trio

from hypha.errors import Refused, RemoteProtocolError
from hypha.network.breaker import Breakers
from hypha.network.retry import Backoff, insist
from hypha.network.seam import Network
from hypha.protocol.messages import Message, Request
from hypha.telemetry import get_logger

log = get_logger("network.outbox")

Answered = Callable[[str, Request[Any], Message], None]
Key = tuple[str, str]


class Outbox:
    """The newest message under each (peer, key), repeated until answered or refused; bounded by peers times kinds."""

    def __init__(
        self,
        network: Network,
        *,
        backoff: Callable[[], Backoff],
        patience_s: float,
        answered: Answered | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        self._network = network
        self._breakers = breakers
        self._backoff = backoff
        self._patience_s = patience_s
        self._answered = answered
        self._newest: dict[Key, Request[Any]] = {}
        self._fresh = trio.Event()

    def put(self, peer_id: str, key: str, message: Request[Any]) -> None:
        """Send this; what was waiting under the same key is superseded."""
        self._newest[peer_id, key] = message
        self._fresh.set()

    def drop(self, peer_id: str) -> None:
        """Give up everything to a peer: its lease is gone."""
        for key in [key for key in self._newest if key[0] == peer_id]:
            del self._newest[key]

    async def run(self) -> None:
        """Deliver until cancelled."""
        sending: set[Key] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for key in [key for key in self._newest if key not in sending]:
                    sending.add(key)
                    nursery.start_soon(self._deliver, key, sending)
                self._fresh = trio.Event()
                await self._fresh.wait()

    async def _deliver(self, key: Key, sending: set[Key]) -> None:
        while (message := self._newest.get(key)) is not None:
            await self._send(key, message)
            if self._newest.get(key) is message:
                del self._newest[key]
        sending.discard(key)

    async def _send(self, key: Key, message: Request[Any]) -> None:
        try:
            answer = await insist(
                self._network,
                key[0],
                message,
                backoff=self._backoff(),
                patience_s=self._patience_s,
                still_wanted=lambda: self._newest.get(key) is message,
                breakers=self._breakers,
            )
        except Refused as refusal:
            # What came when its round was over was overtaken, as the last report of every round may be.
            say = log.debug if refusal.code == "stale" else log.info
            say("Message refused", kind=type(message).__name__, peer_id=key[0], reason=str(refusal))
            return
        except RemoteProtocolError as error:
            # A broken answer would not mend by asking again, and one broken peer must not stop the others' messages.
            log.warn("Message answered badly", kind=type(message).__name__, peer_id=key[0], reason=str(error))
            return
        if answer is not None and self._answered is not None:
            self._answered(key[0], message, answer)
