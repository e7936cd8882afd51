"""The one seam to the network: what a role may ask of it, whatever carries the bytes.

    request / serve              one message, one answer            control, renewals, dispatch
    publish / subscribe          signed gossip, may be lost         task advertisements
    provide / find_providers     DHT records, eventually true       who holds a dataset
    open_stream / accept_streams header, then bytes both ways       slices, updates, models
    signed_addresses / learn     where a peer can be dialled        carried inside messages

Implementations: `hypha.network.host` (py-libp2p over mutual TLS) and `hypha.network.memory` (virtual time, seeded
faults). `tests/network/contract.py` runs the same suite against both.

Timeouts belong to the caller (trio cancel scopes). A connection that breaks is redialled by the implementation and is
never reported as a peer's death: only an expired lease says that.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from msgspec import Struct

from hypha.protocol.messages import Message, Request

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)


class Peer(Struct, frozen=True):
    """Who is at the other end, proved by its certificate."""

    peer_id: str
    roles: frozenset[str]


# A handler answers with a message of the request's reply type, or raises Refused(reason): the reason travels back.
RequestHandler = Callable[[Peer, M], Awaitable[Message]]


class Stream(Protocol):
    """A bidirectional byte stream to one peer; control frames and raw bytes may alternate on it."""

    @property
    def peer(self) -> Peer:
        """Whoever is at the other end."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send every byte; waits for window (back-pressure). Raises PeerUnreachable when the stream broke."""

    async def receive_some(self, bytes_max: int) -> bytes | bytearray:
        """Return 1 to `bytes_max` bytes, or b"" when the peer has finished sending.

        Raises PeerUnreachable when the stream broke: a truncated transfer never looks like a finished one.
        """

    async def send_message(self, message: Message) -> None:
        """Send one length-prefixed CBOR message between runs of raw bytes."""

    async def receive_message(self, kind: type[M]) -> M:
        """Receive one such message. Raises Refused when it is a Failure, RemoteProtocolError on another kind."""

    async def send_eof(self) -> None:
        """Finish our direction; the other stays open."""

    async def aclose(self) -> None:
        """Close cleanly if both directions finished, otherwise reset. Never raises, never waits for the peer."""


StreamHandler = Callable[[Stream, M], Awaitable[None]]


class Network(Protocol):
    """One node's access to the others."""

    @property
    def peer_id(self) -> str:
        """This node's own peer id (base58)."""

    async def request(self, peer_id: str, message: Request[R]) -> R:
        """Send one request and return its answer.

        Raises PeerUnreachable (no answer: it may or may not have been acted on), Refused (the peer's own reason), or
        RemoteProtocolError (the answer broke the protocol).
        """

    def serve(self, kind: type[M], handler: RequestHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """Answer requests of `kind` from peers that hold one of `roles` (None: any certificate)."""

    async def publish(self, topic: str, message: Message) -> None:
        """Gossip a message; delivery is likely, never certain. Raises LocalProtocolError over 64 KiB."""

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[AsyncIterator[tuple[Peer, Message]]]:
        """Yield (signer, message) for everything heard on the topic while the context is open.

        The buffer is bounded; when the reader lags the oldest announcements are dropped. The signer's roles are
        those its certificate names, or empty while they are not known yet.
        """

    async def provide(self, key: str) -> None:
        """Announce in the DHT that this node holds `key`, and keep announcing while the network runs."""

    async def find_providers(self, key: str, *, wanted: int) -> list[str]:
        """Return up to `wanted` peer ids that announced `key`; an empty list is a possible answer."""

    async def open_stream(self, peer_id: str, header: Message) -> Stream:
        """Open a stream whose first frame is `header`. Raises PeerUnreachable."""

    def accept_streams(self, kind: type[M], handler: StreamHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """Run `handler(stream, header)` for each stream opened with a header of `kind`; it is closed afterwards.

        A Refused raised by the handler is sent to the peer as a Failure frame before the stream closes.
        """

    def signed_addresses(self) -> bytes:
        """Return this node's dialable addresses, signed with its key, to be carried in messages."""

    def learn(self, peer_id: str, signed: bytes) -> None:
        """Remember where `peer_id` can be dialled. Raises RemoteProtocolError if its signature does not match."""

    def connected_peers(self) -> list[Peer]:
        """Return the peers that a connection is open to, sorted by id. Not a statement about who lives."""
