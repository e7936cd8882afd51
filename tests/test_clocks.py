"""Whoever sets a clock changes dates in logs and the validity of certificates, and nothing else (invariant L4)."""

import ast
from pathlib import Path

import pytest

import hypha

PACKAGE = Path(hypha.__file__).parent
# Who may look at the wall clock, and what for. Leases, rounds, retries and holds count on `runtime.now()`.
USES = {
    "certutil.py": "certificates' dates",
    "network/gossip.py": "first sequence number of a node's announcements: any that its last life did not use will do",
    "network/relay.py": "what py-libp2p says of a reservation; renewed at the latest after RENEW_MAX_S",
    "pki/authority.py": "dates of what is issued",
    "pki/identity.py": "dates of what is loaded",
    "telemetry/tracing.py": "when a span began, of which is known only later where it belongs",
}
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}
WALL_CLOCKS = {"CLOCK_REALTIME", "CLOCK_TAI"}


def looks(tree):
    """Return the lines on which the wall clock is asked."""
    asked = {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in WALL
    }
    named = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in WALL_CLOCKS}
    imported = {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "time" and {n.name for n in node.names} & {"time"}
    }
    return sorted(asked | named | imported)


def test_the_wall_clock_is_asked_only_where_a_date_is_meant():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := looks(ast.parse(path.read_text())))
    }
    assert sorted(found) == sorted(USES), found


@pytest.mark.parametrize(
    "line", ["time.time()", "x = datetime.now(UTC)", "time.clock_gettime(time.CLOCK_REALTIME)", "from time import time"]
)
def test_a_look_at_the_wall_clock_is_found(line):
    assert looks(ast.parse(line)) == [1]
    assert looks(ast.parse("time.monotonic(); runtime.now()")) == []
