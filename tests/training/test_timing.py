"""In which trace a round's operations are: its own, also where that is named after they have begun."""

from hypha import telemetry
from hypha.protocol.bridge import ViewChanged
from hypha.training.standing import Outlook
from hypha.training.timing import timed


def view(round_):
    trace = f"00-{round_:032x}-{round_:016x}-03"
    return ViewChanged(
        view=round_, round=round_, base_digest="0" * 64, member=True, committed_round=round_ - 1, traceparent=trace
    )


def test_a_round_that_begins_before_its_view_is_in_its_own_trace(exported):
    outlook = Outlook()
    outlook.take(view(1))
    with timed(outlook, "inner_steps", 2):
        outlook.take(view(2))
    (span,) = exported()
    assert (span.name, span.context.trace_id, span.attributes["round"]) == ("inner_steps", 2, 2)


def test_a_round_whose_view_is_here_is_the_parent_of_what_happens_in_it(exported):
    outlook = Outlook()
    outlook.take(view(2))
    with timed(outlook, "inner_steps", 2), telemetry.span("within"):
        pass
    within, span = exported()
    assert within.parent.span_id == span.context.span_id
    assert span.context.trace_id == 2
