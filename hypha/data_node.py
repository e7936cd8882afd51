"""The data node: announces the datasets in its directories and serves their slices.

    open datasets ─▶ announce `dataset/<name>` and `dataset/<name>/<digest>`, again and again
    FetchSlice(dataset, slice, offset) ─▶ known? intact by size? ─▶ a turn ─▶ FileHeader, bytes from offset

Names are looked up in the manifest and never joined to a path as they come. Turns are bounded, and go to the peer that
has the fewest; a slice goes through memory a chunk at a time.
"""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated

import trio
from msgspec import Meta, Struct
from msgspec.structs import replace

from hypha.config import NodeConfig
from hypha.dataset import MANIFEST_NAME, Dataset, open_dataset, size_fault
from hypha.errors import ConfigError, HyphaError, PeerUnreachable, Refused, RemoteProtocolError, StoreError
from hypha.network.fetch import provider_key
from hypha.network.health import serve_health
from hypha.network.host import open_network
from hypha.network.lane import Lane, Terms, lane_of
from hypha.network.retry import Backoff
from hypha.network.seam import Network, Stream
from hypha.network.transfer import send_file
from hypha.pki import load_identity
from hypha.protocol.messages import FetchSlice, FileHeader
from hypha.runtime import RealRuntime, Runtime
from hypha.telemetry import ChangeLogger, get_logger, metrics

log = get_logger("data")

FETCHERS = frozenset({"worker", "scheduler"})
# A request waits so long for a turn before it is sent elsewhere; less than fetchers wait for their first byte.
TURN_PATIENCE_S = 15.0
ANNOUNCE_PATIENCE_S = 30.0
# Networks keep a record alive by themselves; this repairs one that was lost with its keepers.
ANNOUNCE_EVERY_S = 300.0


class Config(NodeConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A data node's configuration: the directories it serves, and how many transfers at a time."""

    dataset_path: tuple[Path, ...]
    streams_max: Annotated[int, Meta(ge=1, le=256)] = 16

    def __post_init__(self) -> None:
        """Refuse a data node without data."""
        if not self.dataset_path:
            raise ValueError("`dataset_path`: at least one dataset is needed")


class Turns:
    """At most `turns_max` transfers at a time; a free turn goes to the waiting peer that holds the fewest."""

    def __init__(self, turns_max: int) -> None:
        self._free = turns_max
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, trio.Event]] = []

    @asynccontextmanager
    async def turn(self, peer_id: str) -> AsyncIterator[None]:
        """Hold a turn. Raises Refused ("busy") when none comes within TURN_PATIENCE_S."""
        granted = trio.Event()
        self._waiting.append((peer_id, granted))
        self._grant()
        try:
            with trio.move_on_after(TURN_PATIENCE_S):
                await granted.wait()
            if not granted.is_set():
                raise Refused(f"no turn within {TURN_PATIENCE_S:g} s; try another provider", "busy")
            yield
        finally:
            self._give_back(peer_id, granted)

    def _grant(self) -> None:
        while self._free and self._waiting:
            index = min(range(len(self._waiting)), key=lambda each: (self._held[self._waiting[each][0]], each))
            peer_id, granted = self._waiting.pop(index)
            self._free -= 1
            self._held[peer_id] += 1
            granted.set()

    def _give_back(self, peer_id: str, granted: trio.Event) -> None:
        if not granted.is_set():
            self._waiting.remove((peer_id, granted))
            return
        self._free += 1
        self._held[peer_id] -= 1
        if not self._held[peer_id]:
            del self._held[peer_id]
        self._grant()


class File(Struct, frozen=True):
    """What a request names, found: its path here, and what the header says of it."""

    path: Path
    header: FileHeader


class Counted:
    """A stream that counts what it sends, as it goes: a transfer that breaks off has been served up to there."""

    def __init__(self, stream: Stream, dataset: str) -> None:
        self._stream = stream
        self._dataset = dataset

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `seam.Stream`."""
        await self._stream.send_all(data)
        metrics.BYTES_SERVED.add(len(data), dataset=self._dataset)

    async def receive_some(self, bytes_max: int) -> bytes | bytearray:
        """See `seam.Stream`."""
        return await self._stream.receive_some(bytes_max)

    def lane(self, terms: Terms) -> AbstractAsyncContextManager[Lane | None]:
        """See `lane.Laned`; what goes that way is counted, too."""
        return lane_of(
            self._stream,
            replace(terms, count=lambda moved: metrics.BYTES_SERVED.add(moved, dataset=self._dataset)),
        )


class DataNode:
    """Serves opened datasets on a network that is open already."""

    def __init__(self, network: Network, runtime: Runtime, datasets: Sequence[Dataset], *, streams_max: int) -> None:
        self._network = network
        self._runtime = runtime
        self._datasets = {(each.manifest.name, each.digest): each for each in datasets}
        # Where a name is asked for without a digest, the first dataset configured under it is meant.
        self._by_name = {each.manifest.name: each for each in reversed(datasets)}
        self._slices = {key: {s.name: s for s in each.manifest.slices} for key, each in self._datasets.items()}
        self._turns = Turns(streams_max)
        self._announcing = ChangeLogger(log)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer and announce until cancelled; started once the first announcement was attempted."""
        self._network.accept_streams(FetchSlice, self._serve, roles=FETCHERS)
        serve_health(self._network, self._runtime, "data", self._detail)
        announced = await self._announce()
        log.info("Serving", datasets=sorted(self._by_name))
        task_status.started()
        backoff = Backoff(self._runtime, base_s=1.0, max_s=30.0)
        while True:
            if announced:
                backoff.reset()
                await self._runtime.sleep(ANNOUNCE_EVERY_S)
            else:
                await backoff.wait()
            announced = await self._announce()

    async def _announce(self) -> bool:
        """Announce every dataset; False when one could not be."""
        done = True
        for name, digest in self._datasets:
            for key in (provider_key(name), provider_key(name, digest)):
                reason = await self._try_announce(key)
                self._announcing.log_when_changed(key, reason or "announced", dataset=name)
                done = done and reason is None
        return done

    async def _try_announce(self, key: str) -> str | None:
        try:
            with trio.move_on_after(ANNOUNCE_PATIENCE_S):
                await self._network.provide(key)
                return None
        except HyphaError as error:
            return f"not announced: {error}"
        return f"not announced within {ANNOUNCE_PATIENCE_S:g} s"

    def _detail(self) -> dict[str, str]:
        return {
            f"dataset {name}": f"{len(each.manifest.slices)} slices, manifest {digest[:12]}"
            for (name, digest), each in self._datasets.items()
        }

    async def _serve(self, stream: Stream, wanted: FetchSlice) -> None:
        started = self._runtime.now()
        # A peer may ask for any name: only those of our datasets become labels.
        label = wanted.dataset if wanted.dataset in self._by_name else "unknown"
        status = "failure"
        try:
            found = self._find(wanted)
            async with self._turns.turn(stream.peer.peer_id):
                await self._send(stream, found, wanted, label)
            status = "success"
        finally:
            metrics.SLICE_REQUESTS.add(1, dataset=label, status=status)
        metrics.SLICE_SERVING_LATENCY.record(self._runtime.now() - started, dataset=label)

    async def _send(self, stream: Stream, found: File, wanted: FetchSlice, label: str) -> None:
        metrics.STREAMS_ACTIVE.add(1, direction="out")
        try:
            await stream.send_message(found.header)
            length = found.header.bytes - wanted.offset
            counted = Counted(stream, label)
            await send_file(counted, found.path, offset=wanted.offset, length=length, runtime=self._runtime)
            await stream.send_eof()
        except StoreError as error:
            log.exception("Slice cannot be read", dataset=wanted.dataset, slice=wanted.slice)
            # In the middle of raw bytes no refusal can be told; a broken stream says it.
            raise PeerUnreachable(f"slice could not be read: {error}") from error
        finally:
            metrics.STREAMS_ACTIVE.add(-1, direction="out")

    def _find(self, wanted: FetchSlice) -> File:
        dataset = self._dataset(wanted)
        if wanted.slice == MANIFEST_NAME:
            header = FileHeader(bytes=len(dataset.manifest_bytes), digest=dataset.digest)
            return _at_offset(File(dataset.directory / MANIFEST_NAME, header), wanted)
        entry = self._slices[dataset.manifest.name, dataset.digest].get(wanted.slice)
        if entry is None:
            raise Refused(f"dataset {wanted.dataset} has no slice {wanted.slice!r}", "unknown")
        if (fault := size_fault(dataset.directory, entry)) is not None:
            log.error("Slice is damaged", dataset=wanted.dataset, reason=fault)
            raise Refused(f"this copy is damaged: {fault}", "damaged")
        algorithm = dataset.manifest.digest_algorithm
        header = FileHeader(bytes=entry.bytes, digest=entry.digest, digest_algorithm=algorithm)
        return _at_offset(File(dataset.directory / entry.name, header), wanted)

    def _dataset(self, wanted: FetchSlice) -> Dataset:
        if wanted.manifest_digest is None:
            found = self._by_name.get(wanted.dataset)
        else:
            found = self._datasets.get((wanted.dataset, wanted.manifest_digest))
        if found is None:
            which = wanted.dataset if wanted.manifest_digest is None else f"{wanted.dataset} {wanted.manifest_digest}"
            raise Refused(f"dataset {which} is not served here", "unknown")
        return found


def _at_offset(found: File, wanted: FetchSlice) -> File:
    if wanted.offset > found.header.bytes:
        raise RemoteProtocolError(
            f"offset {wanted.offset} lies beyond the {found.header.bytes} bytes of {wanted.slice}"
        )
    return found


def open_datasets(paths: Sequence[Path]) -> list[Dataset]:
    """Open every dataset. Raises ConfigError naming the key, the directory and the fault."""
    try:
        return [open_dataset(path) for path in paths]
    except ConfigError as error:
        raise ConfigError(f"dataset_path: {error}") from error


async def run(config: Config, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Run a data node of this configuration until cancelled. Raises ConfigError for a dataset that is not sound."""
    runtime = RealRuntime()
    datasets = await runtime.run_blocking(open_datasets, config.dataset_path)
    identity = load_identity(config)
    async with open_network(identity, config, role="data", runtime=runtime) as network:
        await DataNode(network, runtime, datasets, streams_max=config.streams_max).run(task_status=task_status)
