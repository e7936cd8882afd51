"""What is timed of a round, in the trace of that round.

An executor begins a round as soon as it has the outer update that leads there; the view that names the round's trace
comes when the step before is durable, and may come later.
"""

from contextlib import AbstractContextManager

from hypha.telemetry import span_afterwards, span_from
from hypha.training.standing import Outlook


def timed(outlook: Outlook, name: str, round_: int) -> AbstractContextManager[object]:
    """Time a block of round `round_`, under its trace as it is known now or, failing that, at the block's end."""
    view = outlook.view
    if view is not None and view.round >= round_:
        return span_from(view.traceparent, name, round=round_)
    return span_afterwards(lambda: outlook.traceparent, name, round=round_)
