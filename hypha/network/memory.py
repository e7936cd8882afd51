"""The network without a network: nodes in one process, on trio's clock, with faults that one seed decides.

    async with fabric.node("sched-1", {"scheduler"}) as network: …          fabric.crash("worker-2")
                                                                            fabric.partition("a", "b"), heal()
    network.request ─▶ bytes ─▶ Link(src→dst): lost? late? twice? ─▶ Mailbox(dst) ─▶ Dispatcher ─▶ bytes back likewise

Real codec, real dispatcher, the same promises as the libp2p network: one contract suite runs on both. Under a
`MockClock` with autojump hours pass in milliseconds. Nothing here depends on the order of a set, on hashing or on the
wall clock, so one seed gives one sequence of events, byte for byte (trio's own shuffling has to be seeded as well).
"""

import hmac
import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import trio

from hypha.errors import LocalProtocolError
from hypha.network.memory_faults import Event, FaultProfile, Gate, Link
from hypha.network.memory_node import MemoryNetwork
from hypha.network.memory_stream import MemoryStream, Pipe
from hypha.network.seam import Peer

Arrival = Callable[[MemoryNetwork], None]
# Who asked, who answered, the encoded request and the encoded answer.
AnswerObserver = Callable[[str, str, bytes, bytes], None]


class ProviderRecord:
    """One node's claim in the DHT: found from `visible_at` until `expires_at`, seconds on trio's clock."""

    def __init__(self, visible_at: float) -> None:
        self.visible_at = visible_at
        self.expires_at = float("inf")


class MemoryFabric:
    """All nodes and all that lies between them."""

    def __init__(self, seed: int | str, profile: FaultProfile | None = None) -> None:
        self.seed = seed
        self.profile = FaultProfile() if profile is None else profile
        self._up: dict[str, MemoryNetwork] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._gates: dict[str, Gate] = {}
        self._silent: set[str] = set()
        self._records: dict[str, dict[str, ProviderRecord]] = {}
        self._observers: list[Callable[[Event], None]] = []
        self._answer_observers: list[AnswerObserver] = []
        # Numbers are the fabric's, so that a late answer never finds a question of its asker's next incarnation.
        self.numbers: Iterator[int] = itertools.count(1)

    @asynccontextmanager
    async def node(self, peer_id: str, roles: Collection[str] = ()) -> AsyncIterator[MemoryNetwork]:
        """Run a node while the context is open; `crash` cancels the body, and the context then ends without an error.

        Raises LocalProtocolError when a node of that id is up already.
        """
        if peer_id in self._up:
            raise LocalProtocolError(f"{peer_id} is up already")
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(self, Peer(peer_id, frozenset(roles)), self.gate(peer_id), nursery)
            with self._running(network):
                yield network
            nursery.cancel_scope.cancel()

    @contextmanager
    def _running(self, network: MemoryNetwork) -> Iterator[None]:
        if network.peer_id in self._silent:
            self._silent.remove(network.peer_id)
            self._tell_others(network.peer_id, "peer restarted", after_s=self.profile.latency_s)
        self._up[network.peer_id] = network
        self.tell(network.peer_id, network.peer_id, "node", "up")
        try:
            yield
        finally:
            if self._up.get(network.peer_id) is network:
                self._take_down(network, "down", silent=False)

    def on_event(self, observer: Callable[[Event], None]) -> None:
        """Call the observer with everything that happens from now on."""
        self._observers.append(observer)

    def on_answer(self, observer: AnswerObserver) -> None:
        """Call the observer with every request that was handled, at the moment its answer is sent."""
        self._answer_observers.append(observer)

    def answered(self, asker: str, answerer: str, request: bytes, reply: bytes) -> None:
        """Tell the observers of answers."""
        for observer in self._answer_observers:
            observer(asker, answerer, request, reply)

    def calm(self, profile: FaultProfile) -> None:
        """Let every link behave like this from now on."""
        self.profile = profile
        for link in self._links.values():
            link.profile = profile

    def tell(self, src: str, dst: str, what: str, outcome: str) -> None:
        """Tell the observers."""
        event = Event(trio.current_time(), src, dst, what, outcome)
        for observer in self._observers:
            observer(event)

    # --- what a test or a simulation does to nodes and links ---------------------------------------------------------

    def crash(self, peer_id: str, *, silent: bool = False) -> None:
        """Kill a node: handlers and body are cancelled, streams break, whoever waits for it learns of it.

        With `silent` the machine is gone, too: nobody learns, the others wait until they give up or the connection
        times out. `node` with the same id restarts it. Raises LocalProtocolError when it is not up.
        """
        if peer_id not in self._up:
            raise LocalProtocolError(f"{peer_id} is not up")
        network = self._up[peer_id]
        self._take_down(network, "crashed", silent=silent)
        network.kill()

    def stop(self, peer_id: str) -> None:
        """Let a node stand still, as SIGSTOP does; messages to it wait."""
        self.gate(peer_id).stop()
        self.tell(peer_id, peer_id, "node", "stopped")

    def go(self, peer_id: str) -> None:
        """Let it run again, as SIGCONT does."""
        self.gate(peer_id).go()
        self.tell(peer_id, peer_id, "node", "running")

    def partition(self, a: str, b: str, *, one_way: bool = False) -> None:
        """Let nothing through from `a` to `b` and, unless `one_way`, back."""
        self.link(a, b).block()
        if not one_way:
            self.link(b, a).block()
        self.tell(a, b, "link", "cut one way" if one_way else "cut")

    def heal(self, a: str | None = None, b: str | None = None) -> None:
        """Let everything through between the two, or between `a` and everybody, or everywhere."""
        wanted = {name for name in (a, b) if name is not None}
        for src, dst in sorted(self._links):
            if wanted <= {src, dst} and self._links[src, dst].blocked:
                self._links[src, dst].heal()
                self.tell(src, dst, "link", "healed")

    # --- what nodes ask of it ----------------------------------------------------------------------------------------

    def gate(self, peer_id: str) -> Gate:
        """Return the gate of a node, the same through all its incarnations."""
        return self._gates.setdefault(peer_id, Gate())

    def link(self, src: str, dst: str) -> Link:
        """Return the link in this direction."""
        if (src, dst) not in self._links:
            chance = random.Random(f"{self.seed}:{src}:{dst}")
            self._links[src, dst] = Link(self.profile, chance)
        return self._links[src, dst]

    def up(self) -> list[MemoryNetwork]:
        """The nodes that are up, sorted by id."""
        return [self._up[peer_id] for peer_id in sorted(self._up)]

    def post(self, src: str, dst: str, what: str, arrive: Arrival, *, size: int = 0) -> bool:
        """Send a message on its way; False when nobody listens there, which the sender then learns."""
        link = self.link(src, dst)
        fate = link.fate(size)
        if link.blocked or fate.lost:
            self.tell(src, dst, what, "cut" if link.blocked else "lost")
            return True
        node = self._up.get(dst)
        if node is None:
            self.tell(src, dst, what, "nobody there")
            return dst in self._silent
        self._deliver(node, src, what, arrive, fate.trips_s)
        return True

    def gossip(self, src: str, what: str, arrive: Arrival) -> None:
        """Flood an announcement: it also reaches those whom only a third node can reach."""
        reached, frontier = {src: 0.0}, deque([src])
        missed = [node.peer_id for node in self.up() if node.peer_id != src]
        while frontier and missed:
            hop, candidates, missed = frontier.popleft(), missed, []
            for peer_id in candidates:
                if self.link(hop, peer_id).blocked:
                    missed.append(peer_id)
                else:
                    reached[peer_id] = reached[hop] + (self.profile.latency_s if hop != src else 0.0)
                    frontier.append(peer_id)
        for peer_id, extra_s in sorted(reached.items()):
            if peer_id != src:
                fate = self.link(src, peer_id).gossip_fate()
                if fate.lost:
                    self.tell(src, peer_id, what, "lost")
                else:
                    trips_s = tuple(trip_s + extra_s for trip_s in fate.trips_s)
                    self._deliver(self._up[peer_id], src, what, arrive, trips_s, gossip=True)

    def _deliver(
        self,
        node: MemoryNetwork,
        src: str,
        what: str,
        arrive: Arrival,
        trips_s: tuple[float, ...],
        *,
        gossip: bool = False,
    ) -> None:
        link = self.link(src, node.peer_id)

        def arrived() -> None:
            # What a partition overtakes under way is lost, too; gossip has found its way round it already.
            if link.blocked and not gossip:
                self.tell(src, node.peer_id, what, "cut")
            else:
                self.tell(src, node.peer_id, what, "arrived")
                arrive(node)

        if len(trips_s) > 1:
            self.tell(src, node.peer_id, what, "duplicated")
        if trips_s[0] > self.profile.latency_s + self.profile.jitter_s and self.profile.bandwidth == float("inf"):
            self.tell(src, node.peer_id, what, "delayed")
        for trip_s in trips_s:
            if not node.mailbox.post(trio.current_time() + trip_s, arrived):
                self.tell(src, node.peer_id, what, "dropped: mailbox full")

    def streams(self, opener: MemoryNetwork, acceptor: Peer) -> tuple[MemoryStream, MemoryStream]:
        """Return both ends of a new stream, the opener's first."""
        there, back = self.link(opener.peer_id, acceptor.peer_id), self.link(acceptor.peer_id, opener.peer_id)
        out, home = Pipe(there, back), Pipe(back, there)
        latency_s = self.profile.latency_s
        return (
            MemoryStream(acceptor, out, home, opener.gate, latency_s=latency_s),
            MemoryStream(opener.peer, home, out, self.gate(acceptor.peer_id), latency_s=latency_s),
        )

    def roles_of(self, peer_id: str) -> frozenset[str]:
        """The roles in the certificate of a node that is up, else none."""
        node = self._up.get(peer_id)
        return frozenset() if node is None else node.peer.roles

    def signature(self, peer_id: str, signed: bytes) -> bytes:
        """What only the node's key can make of these bytes (HMAC-SHA256 with a key from seed and id)."""
        return hmac.digest(f"{self.seed}:key:{peer_id}".encode(), signed, "sha256")

    # --- the DHT -----------------------------------------------------------------------------------------------------

    def provide(self, peer_id: str, key: str) -> None:
        """Record that the node holds `key`, as long as it is up."""
        known = self._records.setdefault(key, {})
        if peer_id not in known or known[peer_id].expires_at <= trio.current_time():
            known[peer_id] = ProviderRecord(trio.current_time() + self.profile.dht_delay_s)
        known[peer_id].expires_at = float("inf")

    def providers(self, asker: str, key: str) -> list[str]:
        """The other nodes whose records for `key` are found, in an order that the seed decides."""
        if not any(self._connects(asker, node.peer_id) for node in self.up() if node.peer_id != asker):
            return []
        now, records = trio.current_time(), self._records.get(key, {})
        for peer_id in [peer_id for peer_id, record in records.items() if record.expires_at <= now]:
            del records[peer_id]
        found = sorted(peer_id for peer_id, record in records.items() if record.visible_at <= now and peer_id != asker)
        self.link(asker, asker).shuffle(found)
        return found

    def _connects(self, a: str, b: str) -> bool:
        return not (self.link(a, b).blocked or self.link(b, a).blocked)

    def _take_down(self, network: MemoryNetwork, outcome: str, *, silent: bool) -> None:
        peer_id = network.peer_id
        del self._up[peer_id]
        self.gate(peer_id).go()
        self.tell(peer_id, peer_id, "node", outcome)
        after_s = self.profile.break_after_s if silent else self.profile.latency_s
        network.snap_streams(f"{peer_id} is gone", after_s=after_s)
        if silent:
            self._silent.add(peer_id)
        else:
            self._tell_others(peer_id, "connection was closed", after_s=after_s)
        for records in self._records.values():
            if peer_id in records:
                records[peer_id].expires_at = trio.current_time() + self.profile.dht_record_s

    def _is_cut(self, src: str, dst: str) -> bool:
        """Whether a partition cuts the link; one that nobody has used is made by this no more than it is cut."""
        link = self._links.get((src, dst))
        return link is not None and link.blocked

    def _tell_others(self, peer_id: str, reason: str, *, after_s: float) -> None:
        """Let everybody who can hear it learn that connections to this node broke."""
        for node in self.up():
            if node.peer_id != peer_id and not self._is_cut(peer_id, node.peer_id):
                node.mailbox.post(trio.current_time() + after_s, partial(node.lost, peer_id, reason))
