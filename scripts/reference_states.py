"""docs/reference/states.md: the state machines, drawn from their transition tables."""

from collections.abc import Mapping
from enum import Enum
from types import ModuleType

from hypha.protocol import holder, lease
from scripts.reference_words import GENERATED, drawing, table


def states_page() -> str:
    """Return the page."""
    lines = [GENERATED, "", "# States", ""]
    lines += [
        "What is not drawn cannot happen: an event that a state has no entry for is an error, and changes nothing.",
        "",
    ]
    lines += _section("A lease at its grantor, the worker", lease, lease.TRANSITIONS)
    lines += _section("A lease at its holder, the scheduler", holder, holder.HOLDER_TRANSITIONS)
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, module: ModuleType, transitions: Mapping[tuple[Enum, Enum], Enum]) -> list[str]:
    first, events = next(iter(transitions))[0], list(type(next(iter(transitions))[1]))
    ends = [state for state in type(first) if not any(before is state for before, _ in transitions)]
    lines = [f"## {title}", "", "```mermaid", "stateDiagram-v2", f"    [*] --> {first.value}"]
    lines += [f"    {before.value} --> {after.value}: {event.value}" for (before, event), after in transitions.items()]
    lines += [f"    {state.value} --> [*]" for state in ends] + ["```", ""]
    rows = [
        [f"**{state.value}**", *(_cell(transitions.get((state, event))) for event in events)]
        for state in type(first)
        if state not in ends
    ]
    lines += table(["", *(event.value for event in events)], rows)
    return [*lines, "", *drawing(module)]


def _cell(state: Enum | None) -> str:
    return "" if state is None else str(state.value)
