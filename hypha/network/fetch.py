"""Slices and manifests from whoever provides them: resumed, checked, and tried elsewhere when that fails.

    ranked providers ─▶ first ── whole and right ──▶ path
                          ├─ unreachable, refuses, stalls ─▶ next; path.part stays, the next goes on after it
                          └─ wrong digest ─▶ next; path.part is gone, that provider comes last from now on
    after the last: wait (doubling, jittered), look for providers again, start over; bounded in all

DHT keys are `dataset/<name>` and `dataset/<name>/<manifest digest>`.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

import trio
from msgspec import Struct
from msgspec.structs import replace

from hypha.dataset import MANIFEST_BYTES_MAX, MANIFEST_NAME, Manifest, digest_of_manifest, parse_manifest
from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.breaker import Breakers
from hypha.network.lane import Lane, Terms, lane_of
from hypha.network.retry import Backoff
from hypha.network.seam import Network, Stream
from hypha.network.transfer import CHUNK_BYTES, partial_size, receive_file
from hypha.protocol.messages import FetchSlice, FileHeader, SliceRef
from hypha.runtime import Runtime
from hypha.telemetry import get_logger, span

log = get_logger("network.fetch")
T = TypeVar("T")

PROVIDERS_WANTED = 16
# Passes over all providers, between them waits of about 0.25, 0.5, 1, 2, 4, 8, 8 seconds: longer than a node restarts.
PASSES_MAX = 8
BACKOFF_BASE_S = 0.25
BACKOFF_MAX_S = 8.0
# Silence on an open transfer. A data node may queue a request for a while before its first byte.
STALL_S = 30.0
LOOKUP_PATIENCE_S = 10.0
# Slices may be fetched every second, and a lookup that meets a dead node takes several.
LOOKUP_FRESH_S = 60.0


def provider_key(dataset: str, manifest_digest: str | None = None) -> str:
    """Return the DHT key under which providers of a dataset (as its manifest has it) announce themselves."""
    return f"dataset/{dataset}" if manifest_digest is None else f"dataset/{dataset}/{manifest_digest}"


class Providers:
    """Who provides one dataset, best first: who they are is remembered for a while, and what each did wrong."""

    def __init__(self, network: Network, runtime: Runtime, dataset: str, breakers: Breakers | None = None) -> None:
        self.dataset = dataset
        self._breakers = breakers or Breakers(runtime)
        self._network = network
        self._runtime = runtime
        self._corrupt: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._found: dict[str, tuple[float, list[str]]] = {}  # key -> when, whom

    async def ranked(self, manifest_digest: str | None, *, anew: bool = False) -> list[str]:
        """Return providers: those never caught with wrong bytes first, then by failures, equals in random order.

        They are looked up `anew` where that is asked for, when nobody without fault is known, and every LOOKUP_FRESH_S.
        """
        key = provider_key(self.dataset, manifest_digest)
        at, found = self._found.get(key, (0.0, []))
        faultless = any(not self._corrupt[peer_id] and not self._failures[peer_id] for peer_id in found)
        if anew or not faultless or self._runtime.now() - at > LOOKUP_FRESH_S:
            # A lookup that finds nobody, or is too slow to, does not unmake those who were there.
            found = await self._look_up(key) or found
            self._found[key] = (self._runtime.now(), found)
        # Many workers start at once: without chance they would all ask the same node.
        self._runtime.random.shuffle(found)
        found.sort(key=lambda peer_id: (self._corrupt[peer_id], self._failures[peer_id]))
        # Where nobody else is left, whoever was silent lately is better than no one.
        return [peer_id for peer_id in found if not self._breakers.leaves_alone(peer_id)] or found

    async def _look_up(self, key: str) -> list[str]:
        with trio.move_on_after(LOOKUP_PATIENCE_S):
            return sorted(await self._network.find_providers(key, wanted=PROVIDERS_WANTED))
        return []

    def worked(self, peer_id: str) -> None:
        """It delivered."""
        self._failures.pop(peer_id, None)
        self._breakers.worked(peer_id)

    def failed(self, peer_id: str, *, silent: bool = False) -> None:
        """It refused, or broke off; `silent`: it could not be reached."""
        self._failures[peer_id] += 1
        if silent:
            self._breakers.failed(peer_id)

    def corrupted(self, peer_id: str) -> None:
        """It sent bytes with another digest than asked for."""
        self._corrupt[peer_id] += 1


class Attempt(Struct, frozen=True, kw_only=True):
    """What is fetched and for whom; one instance serves all attempts."""

    network: Network
    runtime: Runtime
    providers: Providers
    manifest_digest: str | None
    stall_s: float

    def header(self, name: str, offset: int) -> FetchSlice:
        """Return the request for one file of the dataset."""
        return FetchSlice(
            dataset=self.providers.dataset, manifest_digest=self.manifest_digest, slice=name, offset=offset
        )


async def fetch_slice(
    network: Network,
    runtime: Runtime,
    providers: Providers,
    ref: SliceRef,
    path: Path,
    *,
    manifest_digest: str,
    passes_max: int = PASSES_MAX,
    stall_s: float = STALL_S,
) -> None:
    """Bring one slice to `path`; it appears there only once its digest was checked.

    Raises PeerUnreachable (nobody could deliver it within all passes; the last reason), RemoteProtocolError (the last
    provider's bytes were wrong; names the digest) or StoreError (this disk). What has come stays in `path.part`.
    """
    attempt = Attempt(
        network=network, runtime=runtime, providers=providers, manifest_digest=manifest_digest, stall_s=stall_s
    )

    async def from_one(peer_id: str) -> None:
        with span("fetch slice", dataset=providers.dataset, slice=ref.name, peer_id=peer_id):
            await _slice_from(attempt, peer_id, ref, path)

    await _from_any(attempt, f"slice {ref.name}", from_one, passes_max)


async def fetch_manifest(
    network: Network,
    runtime: Runtime,
    providers: Providers,
    *,
    manifest_digest: str | None = None,
    passes_max: int = PASSES_MAX,
    stall_s: float = STALL_S,
) -> tuple[Manifest, str]:
    """Return a dataset's manifest, understood, and its digest; without a digest the first one provided is taken.

    Raises PeerUnreachable or RemoteProtocolError as `fetch_slice` does.
    """
    attempt = Attempt(
        network=network, runtime=runtime, providers=providers, manifest_digest=manifest_digest, stall_s=stall_s
    )
    return await _from_any(attempt, MANIFEST_NAME, lambda peer_id: _manifest_from(attempt, peer_id), passes_max)


async def _from_any(attempt: Attempt, what: str, from_one: Callable[[str], Awaitable[T]], passes_max: int) -> T:
    providers = attempt.providers
    backoff = Backoff(attempt.runtime, base_s=BACKOFF_BASE_S, max_s=BACKOFF_MAX_S)
    last: PeerUnreachable | RemoteProtocolError | None = None
    for number in range(passes_max):
        if number:
            await backoff.wait()
        for peer_id in await providers.ranked(attempt.manifest_digest, anew=number > 0):
            try:
                result = await from_one(peer_id)
            except (PeerUnreachable, RemoteProtocolError) as error:
                last = error
                _blame(providers, peer_id, what, error)
            else:
                providers.worked(peer_id)
                return result
    if isinstance(last, RemoteProtocolError) and not isinstance(last, Refused):
        raise RemoteProtocolError(f"dataset {providers.dataset}: {what}: {last}") from last
    reason = f"nobody could deliver {what} in {passes_max} passes; last: {last}" if last else "nobody provides it"
    raise PeerUnreachable(f"dataset {providers.dataset}: {reason}") from last


def _blame(providers: Providers, peer_id: str, what: str, error: PeerUnreachable | RemoteProtocolError) -> None:
    if isinstance(error, MixedBytes | PeerUnreachable | Refused):
        providers.failed(peer_id, silent=isinstance(error, PeerUnreachable))
        log.info("Provider failed", peer_id=peer_id, dataset=providers.dataset, what=what, reason=str(error))
    else:
        providers.corrupted(peer_id)
        log.warn("Provider sent wrong bytes", peer_id=peer_id, dataset=providers.dataset, what=what, reason=str(error))


class MixedBytes(RemoteProtocolError):
    """The digest is wrong, but the bytes came from several transfers: no single provider is to blame."""


class _Patient:
    """A stream whose silence is an error, so that a provider that hangs is left for another."""

    def __init__(self, stream: Stream, stall_s: float) -> None:
        self._stream = stream
        self._stall_s = stall_s

    async def receive_some(self, bytes_max: int) -> bytes | bytearray:
        """See `seam.Stream`; raises PeerUnreachable after `stall_s` without a byte."""
        with trio.move_on_after(self._stall_s):
            return await self._stream.receive_some(bytes_max)
        raise PeerUnreachable(f"{self._stream.peer.peer_id} sent nothing for {self._stall_s:g} s")

    def lane(self, terms: Terms) -> AbstractAsyncContextManager[Lane | None]:
        """See `lane.Laned`; just as patient."""
        return lane_of(self._stream, replace(terms, stall_s=self._stall_s))

    async def header(self) -> FileHeader:
        """Return the provider's description of what follows."""
        with trio.move_on_after(self._stall_s):
            return await self._stream.receive_message(FileHeader)
        raise PeerUnreachable(f"{self._stream.peer.peer_id} sent no header for {self._stall_s:g} s")


async def _open(attempt: Attempt, peer_id: str, header: FetchSlice) -> Stream:
    with trio.move_on_after(attempt.stall_s):
        return await attempt.network.open_stream(peer_id, header)
    raise PeerUnreachable(f"{peer_id} could not be reached within {attempt.stall_s:g} s")


async def _slice_from(attempt: Attempt, peer_id: str, ref: SliceRef, path: Path) -> None:
    offset = min(await attempt.runtime.run_blocking(partial_size, path), ref.bytes)
    stream = await _open(attempt, peer_id, attempt.header(ref.name, offset))
    try:
        patient = _Patient(stream, attempt.stall_s)
        _check_header(peer_id, await patient.header(), ref)
        await receive_file(
            patient,
            path,
            size=ref.bytes,
            digest=ref.digest,
            algorithm=ref.digest_algorithm,
            offset=offset,
            runtime=attempt.runtime,
        )
    except RemoteProtocolError as error:
        if offset and not isinstance(error, Refused):
            raise MixedBytes(str(error)) from error
        raise
    finally:
        await stream.aclose()


def _check_header(peer_id: str, header: FileHeader, ref: SliceRef) -> None:
    if (header.bytes, header.digest) != (ref.bytes, ref.digest):
        raise RemoteProtocolError(
            f"{peer_id} has {header.bytes} bytes with digest {header.digest} "
            f"where {ref.bytes} with {ref.digest} were asked for"
        )


async def _manifest_from(attempt: Attempt, peer_id: str) -> tuple[Manifest, str]:
    stream = await _open(attempt, peer_id, attempt.header(MANIFEST_NAME, 0))
    try:
        patient = _Patient(stream, attempt.stall_s)
        header = await patient.header()
        if header.bytes > MANIFEST_BYTES_MAX:
            raise RemoteProtocolError(f"{MANIFEST_NAME} of {header.bytes} bytes exceeds {MANIFEST_BYTES_MAX}")
        data = await _receive_all(patient, header.bytes)
    finally:
        await stream.aclose()
    digest = digest_of_manifest(data)
    if digest != (attempt.manifest_digest or header.digest):
        raise RemoteProtocolError(
            f"{MANIFEST_NAME} came with digest {digest}, not {attempt.manifest_digest or header.digest}"
        )
    manifest = await attempt.runtime.run_blocking(parse_manifest, data)
    if manifest.name != attempt.providers.dataset:
        raise RemoteProtocolError(f"{MANIFEST_NAME} is that of dataset {manifest.name!r}")
    return manifest, digest


async def _receive_all(patient: _Patient, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await patient.receive_some(min(CHUNK_BYTES, size - len(data)))
        if not piece:
            raise PeerUnreachable(f"the stream ended {size - len(data)} bytes before the end")
        data += piece
    return bytes(data)
