"""How a node gets a connection to a peer: every way it knows, one attempt per peer at a time, shared by all who wait.

    connect(peer) ─▶ connected? ───────────────────────────────────────────────▶ connection
                     └ attempt, after its backoff:
                        1 addresses learned, from the DHT's peerstore, from the configuration   staggered race
                        2 ask the DHT, then its new addresses                                    likewise
                        3 circuits: announced ones, then through each gateway we are connected to
                        └ nothing answered ─▶ PeerUnreachable with every reason

py-libp2p's swarm tries one address per transport, waits 250 ms before each dial, and refuses for 60 s a peer that did
not answer once; so only its `dial_addr` is used. Backoff is short: whether a peer lives is for leases to say.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar, cast

import trio
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from hypha.errors import PeerUnreachable
from hypha.network.addresses import ADDRESSES_MAX, Network, is_circuit, is_excluded, without_peer
from hypha.network.mtls import CERTIFICATE_REFUSED, HandshakeRefused
from hypha.network.patches import FOREIGN, Swarm
from hypha.network.retry import Backoff
from hypha.runtime import Runtime
from hypha.telemetry import get_logger, metrics

# The next address is tried when the one before has failed or has been silent for so long (RFC 8305: 250 ms).
STAGGER_S = 0.25
# A dial of one address, handshake included.
ADDRESS_S = 10.0
# The DHT is asked again after this long when it knows nothing yet: a peer that has just started is being introduced.
LOOKUP_RETRY_S = (0.0, 0.2, 0.5, 1.0)
# Everything together; whoever needs longer patience calls again.
ATTEMPT_S = 30.0
BACKOFF_BASE_S = 0.1
BACKOFF_MAX_S = 3.0
# Peers remembered: their addresses, and how long to wait before the next attempt.
PEERS_REMEMBERED_MAX = 4096

V = TypeVar("V")
Lookup = Callable[[ID], Awaitable[None]]
DialCircuit = Callable[[ID, Multiaddr], Awaitable[None]]

log = get_logger("network.dial")


class Routes:
    """What the dialer asks others for; `host.py` puts it together."""

    def __init__(
        self,
        *,
        lookup: Lookup,
        circuit: DialCircuit,
        relays: Callable[[], list[Multiaddr]],
        uses_relays: bool,
        excluded: Iterable[Network],
    ) -> None:
        self.lookup = lookup
        self.circuit = circuit
        self.relays = relays
        self.uses_relays = uses_relays
        self.excluded = tuple(excluded)


class _Attempt:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.reasons: dict[str, str] = {}

    def failed(self, address: Multiaddr | str, reason: str) -> None:
        self.reasons[str(address)] = reason

    @property
    def refused(self) -> bool:
        """Whether a certificate was refused: asking for more addresses will not mend that."""
        return any(CERTIFICATE_REFUSED in reason for reason in self.reasons.values())


class Dialer:
    """Connections to peers by id. Attempts run in `nursery`, so that a caller who gives up disturbs nobody."""

    def __init__(self, swarm: Swarm, routes: Routes, runtime: Runtime, nursery: trio.Nursery) -> None:
        self._swarm = swarm
        self._routes = routes
        self._runtime = runtime
        self._nursery = nursery
        self._attempts: dict[ID, _Attempt] = {}
        self._learned: OrderedDict[ID, Sequence[Multiaddr]] = OrderedDict()
        self._backoffs: OrderedDict[ID, tuple[Backoff, float]] = OrderedDict()

    def learn(self, peer_id: ID, addresses: Sequence[Multiaddr]) -> None:
        """Remember where the peer says it can be dialled; replaces what it said before."""
        _remember(self._learned, peer_id, addresses)
        self._backoffs.pop(peer_id, None)

    def live(self, peer_id: ID) -> SwarmConn | None:
        """Return an open connection, direct before relayed, newest first; None when there is none."""
        open_now = [conn for conn in self._swarm.get_connections(peer_id) if not conn.is_closed]
        usable = [cast(SwarmConn, conn) for conn in open_now if not conn.muxed_conn.is_closed]
        direct = [conn for conn in usable if conn.get_connection_type() != ConnectionType.RELAYED]
        best = direct or usable
        return best[-1] if best else None

    async def connect(self, peer_id: ID) -> SwarmConn:
        """Return a connection. Raises PeerUnreachable with the reasons of everything that was tried."""
        await trio.lowlevel.checkpoint()
        if (conn := self.live(peer_id)) is not None:
            return conn
        attempt = self._attempts.get(peer_id)
        if attempt is None:
            attempt = self._attempts[peer_id] = _Attempt()
            self._nursery.start_soon(self._run, peer_id, attempt)
        await attempt.done.wait()
        if (conn := self.live(peer_id)) is not None:
            return conn
        reasons = "; ".join(f"{where}: {why}" for where, why in attempt.reasons.items())
        raise PeerUnreachable(f"{peer_id} cannot be reached ({reasons or 'no address is known'})")

    async def connect_unless_busy(self, peer_id: ID) -> SwarmConn:
        """Like `connect`, for py-libp2p's own dials: an attempt asks the DHT, whose walk must not wait for the attempt.

        Raises PeerUnreachable also when an attempt is under way.
        """
        if peer_id in self._attempts and self.live(peer_id) is None:
            raise PeerUnreachable(f"{peer_id} is being dialled")
        return await self.connect(peer_id)

    async def dial(self, peer_id: ID, address: Multiaddr) -> str | None:
        """Dial one address; returns why it failed, or None when there is a connection now."""
        try:
            with trio.fail_after(ADDRESS_S):
                if is_circuit(address):
                    await self._routes.circuit(peer_id, address)
                else:
                    await self._swarm.dial_addr(without_peer(address), peer_id)
        except trio.TooSlowError:
            reason = f"no answer within {ADDRESS_S:g} s"
        except FOREIGN as error:
            reason = _words(error)
        else:
            return None
        metrics.CONNECTIONS_FAILED.add(
            1, direction="outbound", reason=reason if CERTIFICATE_REFUSED in reason else "dial"
        )
        log.debug("Dial failed", peer_id=str(peer_id), address=str(address), reason=reason)
        return reason

    async def _run(self, peer_id: ID, attempt: _Attempt) -> None:
        try:
            backoff, not_before = self._backoffs.get(peer_id, (None, 0.0))
            await self._runtime.sleep(max(0.0, not_before - self._runtime.now()))
            with trio.move_on_after(ATTEMPT_S) as patience:
                await self._try_everything(peer_id, attempt)
            if patience.cancelled_caught:
                attempt.failed("all of it", f"not within {ATTEMPT_S:g} s")
            if self.live(peer_id) is not None:
                self._backoffs.pop(peer_id, None)
                return
            backoff = backoff or Backoff(self._runtime, base_s=BACKOFF_BASE_S, max_s=BACKOFF_MAX_S)
            _remember(self._backoffs, peer_id, (backoff, self._runtime.now() + backoff.next_s()))
        finally:
            del self._attempts[peer_id]
            attempt.done.set()

    async def _try_everything(self, peer_id: ID, attempt: _Attempt) -> None:
        tried: set[str] = set()
        for pause_s in LOOKUP_RETRY_S:
            if await self._race(peer_id, self._direct(peer_id, tried), attempt) or attempt.refused:
                return
            await trio.sleep(pause_s)
            await self._routes.lookup(peer_id)
            if self.live(peer_id) is not None:
                return
            if await self._race(peer_id, self._direct(peer_id, tried), attempt):
                return
            if self._routes.uses_relays and await self._relayed(peer_id, attempt):
                return

    def _known(self, peer_id: ID) -> list[Multiaddr]:
        try:
            stored = list(self._swarm.peerstore.addrs(peer_id))
        except PeerStoreError:
            stored = []
        return [*self._learned.get(peer_id, ()), *stored]

    def _direct(self, peer_id: ID, tried: set[str]) -> list[Multiaddr]:
        """Addresses not tried yet, each without its peer part; marks them as tried."""
        fresh = []
        for address in map(without_peer, self._known(peer_id)):
            if is_circuit(address) or is_excluded(address, self._routes.excluded) or str(address) in tried:
                continue
            tried.add(str(address))
            fresh.append(address)
        return fresh[:ADDRESSES_MAX]

    async def _race(self, peer_id: ID, addresses: list[Multiaddr], attempt: _Attempt) -> bool:
        """Dial the addresses, each when the one before failed or dawdles; the first connection ends it."""
        async with trio.open_nursery() as nursery:

            async def run(address: Multiaddr, failed: trio.Event) -> None:
                reason = await self.dial(peer_id, address)
                if reason is None:
                    nursery.cancel_scope.cancel()
                    return
                attempt.failed(address, reason)
                failed.set()

            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(run, address, failed)
                with trio.move_on_after(STAGGER_S):
                    await failed.wait()
        return self.live(peer_id) is not None

    async def _relayed(self, peer_id: ID, attempt: _Attempt) -> bool:
        announced = [address for address in self._known(peer_id) if is_circuit(address)]
        relays = [Multiaddr(f"{relay}/p2p-circuit/p2p/{peer_id}") for relay in self._routes.relays()]
        for circuit in list(dict.fromkeys((*announced, *relays)))[:ADDRESSES_MAX]:
            reason = await self.dial(peer_id, circuit)
            if reason is None:
                return True
            attempt.failed(circuit, reason)
        return False


def _remember(memory: OrderedDict[ID, V], peer_id: ID, value: V) -> None:
    memory[peer_id] = value
    memory.move_to_end(peer_id)
    while len(memory) > PEERS_REMEMBERED_MAX:
        memory.popitem(last=False)


def _words(error: BaseException) -> str:
    """Dig the cause that helps out of py-libp2p's chain: our refusal, or what the socket said."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < ADDRESSES_MAX:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in chain:
        if isinstance(each, HandshakeRefused):
            return str(each)
    for each in reversed(chain):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror.lower()
    return str(error) or type(error).__name__
