"""A job's model as a whole, whoever shares it: where the job is, and at its end the file that a user exports.

model, model-1, … of the last round ──▶ one canonical SafeTensors file: the same bytes for any number of shards
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import msgspec
from blake3 import blake3
from msgspec import Struct

from hypha.errors import StoreError
from hypha.protocol.manifest import ChainState
from hypha.protocol.shards import kind_of, whole_digest
from hypha.protocol.tensorfile import LENGTH_BYTES, Layout, header_length, layout, parse_header
from hypha.scheduler.store import JobStore

CHUNK_BYTES = 1 << 20


class WholeModel(Struct, frozen=True):
    """The file, None where the store does not have it (any more), and its blake3."""

    path: Path | None
    digest: str


def chain_state(store: JobStore) -> ChainState:
    """Return where the chain ends; before its first round, with the initial model that was stored, if one was."""
    state = store.state
    points = [store.resume_point(shard) for shard in range(store.shards)]
    found = [point for point in points if point is not None]
    if state.round or len(found) < store.shards:
        return state
    models = tuple(point.model_digest for point in found)
    return msgspec.structs.replace(
        state,
        models=models,
        momenta=tuple(point.momentum_digest for point in found),
        model_digest=whole_digest(models, sha256),
    )


def whole_model(store: JobStore, scratch: Path) -> WholeModel:
    """Return the model of the last committed round; joined in `scratch` where shards have it. Raises StoreError."""
    state = store.state
    assert state.model_digest is not None, "a job has at least one round"
    found = [
        store.find(kind_of("model", shard), state.round, digest, scratch) for shard, digest in enumerate(state.models)
    ]
    parts = [path for path in found if path is not None]
    if len(parts) < len(state.models):
        return WholeModel(None, state.model_digest)
    if len(parts) == 1:
        return WholeModel(parts[0], state.model_digest)
    joined = scratch / f"model-{state.round}.safetensors"
    return WholeModel(joined, join(parts, joined))


def join(parts: Sequence[Path], out: Path) -> str:
    """Write the tensors of several files as one and return its blake3. Raises StoreError, RemoteProtocolError."""
    digest = blake3()
    try:
        with ExitStack() as stack, out.open("wb") as file:
            files = [stack.enter_context(path.open("rb", buffering=0)) for path in parts]
            layouts = [_layout_of(each.fileno()) for each in files]
            header, whole = layout(placed.spec for each in layouts for placed in each.tensors.values())
            digest.update(header)
            file.write(header)
            holders = {name: number for number, each in enumerate(layouts) for name in each.tensors}
            for name in whole.tensors:
                placed = layouts[holders[name]].tensors[name]
                source, at = files[holders[name]].fileno(), placed.start
                while at < placed.stop:
                    chunk = os.pread(source, min(CHUNK_BYTES, placed.stop - at), at)
                    if not chunk:
                        raise StoreError(f"{parts[holders[name]]}: tensor {name!r} is cut short")
                    digest.update(chunk)
                    file.write(chunk)
                    at += len(chunk)
    except OSError as error:
        raise StoreError(f"{out}: {error.strerror}") from error
    return digest.hexdigest()


def _layout_of(descriptor: int) -> Layout:
    size = os.fstat(descriptor).st_size
    length = header_length(os.pread(descriptor, LENGTH_BYTES, 0), file_bytes=size)
    return parse_header(os.pread(descriptor, length, 0), file_bytes=size)
