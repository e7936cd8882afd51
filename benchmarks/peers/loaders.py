"""mosaicml-streaming and webdataset read a prepared set; runs in a virtual environment of its own, without hypha.

    make   SET OUT                 slices of SET as MDS shards in OUT/mosaic and tar files in OUT/webdataset
    mosaic | webdataset  URL LOCAL BATCH [--digest]
                                   one epoch from URL (cold), and one from LOCAL (warm): one JSON line

A batch is what our reader gives: columns sorted by name, whole numbers as int64.
"""

import argparse
import hashlib
import io
import json
import shutil
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import no_torchvision  # noqa: F401 - before streaming

# isort: split
import numpy as np
import streaming
import torch
import webdataset
from safetensors.numpy import load_file
from streaming.base.storage import download
from torch.utils.data import DataLoader

COPY_BYTES = 1 << 20
Batch = dict[str, torch.Tensor]


class OverHttp(download.CloudDownloader):
    """mosaicml-streaming fetches from clouds only; this is its own interface, for plain HTTP."""

    @staticmethod
    def _client_identifier() -> str:
        return "http"

    def clean_up(self) -> None:
        """Nothing is kept."""

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        part = Path(f"{local}.tmp")
        with urllib.request.urlopen(remote, timeout=timeout) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file, COPY_BYTES)
        part.replace(local)


download.DOWNLOADER_MAPPINGS["http"] = OverHttp


# --- the same data in their formats ----------------------------------------------------------------------------------


def make(slices: Path, out: Path) -> None:
    """Write both formats, one shard per slice."""
    loaded = [load_file(path) for path in sorted(slices.glob("*.safetensors"))]
    first = loaded[0]
    kinds = {name: _kind(column) for name, column in first.items()}
    largest = max(sum(column.nbytes for column in one.values()) for one in loaded)
    with streaming.MDSWriter(out=str(out / "mosaic"), columns=kinds, size_limit=2 * largest) as writer:
        for one in loaded:
            for row in _rows(one):
                writer.write({name: int(value) if kinds[name] == "int" else value for name, value in row.items()})
    (out / "webdataset").mkdir()
    number = 0
    for shard, one in enumerate(loaded):
        with webdataset.TarWriter(str(out / "webdataset" / f"{shard:05d}.tar")) as tar:
            for row in _rows(one):
                tar.write({"__key__": f"{number:08d}"} | {f"{name}.npy": value for name, value in row.items()})
                number += 1


def _kind(column: np.ndarray) -> str:
    shape = ",".join(map(str, column.shape[1:]))
    return f"ndarray:{column.dtype}:{shape}" if shape else "int"


def _rows(columns: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    for number in range(len(next(iter(columns.values())))):
        yield {name: column[number] for name, column in columns.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def mosaic(url: str, local: Path, batch: int) -> Iterable[Batch]:
    """One epoch with its own loader's defaults, in order."""
    dataset = streaming.StreamingDataset(remote=url, local=str(local), shuffle=False, batch_size=batch)
    return DataLoader(dataset, batch_size=batch, num_workers=0)


def tars(where: str, batch: int, shards: int) -> Iterable[Batch]:
    """One epoch, in order, streamed from a URL or read from a directory."""
    urls = [f"{where}/{number:05d}.tar" for number in range(shards)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(_decoded)
    return DataLoader(dataset, batch_size=batch, num_workers=0)


def copied(url: str, local: Path, shards: int) -> None:
    """Bring the shards here: the cold epoch streamed them."""
    local.mkdir()
    for name in (f"{number:05d}.tar" for number in range(shards)):
        with urllib.request.urlopen(f"{url}/{name}") as answer, (local / name).open("wb") as file:
            shutil.copyfileobj(answer, file, COPY_BYTES)


def _decoded(sample: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {key.removesuffix(".npy"): np.load(io.BytesIO(value)) for key, value in sample.items() if key[0] != "_"}


def read(batches: Iterable[Batch], *, digest: bool) -> dict[str, object]:
    """Go through one epoch."""
    samples, sha, started = 0, hashlib.sha256(), time.perf_counter()
    for batch in batches:
        columns = {name: column for name, column in batch.items() if name[0] != "_"}
        whole = {name: column if column.is_floating_point() else column.long() for name, column in columns.items()}
        samples += len(next(iter(whole.values())))
        for name in sorted(whole):
            whole[name].sum()
            if digest:
                sha.update(whole[name].numpy().tobytes())
    return {"seconds": time.perf_counter() - started, "samples": samples, "digest": sha.hexdigest()}


def main() -> None:
    """Make, or read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "mosaic", "webdataset"])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("batch", type=int, nargs="?", default=1)
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--digest", action="store_true")
    asked = parser.parse_args()
    if asked.what == "make":
        return make(Path(asked.source), asked.target)
    torch.set_num_threads(1)
    epochs = {}
    for name in ("cold", "warm"):
        if asked.what == "mosaic":
            batches = mosaic(asked.source, asked.target, asked.batch)
        else:
            batches = tars(asked.source if name == "cold" else str(asked.target), asked.batch, asked.shards)
        epochs[name] = read(batches, digest=asked.digest)
        del batches
        if name == "cold" and asked.what == "webdataset":
            copied(asked.source, asked.target, asked.shards)
    return print(json.dumps(epochs))


if __name__ == "__main__":
    main()
