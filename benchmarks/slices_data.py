"""What the slices benchmark moves: one large slice for speed, and two prepared sets for samples per second.

large     one slice of raw bytes, under a manifest with sha256 and one with blake3
tokens    U16[512] rows below 50 257, as `hypha-data prepare --tokenizer` makes them; a batch is int64
images    F32[3, 32, 32] and I64 labels: smooth random fields, made from a seed
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from msgspec import Struct

from hypha.dataset import HASHES, MANIFEST_NAME, Manifest, SliceEntry, render_manifest
from hypha.protocol.tensorfile import TensorSpec, layout

ROW_BYTES = 1024
TOKENS_PER_ROW, VOCABULARY = 512, 50_257
IMAGE, CLASSES = (3, 32, 32), 10
PIECE_BYTES = 8 << 20
DTYPES = {"U8": np.uint8, "U16": np.uint16, "F32": np.float32, "I64": np.int64}

Columns = dict[str, np.ndarray]


class Set(Struct, frozen=True):
    """A prepared set: its schema, samples per slice, slices, and what a slice holds."""

    name: str
    schema: dict[str, str]
    rows: int
    slices: int
    make: Callable[[np.random.Generator, int], Columns]


def _tokens(chance: np.random.Generator, rows: int) -> Columns:
    # Zipf, as words are.
    ids = chance.zipf(1.2, (rows, TOKENS_PER_ROW)) % VOCABULARY
    return {"input_ids": ids.astype(np.uint16)}


def _images(chance: np.random.Generator, rows: int) -> Columns:
    coarse = chance.random((rows, IMAGE[0], 8, 8), dtype=np.float32)
    fine = np.kron(coarse, np.ones((1, 1, 4, 4), np.float32))
    noise = chance.normal(0, 0.05, (rows, *IMAGE)).astype(np.float32)
    return {"labels": chance.integers(0, CLASSES, rows, dtype=np.int64), "pixel_values": fine + noise}


TOKENS = Set("tokens", {"input_ids": f"U16[{TOKENS_PER_ROW}]"}, 8_192, 3, _tokens)
IMAGES = Set("images", {"labels": "I64[]", "pixel_values": "F32[3, 32, 32]"}, 1_024, 8, _images)


def write_set(directory: Path, which: Set) -> Manifest:
    """Write a prepared set; the same bytes every time."""
    directory.mkdir(parents=True)
    chance = np.random.default_rng(0)
    entries = []
    for number in range(which.slices):
        columns = which.make(chance, which.rows)
        path = directory / f"train-{number:05d}.safetensors"
        specs = [
            TensorSpec(name, next(key for key, kind in DTYPES.items() if kind == column.dtype), column.shape)
            for name, column in columns.items()
        ]
        entries.append(_slice(path, specs, which.rows, (columns[name].tobytes() for name in sorted(columns)), "blake3"))
    return _manifest(directory, which.name, which.schema, entries, "blake3")


def write_large(directory: Path, size: int, algorithm: str) -> Manifest:
    """Write one slice of about `size` bytes."""
    directory.mkdir(parents=True)
    rows = size // ROW_BYTES // (PIECE_BYTES // ROW_BYTES) * (PIECE_BYTES // ROW_BYTES)
    piece = np.random.default_rng(0).bytes(PIECE_BYTES)
    pieces = (piece for _ in range(rows * ROW_BYTES // PIECE_BYTES))
    spec = TensorSpec("bytes", "U8", (rows, ROW_BYTES))
    entry = _slice(directory / "train-00000.safetensors", [spec], rows, pieces, algorithm)
    return _manifest(directory, directory.name, {"bytes": f"U8[{ROW_BYTES}]"}, [entry], algorithm)


def _slice(path: Path, specs: list[TensorSpec], rows: int, pieces: Iterator[bytes], algorithm: str) -> SliceEntry:
    header, placed = layout(specs)
    hasher = HASHES[algorithm]()
    with path.open("wb") as file:
        for piece in chain([header], pieces):
            hasher.update(piece)
            file.write(piece)
    return SliceEntry(name=path.name, samples=rows, bytes=placed.file_bytes, digest=hasher.hexdigest())


def _manifest(directory: Path, name: str, schema: dict[str, str], entries: list[SliceEntry], digest: str) -> Manifest:
    manifest = Manifest(name=name, schema=schema, slices=tuple(entries), digest_algorithm=digest)  # type: ignore[arg-type]
    (directory / MANIFEST_NAME).write_bytes(render_manifest(manifest))
    return manifest
