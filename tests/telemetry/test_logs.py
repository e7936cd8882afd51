"""Log lines: what they hold, which are wanted, and how libraries are tamed."""

import io
import json
import logging
import re

import pytest

from hypha import telemetry
from hypha.errors import ConfigError
from hypha.telemetry.loglevels import TRACE, LogFilter, parse_filter
from hypha.telemetry.logoutput import install
from hypha.telemetry.logs import ChangeLogger, OncePerKey, RateLimited, get_logger


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def untouched_libp2p():
    """Its loggers as they are before anybody has imported it, which other tests of the same run have."""
    names = ["libp2p", *(name for name in logging.root.manager.loggerDict if name.startswith("libp2p."))]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def written(untouched_libp2p):
    """Route all loggers as `HYPHA_LOG=<text>` would; call the result for the parsed lines."""
    undo = []

    def route(text: str = "", stream: io.StringIO | None = None):
        out = io.StringIO() if stream is None else stream
        undo.append(install("hypha-worker", parse_filter(text), stream=out))
        return lambda: [json.loads(line) for line in out.getvalue().splitlines()]

    yield route
    for step in undo:
        step()


def test_a_line_is_json_with_the_manuals_keys_in_the_manuals_order(written):
    lines = written()
    get_logger("network").info("Lease renewed successfully", worker_peer_id="12D3", lease_id="550e", count=3)
    (line,) = lines()
    assert list(line) == [
        "timestamp",
        "level",
        "component",
        "message",
        "worker_peer_id",
        "lease_id",
        "count",
        "logger",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert (line["level"], line["component"], line["count"]) == ("info", "hypha-worker", 3)


def test_fields_cannot_pretend_to_be_ours_and_strange_values_become_text(written):
    lines = written()
    get_logger("x").warn("100 % odd", level="error", where={1}, share=float("nan"), text="é\n")
    (line,) = lines()
    assert (line["level"], line["level_"]) == ("warn", "error")
    assert (line["message"], line["where"], line["share"], line["text"]) == ("100 % odd", "{1}", "nan", "é\n")


def test_long_texts_are_clipped(written):
    lines = written()
    get_logger("x").info("m" * 10_000, field="f" * 10_000)
    (line,) = lines()
    assert len(line["message"]) < 4200
    assert line["field"].endswith("… (10000 characters)")


def test_an_exception_of_ours_comes_with_its_traceback_in_one_line(written):
    lines = written()
    try:
        int("disk")
    except ValueError:
        get_logger("store").exception("Journal not written", path="/x")
    (line,) = lines()
    assert (line["level"], line["exception"]) == ("error", "ValueError: invalid literal for int() with base 10: 'disk'")
    assert "Traceback" in line["stack"]


def test_a_line_inside_a_span_names_its_trace(config, collector_off):
    with telemetry.span("round") as span:
        get_logger("x").info("inside")
    get_logger("x").info("outside")
    inside, outside = collector_off()
    assert inside["trace_id"] == span.traceparent.split("-")[1]
    assert "trace_id" not in outside


def test_the_filter_follows_module_prefixes(written):
    lines = written("info,network=debug,network.rpc=error,scheduler=trace")
    get_logger("network.dht").debug("a")
    get_logger("network.rpc").warn("b")
    get_logger("worker").debug("c")
    get_logger("scheduler.pool").trace("d")
    assert [(line["message"], line["level"]) for line in lines()] == [("a", "debug"), ("d", "trace")]


def test_the_manuals_own_spelling_is_understood():
    assert parse_filter("hypha=info,hypha_network=debug") == LogFilter(20, {"hypha.network": 10})
    assert parse_filter(" warn , libp2p.host=trace") == LogFilter(30, {"libp2p.host": TRACE})


@pytest.mark.parametrize("text", ["loud", "network=", "network=verbose", "=debug", "net work=info", "info,,x=5"])
def test_a_filter_that_makes_no_sense_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="HYPHA_LOG"):
        parse_filter(text)


def test_libraries_speak_from_warn_and_libp2p_never_louder(written):
    lines = written("trace")
    logging.getLogger("libp2p.host").error("dial to %s failed", "peer")
    logging.getLogger("libp2p.host").info("chatter")
    logging.getLogger("hypercorn.error").error("broken")
    assert [(line["logger"], line["level"], line["message"]) for line in lines()] == [
        ("libp2p.host", "warn", "dial to peer failed"),
        ("hypercorn.error", "error", "broken"),
    ]


def test_a_demoted_exception_is_one_sentence_without_traceback(written):
    lines = written()
    try:
        int("stream")
    except ValueError:
        logging.getLogger("libp2p.network").exception("negotiation failed")
    (line,) = lines()
    assert line["exception"] == "ValueError: invalid literal for int() with base 10: 'stream'"
    assert "stack" not in line


def test_libp2p_named_in_the_filter_keeps_its_levels(written):
    lines = written("libp2p=error")
    logging.getLogger("libp2p.host").error("a")
    logging.getLogger("libp2p.host").warning("b")
    assert [(line["message"], line["level"]) for line in lines()] == [("a", "error")]


def test_a_logger_cut_off_from_the_root_still_arrives_as_json(written):
    lines = written()
    library = logging.getLogger("libp2p")
    handlers, library.handlers = library.handlers, []  # pytest's own, where libp2p was imported before
    library.propagate = False  # as importing libp2p does
    try:
        logging.getLogger("libp2p.relay").warning("lost")
    finally:
        library.propagate, library.handlers = True, handlers
    assert [line["logger"] for line in lines()] == ["libp2p.relay"]


def test_a_terminal_gets_readable_lines_and_no_control_characters(written):
    out = Terminal()
    written(stream=out)
    get_logger("network.rpc").warn("Refused", peer="\x1b[2Jevil")
    text = out.getvalue()
    assert re.fullmatch(r"\d\d:\d\d:\d\d warn  network\.rpc: Refused peer=\\x1b\[2Jevil\n", text)


def test_putting_back_leaves_the_root_logger_as_it_was():
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.lastResort)
    put_back = install("hypha-worker", parse_filter("debug"), stream=io.StringIO())
    assert len(root.handlers) == len(before[0]) + 1
    put_back()
    assert (root.handlers, root.level, logging.lastResort) == before


def test_a_reason_is_logged_when_it_changes_and_only_then(written):
    lines = written()
    changes = ChangeLogger(get_logger("scheduler"))
    for reason in ("2 of 3 workers", "2 of 3 workers", "3 of 3 workers", "2 of 3 workers"):
        changes.log_when_changed("round 4", reason)
    changes.forget("round 4")
    changes.log_when_changed("round 4", "2 of 3 workers")
    assert [line["message"][0] for line in lines()] == ["2", "3", "2", "2"]
    assert {line["about"] for line in lines()} == {"round 4"}


def test_once_per_key_remembers_a_bounded_number_of_keys(written):
    lines = written()
    once = OncePerKey(get_logger("network"), keys_max=2)
    logged = [once.log(key, "Old protocol", peer=key) for key in ("a", "a", "b", "c", "b", "a")]
    assert logged == [True, False, True, True, False, True]
    assert len(lines()) == 4


def test_a_rate_limited_line_says_how_many_it_kept_back(written):
    lines = written()
    times = iter([0.0, 1.0, 59.0, 60.0])
    limited = RateLimited(get_logger("telemetry"), 60.0, clock=lambda: next(times))
    logged = [limited.log("No collector") for _ in range(4)]
    assert logged == [True, False, False, True]
    assert lines()[1]["kept_back"] == 2
