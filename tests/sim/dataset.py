"""The dataset that simulated clusters train on: slices of numbered samples.

sizes (40, 24) ─▶ slice-0 holds samples 0 … 39, slice-1 holds 40 … 63, held-out holds four more
"""

import hashlib
from pathlib import Path

from hypha.dataset import MANIFEST_NAME, Manifest, SliceEntry, render_manifest
from hypha.protocol.messages import Interval
from tests.sim import weights

NAME = "numbers"
HELD_OUT_SAMPLES = 4


def write(directory: Path, sizes: tuple[int, ...]) -> Path:
    """Write the dataset and return its directory."""
    directory.mkdir()
    entries = [_slice(directory, f"slice-{n}.safetensors", "train", first, size) for n, first, size in _placed(sizes)]
    entries.append(_slice(directory, "held-out.safetensors", "held-out", sum(sizes), HELD_OUT_SAMPLES))
    manifest = Manifest(name=NAME, schema={weights.IDS: "U32[]"}, slices=tuple(entries))
    (directory / MANIFEST_NAME).write_bytes(render_manifest(manifest))
    return directory


def _placed(sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    return [(number, sum(sizes[:number]), size) for number, size in enumerate(sizes)]


def _slice(directory: Path, name: str, split: str, first: int, samples: int) -> SliceEntry:
    data = weights.slice_bytes(first, samples)
    (directory / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return SliceEntry(name=name, split=split, samples=samples, bytes=len(data), digest=digest)  # type: ignore[arg-type]


def samples_of(sizes: tuple[int, ...], interval: Interval) -> range:
    """The numbers of the samples in an interval."""
    first = sum(sizes[: interval.slice])
    return range(first + interval.start, first + interval.stop)
