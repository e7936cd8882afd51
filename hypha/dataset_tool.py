"""`hypha-data prepare` and `verify`: text becomes rows of token ids, rows become slices.

    text (hypha.dataset_text) ─▶ ids ─▶ rows [L] ─ scattered at random ─▶ one bucket per slice
    bucket ─ shuffled ─▶ train-00000.safetensors …, dataset.toml ─ rename ─▶ the dataset, all of it or nothing

The same text gives the same bytes on any machine: chance comes from the raw output of a PCG64,
which numpy keeps stable. Memory holds one bucket and one block of rows.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from hypha.dataset import (
    HASHES,
    HELD_OUT_SLICES_MAX,
    MANIFEST_NAME,
    Algorithm,
    Manifest,
    SliceEntry,
    faults_of,
    open_dataset,
    render_manifest,
)
from hypha.dataset_text import (
    Document,
    Encoding,
    IdArray,
    bounded,
    bytes_encoding,
    documents_in,
    ids_of,
    split_held_out,
    tokenizer_encoding,
)
from hypha.errors import ConfigError, StoreError
from hypha.protocol.tensorfile import TensorSpec, layout

TENSOR = "input_ids"
# Rows are scattered over the buckets in blocks: large, so that each bucket gets a worthwhile piece of each block.
BLOCK_BYTES = 16 << 20


class Plan(Struct, frozen=True, kw_only=True):
    """Everything that decides the bytes of a dataset, besides the text."""

    name: str
    encoding: Encoding
    sequence_length: int
    slice_bytes: int
    seed: int
    digest: Algorithm

    @property
    def row_bytes(self) -> int:
        """Size of one sample."""
        return self.sequence_length * self.encoding.numpy_dtype.itemsize


def prepare(
    sources: list[Path],
    out: Path,
    *,
    name: str,
    sequence_length: int = 128,
    slice_bytes: int = 4 << 20,
    held_out: float = 0.05,
    seed: int = 0,
    max_bytes: int | None = None,
    digest: str = "blake3",
    force: bool = False,
    tokenizer: Path | None = None,
) -> Manifest:
    """Make a dataset of text files and folders in the directory `out`, and return its manifest.

    `held_out` is the share of the text set apart by whole files; `max_bytes` bounds the text taken, files being chosen
    as if by chance. Binary and unreadable files are skipped with a warning. Raises ConfigError (no text, `out` exists
    and no `force`, an unknown digest) and StoreError (the disk).
    """
    _check_target(out, force=force)
    if digest not in HASHES:
        raise ConfigError(f"digest {digest!r} is not one of {', '.join(sorted(HASHES))}")
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative")
    encoding = bytes_encoding() if tokenizer is None else tokenizer_encoding(tokenizer)
    plan = Plan(
        name=name,
        encoding=encoding,
        sequence_length=sequence_length,
        slice_bytes=slice_bytes,
        seed=seed,
        digest="sha256" if digest == "sha256" else "blake3",
    )
    documents = list(bounded(documents_in(sources, out), max_bytes, seed))
    # Enough for a row on either side, at up to eight bytes of text per token.
    bytes_min = 2 * sequence_length * (1 if encoding.tokenizer is None else 8)
    train, test = split_held_out(documents, share=held_out, seed=seed, bytes_min=bytes_min)
    return _write_dataset(plan, out, {"train": train, "held-out": test})


def verify(path: Path) -> list[str]:
    """Return every fault of a dataset, each naming its file; an empty list is a sound dataset."""
    return faults_of(path)


def _row_blocks(documents: Iterable[Document], plan: Plan) -> Iterator[IdArray]:
    """Yield arrays [n, sequence_length]; what does not fill the last row is dropped."""
    pending: list[IdArray] = []
    waiting = 0
    for ids in chain(ids_of(documents, plan.encoding), [None]):
        if ids is not None:
            pending.append(ids)
            waiting += ids.nbytes
        if waiting >= BLOCK_BYTES or (ids is None and waiting >= plan.row_bytes):
            joined = np.concatenate(pending)
            rows = len(joined) // plan.sequence_length
            yield joined[: rows * plan.sequence_length].reshape(rows, plan.sequence_length)
            pending = [joined[rows * plan.sequence_length :]]
            waiting = pending[0].nbytes


# --- rows to slices --------------------------------------------------------------------------------------------------


class Chance:
    """Reproducible chance from raw PCG64 words."""

    def __init__(self, *seeds: int) -> None:
        self._words = np.random.PCG64(np.random.SeedSequence(seeds))

    def choices(self, count: int, among: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return `count` numbers below `among`."""
        return (self._raw(count) % np.uint64(among)).astype(np.int64)

    def permutation(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the numbers below `count`, shuffled."""
        return np.argsort(self._raw(count), kind="stable")

    def _raw(self, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.atleast_1d(np.asarray(self._words.random_raw(count), dtype=np.uint64))


def _write_dataset(plan: Plan, out: Path, splits: dict[str, list[Document]]) -> Manifest:
    scratch = out.absolute().parent / f".{out.name}.{os.getpid()}.part"
    try:
        scratch.mkdir(parents=True)
        entries: list[SliceEntry] = []
        for index, (split, documents) in enumerate(splits.items()):
            if documents:
                entries += _write_split(plan, scratch, split, documents, Chance(plan.seed, index))
        manifest = Manifest(
            name=plan.name,
            digest_algorithm=plan.digest,
            tokenizer=plan.encoding.label,
            vocabulary=plan.encoding.vocabulary,
            schema={TENSOR: f"{plan.encoding.dtype}[{plan.sequence_length}]"},
            slices=tuple(entries),
        )
        (scratch / MANIFEST_NAME).write_bytes(render_manifest(manifest))
        open_dataset(scratch)
        _put_in_place(scratch, out)
    except OSError as error:
        raise StoreError(f"{error.filename or out}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _write_split(plan: Plan, folder: Path, split: str, documents: list[Document], chance: Chance) -> list[SliceEntry]:
    text = sum(document.size + 1 for document in documents)
    # A token takes about four bytes of text.
    estimate = text if plan.encoding.tokenizer is None else text * plan.encoding.numpy_dtype.itemsize // 4
    count = max(1, round(estimate / plan.slice_bytes))
    if split == "held-out":
        count = min(count, HELD_OUT_SLICES_MAX)
    buckets = [folder / f"bucket-{number:05d}" for number in range(count)]
    for rows in _row_blocks(documents, plan):
        _scatter(rows, buckets, chance)
    filled = [bucket for bucket in buckets if bucket.exists()]
    if not filled:
        raise ConfigError(f"the {split} split has too little text for one row of {plan.sequence_length} ids")
    entries = []
    for number, bucket in enumerate(filled):
        rows = np.fromfile(bucket, dtype=plan.encoding.numpy_dtype).reshape(-1, plan.sequence_length)
        bucket.unlink()
        path = folder / f"{split}-{number:05d}.safetensors"
        entries.append(_write_slice(plan, path, split, rows[chance.permutation(len(rows))]))
    return entries


def _scatter(rows: IdArray, buckets: list[Path], chance: Chance) -> None:
    where = chance.choices(len(rows), len(buckets))
    ordered = rows[np.argsort(where, kind="stable")]
    counts = np.bincount(where, minlength=len(buckets))
    start = 0
    for bucket, count in zip(buckets, counts.tolist(), strict=True):
        if count:
            with bucket.open("ab") as file:
                file.write(ordered[start : start + count].data)
            start += count


def _write_slice(plan: Plan, path: Path, split: str, rows: IdArray) -> SliceEntry:
    header, placed = layout([TensorSpec(TENSOR, plan.encoding.dtype, rows.shape)])
    hasher = HASHES[plan.digest]()
    with path.open("xb") as file:
        for piece in (header, rows.tobytes()):
            hasher.update(piece)
            file.write(piece)
    return SliceEntry(
        name=path.name,
        split="train" if split == "train" else "held-out",
        samples=len(rows),
        bytes=placed.file_bytes,
        digest=hasher.hexdigest(),
    )


# --- the directory ---------------------------------------------------------------------------------------------------


def _check_target(out: Path, *, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ConfigError(f"{out} exists; --force replaces it")
    if not (out / MANIFEST_NAME).is_file():
        raise ConfigError(f"{out} is not a dataset: --force replaces datasets only")


def _put_in_place(scratch: Path, out: Path) -> None:
    old = scratch.with_suffix(".old")
    if out.exists():
        out.rename(old)
    scratch.rename(out)
    shutil.rmtree(old, ignore_errors=True)
