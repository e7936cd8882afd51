"""Revocation lists that change while the node runs: read again, put in force, and whoever they name is hung up on.

    every POLL_S: files as they were? ─ no ─▶ Identity.reload_crls ─┬─ usable: in force, logged
                          │ yes                                     └─ not: the old lists stay, the reason logged once,
                          ▼                                            tried again at the next poll
              hang up on every open connection to a revoked peer

Whoever was shaking hands while the lists changed is met by the sweep after it: a handshake ends before a poll comes.
"""

import logging
import os
from pathlib import Path

from msgspec import Struct

from hypha.errors import ConfigError
from hypha.network.patches import Swarm
from hypha.network.yamux import Yamux
from hypha.pki import Identity
from hypha.runtime import Runtime
from hypha.telemetry import ChangeLogger, get_logger

# How long a published list may go unnoticed. A look is one stat per file.
POLL_S = 10.0

log = get_logger("network.revocation")


class Stamp(Struct, frozen=True):
    """What tells one version of a file from the next: a copy in place changes the time, a rename the inode."""

    modified_ns: int
    size: int
    inode: int


class Revocation:
    """The revocation lists of one node, in force on its swarm."""

    def __init__(self, identity: Identity, swarm: Swarm, runtime: Runtime) -> None:
        self._identity = identity
        self._swarm = swarm
        self._runtime = runtime
        self._unusable = ChangeLogger(log, level=logging.ERROR)
        self._seen: tuple[Stamp | None, ...] | None = None

    async def keep(self) -> None:
        """Look at the files every POLL_S for ever; returns at once where none are configured."""
        while self._identity.crl_paths:
            await self._runtime.sleep(POLL_S)
            await self._look()

    async def reload(self) -> bool:
        """Read the lists again and hang up on everybody they name; True if they changed.

        Raises ConfigError like `Identity.reload_crls`.
        """
        try:
            changed = await self._runtime.run_blocking(self._identity.reload_crls)
            if changed:
                log.info("Revocation lists read again", files=", ".join(map(str, self._identity.crl_paths)))
            return changed
        finally:
            await self._hang_up_on_revoked()

    async def _look(self) -> None:
        # Taken before the reading: what changes meanwhile is another version at the next look.
        stamps = await self._runtime.run_blocking(_stamps, self._identity.crl_paths)
        if stamps == self._seen:
            await self._hang_up_on_revoked()
            return
        try:
            await self.reload()
        except ConfigError as error:
            self._unusable.log_when_changed("revocation lists", str(error))
        else:
            self._seen = stamps
            self._unusable.forget("revocation lists")

    async def _hang_up_on_revoked(self) -> None:
        for conns in list(self._swarm.connections.values()):
            for conn in list(conns):
                muxed = conn.muxed_conn
                if isinstance(muxed, Yamux) and self._identity.is_revoked(muxed.secured_conn.identity):
                    log.warn("Hung up on a revoked peer", peer_id=str(muxed.peer_id))
                    await conn.close()


def _stamps(paths: tuple[Path, ...]) -> tuple[Stamp | None, ...]:
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:  # being replaced, or gone: reading says which
        return None
    return Stamp(modified_ns=found.st_mtime_ns, size=found.st_size, inode=found.st_ino)
