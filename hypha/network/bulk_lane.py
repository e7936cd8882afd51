"""Agreeing, over the stream that a transfer belongs to, on a connection of its own for it.

    whoever accepted the peers' connection            whoever dialled it (so its address is known to work)
      0000 token ────────────────────────────────────▶  dials it again with the token
      ◀──────────────────────────────────── 0000 01     there it is          or 00: go on over the stream

Either may be the sender. Both count on these records wherever a transfer is large, also when no connection can come of
it: the token is then all zeros (no place free), or the answer 00 (relayed, no place free, not reachable). No message
begins with four zeros, so a receiver that answers before it takes a byte is heard, and nothing is sent. A receiver that
has finished its own direction cannot agree to anything: both go on over the stream.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from enum import Enum, auto
from typing import Protocol

import trio

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.network import bulk_socket
from hypha.network.bulk import TOKEN_BYTES, BulkTransport
from hypha.network.bulk_socket import BulkSocket
from hypha.network.framing import ByteStream
from hypha.network.lane import Read, Terms, Write
from hypha.network.mtls import HandshakeRefused, SecureConn
from hypha.telemetry import get_logger

MARK = bytes(4)
NO_TOKEN = bytes(TOKEN_BYTES)
YES, NO = b"\x01", b"\x00"

log = get_logger("network.bulk")


class Side(ByteStream, Protocol):
    """Our end of the stream that a transfer belongs to."""

    @property
    def connection(self) -> SecureConn:
        """What carries it."""

    @property
    def has_finished(self) -> bool:
        """Whether we have finished our direction."""

    def unread(self, data: bytes) -> None:
        """Put back what was received last."""

    async def until_aborted(self) -> None:
        """Return when the stream breaks."""


class Unwanted:
    """The lane of a transfer that the receiver has answered already."""

    async def send(self, _read: Read, _length: int) -> None:
        """Send nothing."""
        await trio.lowlevel.checkpoint()

    async def receive(self, _write: Write, length: int) -> None:
        """Not for receivers."""
        raise RemoteProtocolError(f"{length} bytes were due")


class _Heard(Enum):
    ENDED = auto()
    ANSWER = auto()


@asynccontextmanager
async def agreed(bulk: BulkTransport, side: Side, terms: Terms) -> AsyncIterator[BulkSocket | Unwanted | None]:
    """Yield the lane of one transfer; None when its bytes are to go over the stream.

    Raises what the stream raises, PeerUnreachable when a receiver hears nothing for `stall_s`, RemoteProtocolError.
    """
    agree = _dial if side.connection.is_initiator else _offer
    with ExitStack() as held:
        yield await agree(bulk, side, terms, held)


async def _dial(bulk: BulkTransport, side: Side, terms: Terms, held: ExitStack) -> BulkSocket | Unwanted | None:
    token = await _hear(side, terms, TOKEN_BYTES)
    if token is _Heard.ANSWER:
        return Unwanted()
    if token is _Heard.ENDED or side.has_finished:
        return None
    secured = None
    address, peer_id = side.connection.tcp_address, side.connection.identity.peer_id
    if address is not None and token != NO_TOKEN and held.enter_context(bulk.place(peer_id)):
        try:
            secured = await bulk.dial(*address, peer_id, token)
        except HandshakeRefused as refusal:
            log.info("No bulk connection; the stream serves", peer_id=peer_id, reason=str(refusal))
    if secured is None:
        held.close()
        await side.send_all(MARK + NO)
        return None
    lane = _lane(bulk, side, terms, held, secured)
    await side.send_all(MARK + YES)
    return lane


async def _offer(bulk: BulkTransport, side: Side, terms: Terms, held: ExitStack) -> BulkSocket | Unwanted | None:
    if side.has_finished:
        return None
    offer, peer_id = None, side.connection.identity.peer_id
    if side.connection.tcp_address is not None and held.enter_context(bulk.place(peer_id)):
        offer = held.enter_context(bulk.offered(peer_id))
    await side.send_all(MARK + (NO_TOKEN if offer is None else offer.token))
    verdict = await _hear(side, terms, len(YES))
    if verdict is _Heard.ANSWER:
        return Unwanted()
    secured = None if offer is None else offer.take()
    if verdict == YES and secured is None:
        raise RemoteProtocolError("says that it is connected, but nobody came")
    if verdict != YES or secured is None:
        held.close()
        return None
    return _lane(bulk, side, terms, held, secured)


def _lane(bulk: BulkTransport, side: Side, terms: Terms, held: ExitStack, secured: ssl.SSLSocket) -> BulkSocket:
    held.callback(bulk_socket.abort, secured)
    return BulkSocket(
        secured,
        bulk.limiter,
        side.until_aborted,
        stall_s=terms.stall_s,
        count=terms.count,
        core_to_spare=bulk.core_to_spare,
    )


async def _hear(side: Side, terms: Terms, count: int) -> bytes | _Heard:
    """Return what the peer's record holds. A sender waits: its receiver may be busy with what came before."""
    with trio.move_on_after(float("inf") if terms.sending else terms.stall_s):
        mark = await _exactly(side, len(MARK))
        if mark != MARK:
            if mark and terms.sending:
                side.unread(mark)
                return _Heard.ANSWER
            if not mark:
                return _Heard.ENDED
            raise RemoteProtocolError("a large transfer began with something else than agreeing on its way")
        record = await _exactly(side, count)
        if len(record) < count:
            raise RemoteProtocolError("the stream ended while its way was agreed on")
        return record
    raise PeerUnreachable(f"nothing was heard for {terms.stall_s:g} s")


async def _exactly(side: Side, count: int) -> bytes:
    """Return so many bytes, or fewer where the stream ended."""
    gathered = bytearray()
    while len(gathered) < count and (more := await side.receive_some(count - len(gathered))):
        gathered += more
    return bytes(gathered)
