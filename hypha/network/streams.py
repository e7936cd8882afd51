"""Streams of the libp2p network as the seam has them, and the short-cut by which they are opened.

    opener                                                       accepter
      /multistream/1.0.0 · /hypha/stream/1 · header, bytes … ──▶   reads both lines, goes on
      ◀── … first bytes · /hypha/stream/1 · /multistream/1.0.0     (checked when the first answer is read)

multistream-select lets both sides send first, so protocol and first bytes travel together: a request costs one round
trip and one frame each way.
"""

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError
from msgspec import Struct

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.network.bulk import BulkTransport
from hypha.network.bulk_lane import agreed
from hypha.network.framing import MessageFraming
from hypha.network.lane import Lane, Terms
from hypha.network.mtls import SecureConn
from hypha.network.seam import Peer
from hypha.network.yamux_stream import YamuxStream

MULTISTREAM = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
# multistream-select lines are a varint length, text, newline; none of ours needs a second byte of length.
LINE_BYTES_MAX = 127
# Proposals a peer may make on one stream before it is taken for broken.
PROPOSALS_MAX = 8


def line(text: str) -> bytes:
    """Return a multistream-select line."""
    data = text.encode() + b"\n"
    assert len(data) <= LINE_BYTES_MAX
    return bytes((len(data),)) + data


class Libp2pStream(MessageFraming):
    """A stream to one peer; the opener names the protocol, the accepter confirms it, both with their first bytes."""

    def __init__(
        self,
        muxed: YamuxStream,
        peer: Peer,
        bulk: BulkTransport,
        *,
        to_say: bytes = b"",
        to_hear: bytes = b"",
    ) -> None:
        self._muxed = muxed
        self._bulk = bulk
        self._peer = peer
        self._to_say = to_say
        self._to_hear = to_hear

    @classmethod
    def proposing(cls, muxed: YamuxStream, peer: Peer, protocol: str, bulk: BulkTransport) -> "Libp2pStream":
        """Return a stream just opened here; `protocol` is proposed with the first bytes sent."""
        lines = line(MULTISTREAM) + line(protocol)
        return cls(muxed, peer, bulk, to_say=lines, to_hear=lines)

    @property
    def peer(self) -> Peer:
        """Whoever is at the other end, as its certificate says."""
        return self._peer

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send every byte; waits for window. Raises PeerUnreachable when the stream broke.

        Cancelled half way, the stream is of no use any more and is reset; its connection is not harmed.
        """
        await self._send(data, last=False)

    async def send_last(self, data: bytes) -> None:
        """Send these bytes and finish our direction, in one frame where they fit one."""
        await self._send(data, last=True)

    async def receive_some(self, bytes_max: int) -> bytes | bytearray:
        """Return 1 to `bytes_max` bytes, or b"" once the peer has finished sending.

        Raises PeerUnreachable when the stream broke, RemoteProtocolError when the peer does not speak the protocol.
        """
        while self._to_hear:
            said = await self._receive(len(self._to_hear))
            if not said:
                raise PeerUnreachable(f"{self._peer.peer_id} ended the stream before it began")
            if not self._to_hear.startswith(said):
                self._muxed.reset_now()
                raise RemoteProtocolError(f"{self._peer.peer_id} does not speak the protocol proposed")
            self._to_hear = self._to_hear[len(said) :]
        return await self._receive(bytes_max)

    async def send_eof(self) -> None:
        """Finish our direction; the other stays open."""
        if self._to_say:
            await self._send(b"", last=True)
            return
        await self._muxed.close()

    async def aclose(self) -> None:
        """Close cleanly if both directions finished, otherwise reset. Never raises, never waits for the peer."""
        self._muxed.reset_now()

    # --- `bulk_lane.Side` -------------------------------------------------------------------------------------------

    def lane(self, terms: Terms) -> AbstractAsyncContextManager[Lane | None]:
        """Agree with the peer on a connection of its own for the transfer that comes next; see `bulk_lane`."""
        return agreed(self._bulk, self, terms)

    @property
    def connection(self) -> SecureConn:
        """What carries the stream."""
        return self._muxed.connection.secured_conn

    @property
    def has_finished(self) -> bool:
        """Whether we have finished our direction."""
        return self._muxed.has_finished

    def unread(self, data: bytes) -> None:
        """Put back what was received last."""
        self._muxed.unread(data)

    async def until_aborted(self) -> None:
        """Return when the stream breaks before the peer has finished sending."""
        await self._muxed.until_truncated()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _send(self, data: bytes | bytearray | memoryview, *, last: bool) -> None:
        if self._to_say:
            data, self._to_say = self._to_say + bytes(data), b""
        try:
            await self._muxed.write(data, last=last)
        except MuxedStreamError as error:
            raise self._broken(error) from error
        except trio.Cancelled:
            self._muxed.reset_now()
            raise

    async def _receive(self, bytes_max: int) -> bytearray:
        try:
            return await self._muxed.receive_chunk(bytes_max)
        except MuxedStreamError as error:
            raise self._broken(error) from error

    def _broken(self, error: MuxedStreamError) -> PeerUnreachable:
        return PeerUnreachable(f"the stream to {self._peer.peer_id} broke: {error}")


class Agreed(Struct, frozen=True):
    """What a stream is for, and what is still to be said about it before anything else."""

    protocol: str
    to_say: bytes


async def negotiate(muxed: YamuxStream, *, lazy: Collection[str], eager: Collection[str]) -> Agreed | None:
    """Agree with the opener of a stream on a protocol; None when there is none.

    An `eager` protocol (py-libp2p's) is confirmed at once, a `lazy` one with the first bytes of the answer.
    Raises MuxedStreamError when the stream ends, RemoteProtocolError when the peer speaks no multistream-select.
    """
    if await _read_line(muxed) != MULTISTREAM:
        raise RemoteProtocolError("no multistream-select")
    to_say = line(MULTISTREAM)
    if not muxed.has_buffered:
        await muxed.write(to_say)
        to_say = b""
    for _ in range(PROPOSALS_MAX):
        protocol = await _read_line(muxed)
        if protocol in lazy:
            return Agreed(protocol, to_say + line(protocol))
        known = protocol in eager
        await muxed.write(to_say + line(protocol if known else NOT_AVAILABLE))
        to_say = b""
        if known:
            return Agreed(protocol, b"")
    return None


async def _read_line(muxed: YamuxStream) -> str:
    gathered = bytearray()
    while not gathered or len(gathered) <= gathered[0]:
        chunk = await muxed.receive_chunk(LINE_BYTES_MAX)
        if not chunk:
            raise RemoteProtocolError("the stream ended within its negotiation")
        gathered += chunk
        if gathered[0] > LINE_BYTES_MAX:
            raise RemoteProtocolError("a line of the negotiation is too long")
    end = gathered[0] + 1
    muxed.unread(gathered[end:])
    try:
        return gathered[1:end].decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("a line of the negotiation is not text") from error
