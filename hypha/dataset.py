"""A dataset on disk: SafeTensors slices and the manifest that names them (rounds.md).

    dataset.toml    name, digest_algorithm, [schema] tensor = "U8[128]",
                    [[slices]] name, split, samples, bytes, digest       in order
    *.safetensors   every tensor of the schema, shaped [samples, …]

The sha256 of dataset.toml's bytes names the dataset as it is. Slices are checked by size when a dataset is opened;
`faults_of` reads everything.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
import tomli
from blake3 import blake3
from msgspec import Meta, Struct

from hypha.errors import ConfigError, RemoteProtocolError
from hypha.protocol.job import DatasetRef, HeldOutSlice
from hypha.protocol.messages import SliceRef
from hypha.protocol.tensorfile import DTYPE_BYTES, LENGTH_BYTES, Layout, TensorSpec, header_length, parse_header

MANIFEST_NAME = "dataset.toml"
FORMAT_VERSION = 1
# A hundred thousand slices of 150 bytes each take 15 MB; beyond this a dataset should use larger slices.
MANIFEST_BYTES_MAX = 64 << 20
SLICES_MAX = 1 << 18
# A job's specification names every held-out slice (`DatasetRef.held_out`).
HELD_OUT_SLICES_MAX = 64
READ_BYTES = 1 << 20

DatasetName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
# A name, never a path: it is joined to a directory by whoever serves it and whoever fetches it.
SliceName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors\Z")]
TensorName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")]
HexDigest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
AtLeastOne = Annotated[int, Meta(ge=1, le=2**53)]
Algorithm = Literal["sha256", "blake3"]

_TENSOR = re.compile(r"(?P<dtype>[A-Z0-9]+)\[(?P<shape>(\d+(, ?\d+)*)?)\]")


class Hash(Protocol):
    """What both digest algorithms offer."""

    def update(self, data: bytes, /) -> object:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """Return the digest of everything taken in."""


HASHES: dict[str, Callable[[], Hash]] = {"sha256": hashlib.sha256, "blake3": blake3}


class SliceEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One slice file: `samples` rows in `bytes` bytes with this digest."""

    name: SliceName
    split: Literal["train", "held-out"] = "train"
    samples: AtLeastOne
    bytes: AtLeastOne
    digest: HexDigest


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of dataset.toml. `vocabulary` bounds token ids, where there are any (exclusive)."""

    format: Literal[1] = 1
    name: DatasetName
    digest_algorithm: Algorithm = "sha256"
    tokenizer: Annotated[str, Meta(max_length=256)] = ""
    vocabulary: Annotated[int, Meta(ge=0)] = 0
    schema: Annotated[dict[TensorName, str], Meta(min_length=1, max_length=256)]
    slices: Annotated[tuple[SliceEntry, ...], Meta(min_length=1, max_length=SLICES_MAX)]

    def __post_init__(self) -> None:
        """Refuse names that appear twice, tensors that are none, and too many held-out slices."""
        names = [entry.name for entry in self.slices]
        if len(set(names)) != len(names):
            raise ValueError("a slice is named twice")
        for tensor, text in self.schema.items():
            parse_tensor(tensor, text)
        if len(self.held_out) > HELD_OUT_SLICES_MAX:
            raise ValueError(f"{len(self.held_out)} held-out slices exceed the limit of {HELD_OUT_SLICES_MAX}")

    @property
    def train(self) -> tuple[SliceRef, ...]:
        """The slices to train on, in order."""
        return tuple(self.ref(entry) for entry in self.slices if entry.split == "train")

    @property
    def held_out(self) -> tuple[SliceRef, ...]:
        """The slices never trained on, in order."""
        return tuple(self.ref(entry) for entry in self.slices if entry.split == "held-out")

    def ref(self, entry: SliceEntry) -> SliceRef:
        """Return a slice as messages name it."""
        return SliceRef(
            name=entry.name,
            samples=entry.samples,
            bytes=entry.bytes,
            digest=entry.digest,
            digest_algorithm=self.digest_algorithm,
        )

    def entry(self, name: str) -> SliceEntry | None:
        """Return the slice of this name."""
        return next((entry for entry in self.slices if entry.name == name), None)

    def reference(self, manifest_digest: str) -> DatasetRef:
        """Return the dataset as a job's specification names it."""
        held_out = tuple(HeldOutSlice(**msgspec.structs.asdict(ref)) for ref in self.held_out)
        return DatasetRef(name=self.name, manifest_digest=manifest_digest, schema=self.schema, held_out=held_out)


class Dataset(Struct, frozen=True):
    """A dataset in a directory here, its manifest as bytes and understood."""

    directory: Path
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def digest(self) -> str:
        """The manifest's sha256, hexadecimal."""
        return digest_of_manifest(self.manifest_bytes)


def digest_of_manifest(data: bytes) -> str:
    """Return the sha256 that names a dataset by its manifest."""
    return hashlib.sha256(data).hexdigest()


def parse_tensor(name: str, text: str) -> TensorSpec:
    """Return one sample's tensor from "dtype[shape]", as in a schema. Raises ValueError."""
    found = _TENSOR.fullmatch(text)
    if found is None or found["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"schema.{name}: {text!r} is not a SafeTensors dtype with a shape per sample, like U8[128]")
    return TensorSpec(name, found["dtype"], tuple(int(size) for size in re.findall(r"\d+", found["shape"])))


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest in dataset.toml's bytes. Raises RemoteProtocolError with the key's path."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise RemoteProtocolError(f"{MANIFEST_NAME} of {len(data)} bytes exceeds the limit of {MANIFEST_BYTES_MAX}")
    try:
        return msgspec.convert(tomli.loads(data.decode()), Manifest)
    except (tomli.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise RemoteProtocolError(f"{MANIFEST_NAME}: {error}") from error


def render_manifest(manifest: Manifest) -> bytes:
    """Return the one TOML text of a manifest."""
    lines = [f"{key} = {_toml(getattr(manifest, key))}" for key in ("format", "name", "digest_algorithm")]
    lines += [f"tokenizer = {_toml(manifest.tokenizer)}", f"vocabulary = {manifest.vocabulary}", "", "[schema]"]
    lines += [f"{_toml(tensor)} = {_toml(text)}" for tensor, text in sorted(manifest.schema.items())]
    for entry in manifest.slices:
        lines += ["", "[[slices]]"]
        lines += [f"{key} = {_toml(value)}" for key, value in msgspec.structs.asdict(entry).items()]
    return ("\n".join(lines) + "\n").encode()


def _toml(value: str | int) -> str:
    return json.dumps(value)


def open_dataset(directory: Path) -> Dataset:
    """Read a dataset's manifest and check that every slice is there with its size.

    Raises ConfigError naming the file: no manifest, one that cannot be understood, a slice missing or of another size.
    """
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: not a dataset") from error
    try:
        manifest = parse_manifest(data)
    except RemoteProtocolError as error:
        raise ConfigError(f"{directory}: {error}") from error
    for entry in manifest.slices:
        if (fault := size_fault(directory, entry)) is not None:
            raise ConfigError(f"{directory}: {fault}")
    return Dataset(directory, manifest, data)


def size_fault(directory: Path, entry: SliceEntry) -> str | None:
    """Say what is wrong with a slice as far as its size tells."""
    try:
        size = (directory / entry.name).stat().st_size
    except OSError as error:
        return f"{entry.name}: {error.strerror}"
    return None if size == entry.bytes else f"{entry.name}: {size} bytes where the manifest says {entry.bytes}"


def faults_of(directory: Path) -> list[str]:
    """Read a dataset whole and return every fault, each naming its file; an empty list is a sound dataset."""
    try:
        manifest = parse_manifest((directory / MANIFEST_NAME).read_bytes())
    except OSError as error:
        return [f"{MANIFEST_NAME}: {error.strerror}"]
    except RemoteProtocolError as error:
        return [str(error)]
    faults = [fault for entry in manifest.slices for fault in _slice_faults(directory, manifest, entry)]
    known = {MANIFEST_NAME, *(entry.name for entry in manifest.slices)}
    return faults + [
        f"{path.name}: not in the manifest" for path in sorted(directory.iterdir()) if path.name not in known
    ]


def _slice_faults(directory: Path, manifest: Manifest, entry: SliceEntry) -> Iterator[str]:
    if (fault := size_fault(directory, entry)) is not None:
        yield fault
        return
    path = directory / entry.name
    try:
        digest = _digest_of(path, manifest.digest_algorithm)
        found = _read_layout(path, entry.bytes)
    except OSError as error:
        yield f"{entry.name}: {error.strerror}"
    except RemoteProtocolError as error:
        yield f"{entry.name}: {error}"
    else:
        if digest != entry.digest:
            yield f"{entry.name}: {manifest.digest_algorithm} {digest} where the manifest says {entry.digest}"
        for fault in shape_faults(manifest, entry.samples, found):
            yield f"{entry.name}: {fault}"


def shape_faults(manifest: Manifest, samples: int, found: Layout) -> Iterator[str]:
    """Yield how the tensors of a slice differ from the schema."""
    for name in sorted(manifest.schema.keys() | found.tensors.keys()):
        if name not in manifest.schema:
            yield f"tensor {name!r} is not in the schema"
        elif name not in found.tensors:
            yield f"tensor {name!r} is missing"
        else:
            sample = parse_tensor(name, manifest.schema[name])
            wanted = TensorSpec(name, sample.dtype, (samples, *sample.shape))
            if found.tensors[name].spec != wanted:
                yield f"tensor {name!r} is {found.tensors[name].spec}, not {wanted}"


def _digest_of(path: Path, algorithm: str) -> str:
    hasher = HASHES[algorithm]()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _read_layout(path: Path, file_bytes: int) -> Layout:
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        rest = file.read(header_length(prefix, file_bytes=file_bytes) - LENGTH_BYTES)
    return parse_header(prefix + rest, file_bytes=file_bytes)
