"""Patience: exponential backoff with jitter, and requests that are repeated until somebody answers.

attempt ─▶ answered ─▶ done
    └─ unreachable, or Refused with code "retry" ─▶ wait (doubling, jittered) ─▶ still wanted? ─▶ attempt
"""

from collections.abc import Callable
from typing import TypeVar

import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.breaker import Breakers
from hypha.network.seam import Network
from hypha.protocol.messages import Message, Request
from hypha.runtime import Runtime
from hypha.telemetry import get_logger

log = get_logger("network.retry")
R = TypeVar("R", bound=Message)


class Backoff:
    """Waits that double from `base_s` to `max_s`; each is drawn from the upper half of its range."""

    def __init__(self, runtime: Runtime, *, base_s: float, max_s: float) -> None:
        self._runtime = runtime
        self._base_s = base_s
        self._max_s = max_s
        self._failures = 0

    def reset(self) -> None:
        """Start over: the last attempt succeeded."""
        self._failures = 0

    def next_s(self) -> float:
        """Return the wait before the next attempt, in seconds."""
        ceiling = min(self._max_s, self._base_s * 2 ** min(self._failures, 32))
        self._failures += 1
        wait_s: float = ceiling * (0.5 + 0.5 * self._runtime.random.random())
        return wait_s

    async def wait(self) -> None:
        """Sleep for `next_s()`."""
        await self._runtime.sleep(self.next_s())


async def attempt(network: Network, peer_id: str, message: Request[R], *, patience_s: float) -> R:
    """Make one request; silence for `patience_s` is a PeerUnreachable like any other."""
    with trio.move_on_after(patience_s):
        return await network.request(peer_id, message)
    raise PeerUnreachable(f"{peer_id} did not answer {type(message).__name__} within {patience_s:g} s")


async def insist(
    network: Network,
    peer_id: str,
    message: Request[R],
    *,
    backoff: Backoff,
    patience_s: float,
    still_wanted: Callable[[], bool],
    breakers: Breakers | None = None,
) -> R | None:
    """Repeat a request until it is answered, or return None once it is not wanted any more.

    With `breakers`, a peer that answered nobody here lately is left alone for a while first. Raises Refused (and any
    RemoteProtocolError) at the first answer that repeating would not change.
    """
    while still_wanted():
        try:
            return await _attempt_if_let(network, peer_id, message, patience_s=patience_s, breakers=breakers)
        except PeerUnreachable:
            await backoff.wait()
        except Refused as refusal:
            if refusal.code not in ("retry", "busy"):
                raise
            await backoff.wait()
    return None


async def _attempt_if_let(
    network: Network, peer_id: str, message: Request[R], *, patience_s: float, breakers: Breakers | None
) -> R:
    if breakers is None:
        return await attempt(network, peer_id, message, patience_s=patience_s)
    await breakers.admitted(peer_id)
    try:
        answer = await attempt(network, peer_id, message, patience_s=patience_s)
    except PeerUnreachable as error:
        if breakers.failed(peer_id):
            log.info("Peer left alone for a while", peer_id=peer_id, reason=str(error))
        raise
    except RemoteProtocolError:
        breakers.worked(peer_id)
        raise
    breakers.worked(peer_id)
    return answer
