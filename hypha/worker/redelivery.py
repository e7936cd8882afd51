"""An update that was delivered is delivered again where a later view of its round names another parameter server.

SendUpdate accepted by s1 ─▶ s1 dies ─▶ view of the same round with s2 ─▶ pushed to s2, while the executor still waits
"""

from collections.abc import Awaitable, Callable

from hypha.errors import RemoteProtocolError
from hypha.protocol import bridge
from hypha.protocol.messages import Member, RoundView
from hypha.telemetry import get_logger
from hypha.worker.session import Session

log = get_logger("worker.session")


class Redelivery:
    """Remembers the newest delivered update of one session.

    `push` sends it to every server of the newest view but those that hold it, and `pushed_to` tells who holds it then.
    """

    def __init__(
        self,
        session: Session,
        push: Callable[[bridge.SendUpdate, tuple[Member, ...]], Awaitable[bridge.Sent]],
        pushed_to: Callable[[], tuple[Member, ...]],
    ) -> None:
        self._session = session
        self._push = push
        self._pushed_to = pushed_to
        self._update: bridge.SendUpdate | None = None
        self._holders: tuple[Member, ...] = ()

    def delivered(self, update: bridge.SendUpdate) -> None:
        """Every server that it was just pushed to holds this."""
        self._update, self._holders = update, self._pushed_to()
        self._session.wake()

    def covers(self, view: RoundView) -> bool:
        """Whether the update delivered last is of this view's round."""
        update = self._update
        return update is not None and (view.round, view.base_digest) == (update.round, update.base_digest)

    def _is_due(self) -> bool:
        view = self._session.view
        if view is None or not self.covers(view):
            return False
        return bool(set(view.servers) - set(self._holders))

    async def run(self) -> None:
        """Deliver again whenever it is due, until cancelled."""
        while True:
            await self._session.until(self._is_due)
            update = self._update
            assert update is not None, "it is due"
            log.info("Update sent again", round=update.round)
            try:
                answer = await self._push(update, self._holders)
            except RemoteProtocolError as error:
                log.warn("Update not sent again", round=update.round, reason=str(error))
                self._update = None
                continue
            if isinstance(answer, bridge.SendAccepted) and self._update is update:
                self.delivered(update)
            elif self._update is update:
                self._update = None
