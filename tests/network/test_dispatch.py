"""What happens to a message before and after its handler, without any network: bounds, roles, blame, traces."""

import itertools
import logging

import cbor2
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from hypha.errors import LocalProtocolError, PeerUnreachable, Refused, RemoteProtocolError, StoreError
from hypha.network import dispatch
from hypha.network.dispatch import Dispatcher, interpret, prepare, reply_types
from hypha.network.framing import MessageFraming, framed, receive_frame
from hypha.network.seam import Peer
from hypha.network.topics import ANNOUNCEMENTS_BUFFERED_MAX, Topics
from hypha.protocol.codec import MESSAGE_BYTES_MAX, decode, encode
from hypha.protocol.messages import (
    Ack,
    Continue,
    Done,
    Failure,
    FetchSlice,
    Health,
    HealthReport,
    JobStatus,
    LeaseGone,
    Message,
    NoMore,
    Progress,
    Renewed,
    RenewLease,
    Request,
    SyncAfter,
)
from hypha.telemetry import current_trace_id, metrics, span, tracing
from tests.network.cast import ack, fetch, status

PEER = Peer("12D3KooWpeer", frozenset({"worker"}))
RENEWAL = RenewLease(lease_id="l", fence=1, job_epoch=1, attempt=1)


class Wire(MessageFraming):
    """A stream whose peer has sent everything already; notes what becomes of our side."""

    def __init__(self, incoming: bytes = b"", *, piece: int = 1 << 20, endless: bool = False) -> None:
        self.peer = PEER
        self.sent = bytearray()
        self.ends: list[str] = []
        self.taken = 0
        self._incoming = incoming
        self._piece = piece
        self._endless = endless

    async def send_all(self, data) -> None:
        self.sent += data

    async def receive_some(self, bytes_max: int) -> bytes:
        size = min(bytes_max, self._piece)
        if self._endless and not self._incoming:
            await trio.lowlevel.checkpoint()
            self.taken += size
            return bytes(size)
        taken, self._incoming = self._incoming[:size], self._incoming[size:]
        return taken

    async def send_eof(self) -> None:
        self.ends.append("eof")

    async def aclose(self) -> None:
        self.ends.append("closed")

    def said(self) -> Message:
        return decode(bytes(self.sent[4:]))


async def answer(dispatcher: Dispatcher, message: Message | bytes, peer: Peer = PEER) -> Message:
    return decode(await dispatcher.handle(peer, message if isinstance(message, bytes) else encode(message)))


async def failure(dispatcher: Dispatcher, message: Message | bytes) -> Failure:
    reply = await answer(dispatcher, message)
    assert isinstance(reply, Failure)
    return reply


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff\x00garbage", "malformed"),
        (b"", "malformed"),
        (cbor2.dumps({"type": "NoSuchMessage"}), "malformed"),
        (cbor2.dumps({"type": "RenewLease", "lease_id": 7}), "malformed"),
        (bytes(MESSAGE_BYTES_MAX + 1), "oversized"),
        (encode(Health()), "unknown"),
    ],
)
async def test_what_cannot_be_handled_is_refused_counted_and_logged_once_per_peer(caplog, data, code):
    dispatcher, before = Dispatcher(), metrics.MESSAGES_REFUSED.total()
    for _ in range(3):
        assert (await failure(dispatcher, data)).code == code
    assert isinstance(await answer(dispatcher, data, Peer("another", frozenset())), Failure)
    assert metrics.MESSAGES_REFUSED.total() == before + 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


async def test_a_kind_has_one_handler():
    dispatcher = Dispatcher()
    dispatcher.serve(JobStatus, ack)
    with pytest.raises(LocalProtocolError, match="JobStatus"):
        dispatcher.serve(JobStatus, ack)


async def test_roles_are_named_in_the_refusal():
    dispatcher = Dispatcher()
    dispatcher.serve(JobStatus, ack, roles=frozenset({"scheduler", "gateway"}))
    refusal = await failure(dispatcher, status())
    assert (refusal.code, refusal.reason) == (
        "forbidden",
        "JobStatus is for the role gateway or scheduler; you hold worker",
    )


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Refused("not today"), "refused", "not today"),
        (Refused("come again", code="busy"), "busy", "come again"),
        (RemoteProtocolError("round 3 was never opened"), "malformed", "round 3 was never opened"),
        (StoreError("/secret/path: No space left"), "internal", None),
        (KeyError("bug"), "internal", None),
        (ExceptionGroup("tasks", [ValueError("bug")]), "internal", None),
    ],
)
async def test_an_error_of_a_handler_is_an_answer_by_whose_fault_it_is(error, code, reason):
    async def fail(_peer, _message):
        raise error

    dispatcher = Dispatcher()
    dispatcher.serve(JobStatus, fail)
    told = await failure(dispatcher, status())
    assert told.code == code
    assert told.reason == reason or (reason is None and "secret" not in told.reason and "bug" not in told.reason)


async def test_a_bug_in_a_handler_is_logged_with_its_traceback_and_counted(caplog):
    async def fail(_peer, _message):
        raise KeyError("bug")

    dispatcher, before = Dispatcher(), metrics.MESSAGES_REFUSED.total()
    dispatcher.serve(JobStatus, fail)
    await failure(dispatcher, status())
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError
    assert metrics.MESSAGES_REFUSED.total() == before + 1


async def test_cancellation_passes_through_the_bulkhead(autojump_clock):
    async def wait(_peer, _message):
        await trio.sleep_forever()

    dispatcher = Dispatcher()
    dispatcher.serve(JobStatus, wait)
    with trio.move_on_after(1) as scope:
        await dispatcher.handle(PEER, encode(status()))
    assert scope.cancelled_caught


async def test_a_peer_that_asks_too_much_at_once_is_told_busy_and_others_are_served(autojump_clock):
    release = trio.Event()

    async def wait(_peer, _message):
        await release.wait()
        return Ack()

    dispatcher, answers = Dispatcher(), []
    dispatcher.serve(JobStatus, wait)

    async def ask(peer):
        answers.append(await answer(dispatcher, status(), peer))

    async with trio.open_nursery() as nursery:
        for _ in range(dispatch.REQUESTS_PER_PEER_MAX):
            nursery.start_soon(ask, PEER)
        await trio.testing.wait_all_tasks_blocked()
        assert (await failure(dispatcher, status())).code == "busy"
        nursery.start_soon(ask, Peer("another", frozenset()))
        await trio.testing.wait_all_tasks_blocked()
        release.set()
    assert answers == [Ack()] * (dispatch.REQUESTS_PER_PEER_MAX + 1)
    assert await answer(dispatcher, status()) == Ack()


async def test_a_reason_beyond_the_limit_is_cut_not_lost():
    async def refuse(_peer, _message):
        raise Refused("x" * 100_000)

    dispatcher = Dispatcher()
    dispatcher.serve(JobStatus, refuse)
    assert (await failure(dispatcher, status())).reason == "x" * 8192


# --- the side that asks ----------------------------------------------------------------------------------------------


def test_every_request_declares_what_answers_it():
    assert reply_types(Health) == (HealthReport,)
    assert reply_types(RenewLease) == (Renewed, LeaseGone)
    assert reply_types(Progress) == (Continue, SyncAfter, Done)
    kinds = [kind for kind in dispatch_kinds(Request) if "[" not in kind.__name__]
    assert len(kinds) > 10
    for kind in kinds:
        assert all(issubclass(reply, Message) for reply in reply_types(kind))


def dispatch_kinds(kind):
    children = kind.__subclasses__()
    return list(itertools.chain.from_iterable(map(dispatch_kinds, children))) if children else [kind]


def test_an_answer_is_interpreted_by_what_was_asked():
    renewed = Renewed(lease_id="l", remaining_s=3.0)
    assert interpret("p", RENEWAL, encode(renewed)) == renewed
    with pytest.raises(Refused, match=r"^full$") as refusal:
        interpret("p", RENEWAL, encode(Failure(code="busy", reason="full")))
    assert refusal.value.code == "busy"
    with pytest.raises(RemoteProtocolError, match="p answered RenewLease with Ack"):
        interpret("p", RENEWAL, encode(Ack()))
    with pytest.raises(RemoteProtocolError, match="p answered RenewLease badly"):
        interpret("p", RENEWAL, b"\xff")


async def test_a_trace_goes_on_in_the_handler_of_whoever_is_asked():
    tracing.activate(TracerProvider().get_tracer("test"))
    try:
        traces = []

        async def note(_peer, _message):
            traces.append(current_trace_id())
            return Ack()

        dispatcher = Dispatcher()
        dispatcher.serve(JobStatus, note)
        with span("asking") as asking:
            request = prepare(status())
        assert request.traceparent == asking.traceparent
        assert prepare(request) is request
        assert await answer(dispatcher, request) == Ack()
        assert traces == [asking.traceparent[3:35]]
    finally:
        tracing.deactivate()
    assert prepare(status()).traceparent is None


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_ends_cleanly_after_its_handler():
    dispatcher, wire = Dispatcher(), Wire(framed(encode(fetch("one"))))

    async def serve(stream, header):
        await stream.send_message(NoMore(round=len(header.slice)))

    dispatcher.accept_streams(FetchSlice, serve)
    await dispatcher.handle_stream(wire)
    assert wire.said() == NoMore(round=3)
    assert wire.ends == ["eof", "closed"]


@pytest.mark.parametrize(
    ("incoming", "code"),
    [
        (framed(encode(Health())), "unknown"),
        (framed(b"\xff"), "malformed"),
        (b"\xff\xff\xff\xff", "malformed"),
        (b"\x00\x00\x00\x00", "malformed"),
        (b"\x00\x00", "malformed"),
    ],
)
async def test_a_stream_that_begins_badly_is_told_so(incoming, code):
    wire = Wire(incoming)
    await Dispatcher().handle_stream(wire)
    said = wire.said()
    assert isinstance(said, Failure)
    assert said.code == code
    assert wire.ends == ["eof", "closed"]


async def test_a_stream_that_says_nothing_does_not_hold_its_slot(autojump_clock):
    class Mute(Wire):
        async def receive_some(self, bytes_max: int) -> bytes:
            await trio.sleep_forever()

    wire = Mute()
    await Dispatcher().handle_stream(wire)
    assert "no header" in wire.said().reason
    assert trio.current_time() <= dispatch.HEADER_PATIENCE_S + dispatch.LINGER_S


async def test_a_failed_handler_resets_its_stream_without_a_last_word(caplog):
    async def fail(stream, _header):
        await stream.send_all(b"half")
        raise KeyError("bug")

    dispatcher, wire = Dispatcher(), Wire(framed(encode(fetch())))
    dispatcher.accept_streams(FetchSlice, fail)
    await dispatcher.handle_stream(wire)
    assert (bytes(wire.sent), wire.ends) == (b"half", ["closed"])
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_stream_that_breaks_under_its_handler_is_nobodys_bug(caplog):
    async def broken(_stream, _header):
        raise PeerUnreachable("gone")

    dispatcher, wire = Dispatcher(), Wire(framed(encode(fetch())))
    dispatcher.accept_streams(FetchSlice, broken)
    await dispatcher.handle_stream(wire)
    assert wire.ends == ["closed"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_peer_that_never_stops_sending_is_swallowed_only_so_far(autojump_clock):
    async def refuse(_stream, _header):
        raise Refused("too late")

    dispatcher, wire = Dispatcher(), Wire(framed(encode(fetch())), endless=True)
    dispatcher.accept_streams(FetchSlice, refuse)
    await dispatcher.handle_stream(wire)
    assert wire.said() == Failure(code="refused", reason="too late")
    assert wire.ends == ["eof", "closed"]
    assert wire.taken == dispatch.LINGER_BYTES_MAX


@given(st.lists(st.integers(0, 200), max_size=5), st.integers(1, 64))
def test_frames_are_found_however_the_bytes_are_cut(sizes, piece):
    messages = [NoMore(round=size) for size in sizes]

    async def read() -> None:
        wire = Wire(b"".join(framed(encode(message)) for message in messages) + b"raw", piece=piece)
        assert [await wire.receive_message(NoMore) for _ in messages] == messages
        assert await wire.receive_some(1) == b"r"

    trio.run(read)


async def test_an_end_between_frames_is_clean_and_inside_one_is_not():
    assert await receive_frame(Wire(b"")) is None
    for cut in range(1, 7):
        with pytest.raises(RemoteProtocolError, match="ended"):
            await receive_frame(Wire(framed(b"abc")[:cut]))


async def test_a_frame_beyond_the_limit_is_refused_before_any_of_it_is_read():
    wire = Wire((101).to_bytes(4, "big") + bytes(101))
    with pytest.raises(RemoteProtocolError, match="101 bytes; the limit is 100"):
        await receive_frame(wire, bytes_max=100)
    assert len(await wire.receive_some(1000)) == 101


# --- topics ----------------------------------------------------------------------------------------------------------


async def test_a_topic_keeps_the_newest_for_each_of_its_readers():
    topics = Topics(Dispatcher().refusals)
    async with topics.subscribe("t") as one, topics.subscribe("t") as two:
        for number in range(ANNOUNCEMENTS_BUFFERED_MAX + 2):
            assert topics.hear("t", PEER, encode(NoMore(round=number)))
        assert not topics.hear("t", PEER, b"\xff")
        assert topics.hear("other", PEER, encode(Ack()))
        assert await anext(one) == (PEER, NoMore(round=2))
        assert await anext(two) == (PEER, NoMore(round=2))
        assert topics.topics() == ["t"]
    assert topics.topics() == []
