"""Every role answers Health the same way: who it is, its version, how long it is up, and a few words of its own."""

from collections.abc import Callable

from hypha import __version__
from hypha.network.seam import Network, Peer
from hypha.protocol.messages import Health, HealthReport
from hypha.runtime import Runtime


def serve_health(network: Network, runtime: Runtime, role: str, detail: Callable[[], dict[str, str]]) -> None:
    """Answer Health to anyone with a valid certificate; `detail()` is asked each time, its texts are for people."""
    started = runtime.now()

    async def answer(_peer: Peer, _message: Health) -> HealthReport:
        return HealthReport(
            peer_id=network.peer_id,
            role=role,
            version=__version__,
            uptime_s=runtime.now() - started,
            detail=detail(),
        )

    network.serve(Health, answer)
