"""Waiting for one's turn to lead a job, and what a scheduler says of itself meanwhile.

    --standby     watch the leader's hold ─▶ lapsed, and the next beat is ours ─▶ the job's directories are free ─▶ lead
                      ▲                                                                                  Deposed │
                      ├──────────────────────────────────────────────────────────────────────────────────────────┘
    without           └─ HeldByAnother ─ the job's directories are free, and the next beat is ours ─────────▶ lead

Who waits is on the network and answers `status`, unless the leader has the same identity: one peer id is one node.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack

from hypha.network.health import serve_health
from hypha.network.host import open_network
from hypha.network.seam import Network
from hypha.pki import Identity
from hypha.runtime import Runtime
from hypha.scheduler.config import Config
from hypha.scheduler.hold import Hold
from hypha.scheduler.place import Place, in_use, job_objects, open_place
from hypha.telemetry import get_logger

log = get_logger("scheduler")


class Presence:
    """Answers Health on a network; `tell` is asked each time, and replaced when there is more to say."""

    def __init__(self, network: Network, runtime: Runtime, tell: Callable[[], dict[str, str]]) -> None:
        self.tell = tell
        serve_health(network, runtime, "scheduler", lambda: self.tell())


async def open_hold(config: Config, runtime: Runtime, *, scheduler: str) -> Hold:
    """Return the hold on the job's store as this scheduler would have it. Raises ConfigError."""
    objects = await runtime.run_blocking(job_objects, config)
    return Hold(objects, runtime, scheduler=scheduler, hold_s=config.scheduler.hold_s)


async def await_turn(config: Config, runtime: Runtime, hold: Hold) -> None:
    """Stand by until nobody leads the job any more: its hold has lapsed, and its directory is free.

    Raises ConfigError for a store that cannot be used.
    """
    log.info("Standing by until the leader's hold lapses", job=config.scheduler.job.name)
    while True:
        await hold.lapsed()
        reason = await runtime.run_blocking(in_use, config)
        if reason is None:
            return
        # A leader that stands still: the kernel frees its lock when it ends.
        log.warn("The job's directory is still in use", reason=reason)


def standing_by(config: Config, hold: Hold) -> dict[str, str]:
    """Return what a standby says of itself."""
    return {
        "job": config.scheduler.job.name,
        "leader": hold.leader or "nobody yet",
        "waiting": "standing by until the leader's hold on the job's store lapses",
    }


async def take_place(
    config: Config,
    runtime: Runtime,
    identity: Identity,
    held: AsyncExitStack,
    *,
    fresh: bool,
    wait: bool,
    deposed: bool,
) -> tuple[Place, Network, Presence | None]:
    """Open the job's directories and the network, in an order in which two of one identity never meet there.

    Who does not `wait` has to have the hold at once. Raises HeldByAnother: it cannot, and may wait next.
    Who was `deposed` a moment ago may find its own last beat, and knows that nobody else has its identity.
    """
    network: Network | None = None
    presence: Presence | None = None
    if wait:
        hold = await open_hold(config, runtime, scheduler=identity.peer_id)
        seen = await runtime.run_blocking(hold.look)
        if deposed or seen.beat is None or seen.beat.scheduler != identity.peer_id:
            network = await held.enter_async_context(open_network(identity, config, role="scheduler", runtime=runtime))
            presence = Presence(network, runtime, lambda: standing_by(config, hold))
        await await_turn(config, runtime, hold)
    place = await runtime.run_blocking(held.enter_context, open_place(config, fresh=fresh))
    if not wait:
        # Under the directory's lock: what runs from it already is refused there, and beats no more than it should.
        hold = Hold(place.objects, runtime, scheduler=identity.peer_id, hold_s=config.scheduler.hold_s)
        await runtime.run_blocking(hold.take)
    if network is None:
        network = await held.enter_async_context(open_network(identity, config, role="scheduler", runtime=runtime))
    return place, network, presence
