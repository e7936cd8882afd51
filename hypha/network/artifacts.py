"""One job's tensor files between the nodes that work on it, each named by the digest of its bytes.

    fetcher ── FetchModel(part, round, digest, offset) ──▶ holder
            ◀── FileHeader(bytes, digest) ── bytes … ──

Models, momentum, records and updates all travel this way when somebody asks for them; who may ask, and what is held,
is the caller's rule.
"""

from pathlib import Path

import msgspec
import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.seam import Network, Stream
from hypha.network.transfer import partial_path, partial_size, receive_file, send_file
from hypha.protocol.messages import FetchModel, FileHeader
from hypha.protocol.tensorfile import DIGEST_ALGORITHM
from hypha.runtime import Runtime


async def fetch_artifact(
    network: Network, peer_id: str, wanted: FetchModel, path: Path, *, runtime: Runtime, patience_s: float
) -> int:
    """Bring one file to `path`, resuming a half-finished transfer; returns its size in bytes.

    Raises PeerUnreachable (broken, or no header within `patience_s`), Refused (the peer does not hold it) or
    RemoteProtocolError (what came does not have the digest; then nothing of it is kept).
    """
    try:
        return await _fetch(network, peer_id, wanted, path, runtime=runtime, patience_s=patience_s)
    except RemoteProtocolError as error:
        if not isinstance(error, Refused) or error.code == "malformed":
            # Also what an earlier transfer left: going on after wrong or too many bytes never leads to the right ones.
            partial_path(path).unlink(missing_ok=True)
        raise


async def _fetch(
    network: Network, peer_id: str, wanted: FetchModel, path: Path, *, runtime: Runtime, patience_s: float
) -> int:
    offset = await runtime.run_blocking(partial_size, path)
    wanted = msgspec.structs.replace(wanted, offset=offset)
    with trio.move_on_after(patience_s) as patience:
        stream = await network.open_stream(peer_id, wanted)
        try:
            header = await stream.receive_message(FileHeader)
            # From here on silence is the transport's to find: a large file takes as long as it takes.
            patience.deadline = float("inf")
            if header.digest != wanted.digest:
                raise RemoteProtocolError(f"{peer_id} sent {header.digest} where {wanted.digest} was asked for")
            await receive_file(
                stream,
                path,
                size=header.bytes,
                digest=wanted.digest,
                algorithm=DIGEST_ALGORITHM,
                offset=offset,
                runtime=runtime,
            )
            return header.bytes
        finally:
            await stream.aclose()
    raise PeerUnreachable(f"{peer_id} did not answer FetchModel within {patience_s:g} s")


async def serve_artifact(stream: Stream, wanted: FetchModel, path: Path, *, size: int, runtime: Runtime) -> None:
    """Send one file that we hold, from the offset asked for. Raises RemoteProtocolError when that lies beyond it."""
    if wanted.offset > size:  # what the fetcher holds is not this file's beginning
        raise RemoteProtocolError(f"offset {wanted.offset} lies beyond the {size} bytes of {wanted.part}")
    await stream.send_message(FileHeader(bytes=size, digest=wanted.digest))
    await send_file(stream, path, offset=wanted.offset, length=size - wanted.offset, runtime=runtime)
    await stream.send_eof()
