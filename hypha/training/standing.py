"""Where a training executor stands, and what it does next: rules only, no files, no tensors.

    events ─▶ Outlook (newest view, updates not yet applied, what is committed, whether it is over)
    Outlook + bases kept + round here ─▶ next_move:

    Finish ◀── over, or a final view                       Train ◀── on the view's base, not yet contributed
    Apply  ◀── an update of a base that is kept            Wait  ◀── contributed, not a member, or update on its way
    Return ◀── the view's base is kept, elsewhere          Fetch ◀── the view's base is neither kept nor on its way
    Ahead  ◀── in place of Wait, where the next round's inner steps may begin before its base is here

Views and updates travel separately, so either may come first. An update that was applied settles all views seen until
then; only a newer one can call the executor back to an earlier round (that round was never committed).
"""

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from hypha.protocol.bridge import Event, RoundCommitted, Stop, UpdateArrived, ViewChanged

# A view whose base we lack is normally followed by the update that leads there; after this, fetch the whole model.
UPDATE_WAIT_S = 10.0
# Or, where links are slow, after so many times what our own update took: both go to or come from the same servers, and
# a model fetched beside an update on its way takes the link from it.
UPDATE_WAIT_PUSHES = 2.0


class Standing(Protocol):
    """What the rules need to know of a kept round."""

    digest: str  # of the base
    contributed: bool  # its update was delivered
    out: bool  # its update is on its way
    ahead: bool  # the next round's inner steps may go on without their base
    early: bool  # its outer update is not to be applied yet


class Train(Struct, frozen=True):
    """Take inner steps on the base where we stand, or send again what was trained on it."""


class Wait(Struct, frozen=True):
    """Nothing to do until an event comes."""


class Ahead(Struct, frozen=True):
    """Take the next round's inner steps, from where this round's have left off."""


class Apply(Struct, frozen=True):
    """Subtract this update from the kept base of its round."""

    update: UpdateArrived


class Return(Struct, frozen=True):
    """Stand on the kept base of this round."""

    round: int


class Fetch(Struct, frozen=True):
    """Fetch the newest view's base."""


class Finish(Struct, frozen=True):
    """Exit 0."""

    reason: str


# A restarted scheduler numbers its views from the beginning, under a higher job epoch.
Order = tuple[int, int]
_BEFORE_ALL: Order = (-1, -1)


def _order(view: ViewChanged) -> Order:
    return view.job_epoch, view.view


Move = Train | Wait | Ahead | Apply | Return | Fetch | Finish


class Outlook:
    """What the events so far add up to."""

    def __init__(self) -> None:
        self.view: ViewChanged | None = None
        self.settled_view = _BEFORE_ALL
        self.updates: dict[int, UpdateArrived] = {}
        self.committed = 0
        self.over: str | None = None
        self.behind_since: float | None = None
        self.push_s = 0.0  # how long our last update took to be delivered

    @property
    def traceparent(self) -> str | None:
        """The trace of the newest view's round."""
        return None if self.view is None else self.view.traceparent

    def take(self, event: Event) -> None:
        """Add one event; older views and lower closes than those known change nothing."""
        match event:
            case ViewChanged():
                if self.view is None or _order(event) > _order(self.view):
                    self.view = event
                    self.committed = max(self.committed, event.committed_round)
            case UpdateArrived():
                known = self.updates.get(event.round)
                if known is None or event.close >= known.close:
                    self.updates[event.round] = event
            case RoundCommitted():
                self.committed = max(self.committed, event.round)
            case Stop():
                self.over = event.reason or "stopped"

    def settle(self) -> None:
        """The views seen so far have had their effect."""
        self.settled_view = _BEFORE_ALL if self.view is None else _order(self.view)
        self.behind_since = None

    def forget_updates_from(self, round_: int) -> None:
        """Their round is open again: only updates that come from now on count."""
        self.updates = {number: update for number, update in self.updates.items() if number < round_}


def next_move(outlook: Outlook, kept: Mapping[int, Standing], here: int, now: float) -> Move:
    """Decide; `here` is the round whose base the executor stands on, `now` in seconds of any monotonic clock."""
    view = outlook.view
    if outlook.over is not None:
        return Finish(outlook.over)
    if view is not None and view.final:
        return Finish("the last round is over")
    update = _applicable(outlook, kept, here)
    if update is not None:
        return Apply(update)
    stay = _stay(kept[here])
    if view is None:
        return stay
    if (view.round, view.base_digest) == (here, kept[here].digest):
        return stay if view.member else Wait()
    if _order(view) <= outlook.settled_view:
        return stay
    return _elsewhere(outlook, view, kept, here, now)


def _stay(base: Standing) -> Move:
    if base.ahead:
        return Ahead()
    return Wait() if base.contributed or base.out else Train()


def _applicable(outlook: Outlook, kept: Mapping[int, Standing], here: int) -> UpdateArrived | None:
    """The newest update whose base is kept and whose result is not."""
    for round_ in sorted(outlook.updates, reverse=True):
        update = outlook.updates[round_]
        base, after = kept.get(round_), kept.get(round_ + 1)
        if round_ > here or base is None or base.digest != update.base_digest or (round_ == here and base.early):
            continue
        if round_ == here or after is None or after.digest != update.model_digest:
            return update
    return None


def _elsewhere(outlook: Outlook, view: ViewChanged, kept: Mapping[int, Standing], here: int, now: float) -> Move:
    target = kept.get(view.round)
    if target is not None and target.digest == view.base_digest:
        return Return(view.round)
    if view.round <= here:
        return Fetch()
    if kept[here].ahead:
        return Ahead()  # there is enough to do until the update comes
    if outlook.behind_since is None:
        outlook.behind_since = now
    patience_s = max(UPDATE_WAIT_S, UPDATE_WAIT_PUSHES * outlook.push_s)
    return Wait() if now - outlook.behind_since < patience_s else Fetch()
