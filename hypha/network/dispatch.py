"""What every network does with a message from a peer, whatever carried it, and with a peer's answer.

    bytes ─▶ slot? ─▶ decode ─▶ handler? ─▶ role? ─▶ span ─▶ handler ─▶ reply of the declared type ─▶ bytes
              busy    oversized   unknown   forbidden          │
                      malformed                                ├─ Refused(reason)      the handler's no
              each is a Failure for the peer, is counted,      ├─ RemoteProtocolError  malformed: the peer's fault
              and is logged once per peer                      └─ any other Exception  internal: a bug here

Here stands the one blind `except Exception` of the product (BLE001, exempt in the tidy test): a handler that fails in
a way it did not foresee must not take down a node that serves others, nor go unseen. It is logged with its traceback
at error level, counted as `internal`, and told to the peer without details. Cancellation passes through.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import msgspec
import trio

from hypha.errors import LocalProtocolError, PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.framing import receive_frame
from hypha.network.seam import Peer, RequestHandler, Stream, StreamHandler
from hypha.protocol.codec import MESSAGE_BYTES_MAX, decode, encode
from hypha.protocol.messages import Failure, Message, Request
from hypha.telemetry import OncePerKey, get_logger, inject, metrics, span_from

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

log = get_logger("network")

# Handlers wait on disks and on other peers, so many may be under way; beyond this a node only collects timeouts.
REQUESTS_MAX = 1024
# One peer never needs more at once (a scheduler sends a handful to each worker); a broken one must not starve others.
REQUESTS_PER_PEER_MAX = 64
# A stream holds buffers of a few MiB on both sides.
STREAMS_MAX = 256
STREAMS_PER_PEER_MAX = 32
# The header is the first thing on a stream: whoever has not sent it by then holds a slot for nothing.
HEADER_PATIENCE_S = 10.0
# After its handler a stream waits this long, and swallows this much, so that a peer still sending can read our answer.
LINGER_S = 5.0
LINGER_BYTES_MAX = 16 << 20
LINGER_CHUNK_BYTES = 64 << 10
# `messages.Reason` allows no more.
REASON_CHARS_MAX = 8192


class Entry(msgspec.Struct, frozen=True):
    """Who answers one kind of message, and for whom (None: any certificate)."""

    handler: Callable[..., Awaitable[Any]]
    roles: frozenset[str] | None


class Refusals:
    """Counts every message turned away and logs the first of each kind from each peer."""

    def __init__(self) -> None:
        self._once = OncePerKey(log)

    def note(self, peer_id: str, code: str, detail: str) -> Refused:
        """Count and log; returns what to raise or to answer."""
        metrics.MESSAGES_REFUSED.add(1, reason=code)
        self._once.log(f"{peer_id} {code}", "Message refused", peer_id=peer_id, code=code, detail=detail)
        return Refused(detail, code=code)

    def decode(self, peer_id: str, data: bytes, *, bytes_max: int = MESSAGE_BYTES_MAX) -> Message:
        """Return the message; raises Refused, counted and logged, when it is too big, not CBOR or of no known shape."""
        if len(data) > bytes_max:
            raise self.note(peer_id, "oversized", f"message of {len(data)} bytes exceeds the limit of {bytes_max}")
        try:
            return decode(data, bytes_max=bytes_max)
        except RemoteProtocolError as error:
            raise self.note(peer_id, "malformed", str(error)) from error


class Slots:
    """A bounded number of things at once, in total and for each peer."""

    def __init__(self, *, total_max: int, per_peer_max: int) -> None:
        self._total_max = total_max
        self._per_peer_max = per_peer_max
        self._taken: Counter[str] = Counter()
        self.total = 0

    def free(self, peer_id: str) -> bool:
        """Whether this peer may have one more."""
        return self.total < self._total_max and self._taken[peer_id] < self._per_peer_max

    @contextmanager
    def taken(self, peer_id: str) -> Iterator[None]:
        """Hold one; the caller has asked `free`."""
        self.total += 1
        self._taken[peer_id] += 1
        try:
            yield
        finally:
            self.total -= 1
            self._taken[peer_id] -= 1
            if not self._taken[peer_id]:
                del self._taken[peer_id]


class Dispatcher:
    """The handlers of one node, and the way from a peer's bytes to them."""

    def __init__(self) -> None:
        self.refusals = Refusals()
        self._serving: dict[type[Message], Entry] = {}
        self._accepting: dict[type[Message], Entry] = {}
        self._requests = Slots(total_max=REQUESTS_MAX, per_peer_max=REQUESTS_PER_PEER_MAX)
        self._streams = Slots(total_max=STREAMS_MAX, per_peer_max=STREAMS_PER_PEER_MAX)

    def serve(self, kind: type[M], handler: RequestHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """Register the handler of a request. Raises LocalProtocolError when the kind has one already."""
        _register(self._serving, kind, Entry(handler, roles))

    def accept_streams(self, kind: type[M], handler: StreamHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """Register the handler of streams by the kind of their header, likewise."""
        _register(self._accepting, kind, Entry(handler, roles))

    async def handle(self, peer: Peer, data: bytes) -> bytes:
        """Return the encoded answer to one encoded request. Raises nothing: every failure is an answer."""
        if not self._requests.free(peer.peer_id):
            return _encoded(self.refusals.note(peer.peer_id, "busy", "too many requests at once; try again later"))
        with self._requests.taken(peer.peer_id):
            try:
                request = self.refusals.decode(peer.peer_id, data)
                entry = self._entry(self._serving, peer, request)
                return await self._answer(entry, peer, request)
            except Refused as refusal:
                return _encoded(refusal)

    async def _answer(self, entry: Entry, peer: Peer, request: Message) -> bytes:
        kind = type(request)
        with span_from(request.traceparent, f"handle {kind.__name__}", peer_id=peer.peer_id) as span:
            try:
                return _encoded_reply(kind, await entry.handler(peer, request))
            except Refused as refusal:
                span.set(refused=str(refusal))
                return _encoded(refusal)
            except RemoteProtocolError as error:
                span.set(refused=str(error))
                return _encoded(self.refusals.note(peer.peer_id, "malformed", str(error)))
            except Exception as error:  # noqa: BLE001 - the bulkhead; see the module's docstring
                span.fail(error)
                return _encoded(self._bug(peer, kind))

    async def handle_stream(self, stream: Stream) -> None:
        """Read the header of a stream that a peer opened, run its handler, close it. Raises nothing.

        A handler that returns or refuses ends the stream cleanly; one that fails otherwise resets it, so that what
        it has sent so far cannot pass for the whole.
        """
        try:
            await self._run_stream(stream)
        finally:
            await stream.aclose()

    async def _run_stream(self, stream: Stream) -> None:
        peer_id = stream.peer.peer_id
        if not self._streams.free(peer_id):
            await _finish(stream, self.refusals.note(peer_id, "busy", "too many streams at once; try again later"))
            return
        with self._streams.taken(peer_id):
            try:
                header = await self._header(stream)
                entry = self._entry(self._accepting, stream.peer, header)
                if await self._serve_stream(entry, stream, header):
                    await _finish(stream, None)
            except Refused as refusal:
                await _finish(stream, refusal)
            except PeerUnreachable as error:
                log.debug("Stream broke", peer_id=peer_id, reason=str(error))

    async def _serve_stream(self, entry: Entry, stream: Stream, header: Message) -> bool:
        """Whether the handler did its work; False is a bug here, logged."""
        kind, peer = type(header), stream.peer
        with span_from(header.traceparent, f"stream {kind.__name__}", peer_id=peer.peer_id) as span:
            try:
                await entry.handler(stream, header)
            except Refused as refusal:
                span.set(refused=str(refusal))
                raise
            except RemoteProtocolError as error:
                raise self.refusals.note(peer.peer_id, "malformed", str(error)) from error
            except PeerUnreachable:
                raise
            except Exception as error:  # noqa: BLE001 - the bulkhead; see the module's docstring
                span.fail(error)
                self._bug(peer, kind)
                return False
            return True

    async def _header(self, stream: Stream) -> Message:
        peer_id = stream.peer.peer_id
        try:
            with trio.fail_after(HEADER_PATIENCE_S):
                data = await receive_frame(stream)
        except trio.TooSlowError as error:
            raise self.refusals.note(peer_id, "malformed", "no header came in time") from error
        except RemoteProtocolError as error:
            raise self.refusals.note(peer_id, "malformed", str(error)) from error
        if data is None:
            raise PeerUnreachable(f"{peer_id} opened a stream and ended it at once")
        return self.refusals.decode(peer_id, data)

    def _entry(self, entries: dict[type[Message], Entry], peer: Peer, message: Message) -> Entry:
        kind = type(message).__name__
        entry = entries.get(type(message))
        if entry is None:
            raise self.refusals.note(peer.peer_id, "unknown", f"{kind} is not served here")
        if entry.roles is not None and not entry.roles & peer.roles:
            wanted, held = " or ".join(sorted(entry.roles)), ", ".join(sorted(peer.roles)) or "none"
            raise self.refusals.note(peer.peer_id, "forbidden", f"{kind} is for the role {wanted}; you hold {held}")
        return entry

    def _bug(self, peer: Peer, kind: type[Message]) -> Refused:
        metrics.MESSAGES_REFUSED.add(1, reason="internal")
        log.exception("Handler failed", kind=kind.__name__, peer_id=peer.peer_id)
        return Refused(
            f"{kind.__name__} could not be handled; the log of the node that was asked says why", code="internal"
        )


def _register(entries: dict[type[Message], Entry], kind: type[Message], entry: Entry) -> None:
    if kind in entries:
        raise LocalProtocolError(f"{kind.__name__} has a handler already")
    entries[kind] = entry


def _encoded_reply(kind: type[Message], reply: Message) -> bytes:
    if not isinstance(reply, reply_types(kind)):
        raise LocalProtocolError(f"the handler of {kind.__name__} answered {type(reply).__name__}")
    return encode(reply)


def _failure(refusal: Refused) -> Failure:
    return Failure(code=refusal.code, reason=str(refusal)[:REASON_CHARS_MAX])


def _encoded(refusal: Refused) -> bytes:
    return encode(_failure(refusal))


async def _finish(stream: Stream, refusal: Refused | None) -> None:
    """Say the last word, then let the peer finish its own: a reset would destroy what it has not read yet."""
    swallowed = 0
    with trio.move_on_after(LINGER_S):
        try:
            if refusal is not None:
                await stream.send_message(_failure(refusal))
            await stream.send_eof()
            while swallowed < LINGER_BYTES_MAX and (rest := await stream.receive_some(LINGER_CHUNK_BYTES)):
                swallowed += len(rest)
        except PeerUnreachable as error:
            log.debug("Stream broke at its end", peer_id=stream.peer.peer_id, reason=str(error))


# --- the side that asks ----------------------------------------------------------------------------------------------


def prepare(message: M) -> M:
    """Return the message with the current span's traceparent, unless it carries one already."""
    if message.traceparent is not None or (traceparent := inject()) is None:
        return message
    return msgspec.structs.replace(message, traceparent=traceparent)


def interpret(peer_id: str, request: Request[R], data: bytes) -> R:
    """Return the answer in `data` as the type that the request declares.

    Raises Refused when the peer said no, RemoteProtocolError when the answer is malformed or of another kind.
    """
    kind = type(request)
    try:
        reply = decode(data)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{peer_id} answered {kind.__name__} badly: {error}") from error
    if isinstance(reply, Failure):
        raise Refused(reply.reason, code=reply.code)
    if not isinstance(reply, reply_types(kind)):
        raise RemoteProtocolError(f"{peer_id} answered {kind.__name__} with {type(reply).__name__}")
    return cast(R, reply)


@cache
def reply_types(kind: type[Message]) -> tuple[type[Message], ...]:
    """Return what a request of this kind may be answered with, as its `Request[…]` base declares it."""
    (base,) = vars(kind)["__orig_bases__"]
    (declared,) = get_args(base)
    return cast(
        tuple[type[Message], ...], get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    )
