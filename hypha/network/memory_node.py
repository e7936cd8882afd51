"""One node of the in-memory network: `seam.Network` over a mailbox.

    request ─▶ fabric.post ─▶ Mailbox of the other ─▶ its postman ─▶ handler task ─▶ fabric.post ─▶ our Mailbox
    Waiter ◀──────────────────────────────────── answer, or the news that the connection broke ◀────── postman

The postman hands out what has arrived, in order of arrival; a stopped node's postman stands still with it.
"""

import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeVar

import trio

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.network.dispatch import Dispatcher, interpret, prepare
from hypha.network.framing import framed
from hypha.network.memory_faults import Gate
from hypha.network.memory_stream import MemoryStream
from hypha.network.seam import Peer, RequestHandler, Stream, StreamHandler
from hypha.network.topics import Topics
from hypha.protocol.codec import GOSSIP_BYTES_MAX, encode
from hypha.protocol.messages import Message, Request

if TYPE_CHECKING:
    from hypha.network.memory import MemoryFabric

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

# Messages under way to one node: far above what a cluster that works has, and small enough to find one that floods.
MAIL_MAX = 16_384
SIGNATURE_BYTES = 32


class Mailbox:
    """What is on its way to a node, by time of arrival; what arrives at the same moment, in the order it was sent."""

    def __init__(self) -> None:
        self._mail: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._more = trio.Event()

    def post(self, arrives_at: float, deliver: Callable[[], None]) -> bool:
        """Put something on its way; False when there is too much already."""
        if len(self._mail) >= MAIL_MAX:
            return False
        heapq.heappush(self._mail, (arrives_at, next(self._order), deliver))
        self._more.set()
        return True

    async def next(self) -> Callable[[], None]:
        """Wait for the next arrival."""
        while not self._mail or self._mail[0][0] > trio.current_time():
            self._more = trio.Event()
            with trio.move_on_at(self._mail[0][0] if self._mail else float("inf")):
                await self._more.wait()
        return heapq.heappop(self._mail)[2]


class Waiter:
    """Somebody who waits for an answer from a peer."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.answer: bytes | None = None
        self.reason = "no answer"
        self.over = trio.Event()

    def settle(self, answer: bytes) -> None:
        """Here it is; a second one changes nothing."""
        if not self.over.is_set():
            self.answer = answer
            self.over.set()

    def give_up(self, reason: str) -> None:
        """None will come."""
        if not self.over.is_set():
            self.reason = reason
            self.over.set()


class MemoryNetwork:
    """See `seam.Network`. Made by `MemoryFabric.node`."""

    def __init__(self, fabric: "MemoryFabric", peer: Peer, gate: Gate, nursery: trio.Nursery) -> None:
        self.peer = peer
        self.gate = gate
        self.mailbox = Mailbox()
        self.crashed = False
        self._fabric = fabric
        self._dispatcher = Dispatcher()
        self._topics = Topics(self._dispatcher.refusals)
        self._waiting: dict[int, Waiter] = {}
        self._streams: list[MemoryStream] = []
        self._connected: dict[str, Peer] = {}
        self._known: dict[str, str] = {}
        self._nursery = nursery
        nursery.start_soon(self._postman)

    @property
    def peer_id(self) -> str:
        """See `seam.Network`."""
        return self.peer.peer_id

    def serve(self, kind: type[M], handler: RequestHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """See `seam.Network`."""
        self._dispatcher.serve(kind, handler, roles=roles)

    def accept_streams(self, kind: type[M], handler: StreamHandler[M], *, roles: frozenset[str] | None = None) -> None:
        """See `seam.Network`."""
        self._dispatcher.accept_streams(kind, handler, roles=roles)

    async def request(self, peer_id: str, message: Request[R]) -> R:
        """See `seam.Network`."""
        data, kind = encode(prepare(message)), type(message).__name__

        def arrive(node: MemoryNetwork, number: int) -> None:
            node._nursery.start_soon(node._answer, self.peer, number, kind, data)

        return interpret(peer_id, message, await self._ask(peer_id, kind, arrive, size=len(data)))

    async def publish(self, topic: str, message: Message) -> None:
        """See `seam.Network`."""
        data = encode(prepare(message), bytes_max=GOSSIP_BYTES_MAX)
        async with self.gate:
            await trio.lowlevel.checkpoint()
            if not self.crashed:
                self._fabric.gossip(
                    self.peer_id, type(message).__name__, lambda node: node._hear(topic, self.peer, data)
                )

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[AsyncIterator[tuple[Peer, Message]]]:
        """See `seam.Network`."""
        return self._topics.subscribe(topic)

    async def provide(self, key: str) -> None:
        """See `seam.Network`."""
        async with self.gate:
            await trio.sleep(self._fabric.profile.latency_s)
            if not self.crashed:
                self._fabric.provide(self.peer_id, key)

    async def find_providers(self, key: str, *, wanted: int) -> list[str]:
        """See `seam.Network`."""
        fate = self._fabric.link(self.peer_id, self.peer_id).fate()
        async with self.gate:
            await trio.sleep(sum(fate.trips_s))
            return [] if fate.lost or self.crashed else self._fabric.providers(self.peer_id, key)[:wanted]

    async def open_stream(self, peer_id: str, header: Message) -> Stream:
        """See `seam.Network`."""
        data, what = framed(encode(prepare(header))), f"stream {type(header).__name__}"
        ours, theirs = self._fabric.streams(self, Peer(peer_id, self._fabric.roles_of(peer_id)))

        def arrive(node: MemoryNetwork, number: int) -> None:
            node._accept(self.peer, theirs, number, what)

        self._keep(ours)
        try:
            await self._ask(peer_id, what, arrive, size=len(data))
            await ours.send_all(data)
        except BaseException:
            await ours.aclose()
            raise
        return ours

    def signed_addresses(self) -> bytes:
        """See `seam.Network`."""
        addresses = f"/memory/{self.peer_id}".encode()
        return self._fabric.signature(self.peer_id, addresses) + addresses

    def learn(self, peer_id: str, signed: bytes) -> None:
        """See `seam.Network`."""
        addresses = signed[SIGNATURE_BYTES:]
        if self._fabric.signature(peer_id, addresses) != signed[:SIGNATURE_BYTES]:
            raise RemoteProtocolError(f"addresses of {peer_id} are not signed with its key")
        self._known[peer_id] = addresses.decode()

    def connected_peers(self) -> list[Peer]:
        """See `seam.Network`."""
        return [self._connected[peer_id] for peer_id in sorted(self._connected)]

    # --- the fabric's side -------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Cancel everything that runs on this node, its body included."""
        self.crashed = True
        self._nursery.cancel_scope.cancel()

    def snap_streams(self, reason: str, *, after_s: float) -> None:
        """Break all streams: here at once, at their other ends later."""
        for stream in self._streams:
            stream.snap(reason, after_s=after_s)

    def lost(self, peer_id: str, reason: str) -> None:
        """The connection to this peer broke: whoever waits for it learns so."""
        self._connected.pop(peer_id, None)
        for waiter in self._waiting.values():
            if waiter.peer_id == peer_id:
                waiter.give_up(reason)

    async def _postman(self) -> None:
        while True:
            deliver = await self.mailbox.next()
            await self.gate.passed()
            deliver()

    async def _ask(
        self, peer_id: str, what: str, arrive: Callable[["MemoryNetwork", int], None], *, size: int
    ) -> bytes:
        number, waiter = next(self._fabric.numbers), Waiter(peer_id)
        async with self.gate:
            self._check_dialable(peer_id)
            self._waiting[number] = waiter
            try:
                if not self._fabric.post(self.peer_id, peer_id, what, lambda node: arrive(node, number), size=size):
                    refused_at = trio.current_time() + 2 * self._fabric.profile.latency_s
                    self.mailbox.post(refused_at, lambda: waiter.give_up("connection refused"))
                with trio.move_on_after(self._fabric.profile.break_after_s) as silence:
                    await waiter.over.wait()
            finally:
                del self._waiting[number]
        if silence.cancelled_caught:
            self._connected.pop(peer_id, None)
        if waiter.answer is None:
            raise PeerUnreachable(f"{peer_id}: {waiter.reason}")
        return waiter.answer

    def _check_dialable(self, peer_id: str) -> None:
        if peer_id == self.peer_id:
            raise PeerUnreachable("a node does not dial itself")
        if self.crashed:
            raise PeerUnreachable("this node has crashed")

    async def _answer(self, peer: Peer, number: int, kind: str, data: bytes) -> None:
        self._connected[peer.peer_id] = peer
        reply = await self._dispatcher.handle(peer, data)
        await self.gate.passed()
        self._fabric.answered(peer.peer_id, self.peer_id, data, reply)
        self._settle_at(peer, number, f"{kind} reply", reply)

    def _settle_at(self, peer: Peer, number: int, what: str, answer: bytes) -> None:
        def arrive(node: MemoryNetwork) -> None:
            node._connected[self.peer_id] = self.peer
            if number in node._waiting:
                node._waiting[number].settle(answer)

        self._fabric.post(self.peer_id, peer.peer_id, what, arrive, size=len(answer))

    def _accept(self, peer: Peer, stream: MemoryStream, number: int, what: str) -> None:
        # A repeated arrival finds the stream open, or over, already.
        if stream not in self._streams and not stream.closed:
            self._connected[peer.peer_id] = peer
            self._keep(stream)
            self._nursery.start_soon(self._dispatcher.handle_stream, stream)
        self._settle_at(peer, number, f"{what} opened", b"")

    def _keep(self, stream: MemoryStream) -> None:
        self._streams = [kept for kept in self._streams if not kept.closed]
        self._streams.append(stream)

    def _hear(self, topic: str, signer: Peer, data: bytes) -> None:
        self._topics.hear(topic, signer, data)
