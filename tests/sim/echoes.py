"""What schedulers said last, to be heard once more: late, twice, out of order and from an incarnation that is over.

    request answered ─▶ the newest of each kind, by who said it to whom ──say_again──▶ handled as any duplicate
                                                  a renewal also with a fence that is not the lease's

No answer finds anybody who waits for it. Whoever gets an echo must not be moved by it (L2, L4).
"""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from hypha.network.memory_node import MemoryNetwork
from hypha.network.seam import Peer
from hypha.protocol.codec import decode, encode
from hypha.protocol.messages import RenewLease

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

# A message begins with its tag, of which no two that a scheduler sends have so much in common.
KIND_BYTES = 16


class Echoes:
    """The newest request of each kind between a scheduler and each of those whom it asks."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._said: dict[tuple[str, str, bytes], bytes] = {}

    def said(self, asker: str, answerer: str, request: bytes) -> None:
        """A request was handled."""
        if self._cluster.machines[asker].role == "scheduler":
            self._said[asker, answerer, request[:KIND_BYTES]] = request

    def of(self, asker: str) -> list[tuple[str, bytes]]:
        """Return what it said last, and to whom; a renewal also as if it had mixed up two leases of that worker."""
        found = [(answerer, request) for (who, answerer, _), request in self._said.items() if who == asker]
        for answerer, request in list(found):
            message = decode(request)
            if isinstance(message, RenewLease):
                found.append((answerer, encode(replace(message, fence=max(0, message.fence - 1)))))
        return found

    def say_again(self, asker: str, said: list[tuple[str, bytes]]) -> None:
        """Let it all arrive once more, whether or not whoever said it is still there."""
        fabric, peer = self._cluster.fabric, Peer(asker, frozenset({"scheduler"}))
        for answerer, request in said:
            kind = type(decode(request)).__name__

            def arrive(node: MemoryNetwork, request: bytes = request, kind: str = kind) -> None:
                node._nursery.start_soon(node._answer, peer, next(fabric.numbers), kind, request)

            fabric.post(asker, answerer, f"{kind} echo", arrive)
