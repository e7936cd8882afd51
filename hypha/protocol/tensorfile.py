"""The canonical SafeTensors layout (https://github.com/huggingface/safetensors#format), as arithmetic on bytes.

    ┌────────────┬───────────────────────────────────────────────────────────┬──────────────┐
    │ n, 8 bytes │ n bytes of JSON, padded with spaces to a multiple of 8     │ tensor bytes │
    │ little end.│ {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},…}   │ a, then b, … │
    └────────────┴───────────────────────────────────────────────────────────┴──────────────┘

Canonical: names sorted by code point, tensors in that order without gaps, compact JSON, no metadata. So equal tensors
make equal bytes, and a digest of the file is one of the tensors. `parse_header` also reads what is not canonical
(slices made elsewhere), but never trusts it: every bound is checked before anything is believed.
"""

import json
import math
from collections.abc import Iterable
from typing import Any, TypeGuard

from msgspec import Struct

from hypha.errors import RemoteProtocolError

# Bytes per element of every dtype read or written here.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

# What names a file of tensors wherever it goes: lower-case hexadecimal, 64 characters (docs/decisions/0020).
DIGEST_ALGORITHM = "blake3"

LENGTH_BYTES = 8
# 100 bytes of JSON per tensor leave room for 80 000 tensors; the reference implementation allows 100 MB.
HEADER_BYTES_MAX = 8 << 20
NAME_CHARS_MAX = 512
DIMENSIONS_MAX = 16


class TensorSpec(Struct, frozen=True, order=True):
    """A tensor's name, SafeTensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)

    def __str__(self) -> str:
        """As schemas write it: `F32[2, 3]`."""
        return f"{self.dtype}{list(self.shape)}"


class Placed(Struct, frozen=True):
    """A tensor and the file offsets [start, stop) of its data."""

    spec: TensorSpec
    start: int
    stop: int


class Layout(Struct, frozen=True):
    """Where everything lies in one file: tensors by name, in file order."""

    tensors: dict[str, Placed]
    header_bytes: int
    file_bytes: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: placed.spec.shape for name, placed in self.tensors.items()}


def layout(specs: Iterable[TensorSpec]) -> tuple[bytes, Layout]:
    """Return the canonical header for these tensors (any order, distinct names) and where their data go."""
    entries: dict[str, Any] = {}
    offsets: list[tuple[TensorSpec, int, int]] = []
    offset = 0
    for spec in sorted(specs):
        assert spec.name not in entries, f"tensor {spec.name!r} named twice"
        end = offset + spec.bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offsets.append((spec, offset, end))
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    placed = {spec.name: Placed(spec, len(header) + start, len(header) + stop) for spec, start, stop in offsets}
    return header, Layout(placed, len(header), len(header) + offset)


def header_length(prefix: bytes, *, file_bytes: int) -> int:
    """Return how many bytes the header takes, its length field included, from the file's first 8 bytes.

    Raises RemoteProtocolError: the file is too short for what it says, or says too much.
    """
    if len(prefix) < LENGTH_BYTES:
        raise RemoteProtocolError(f"not SafeTensors: {len(prefix)} bytes are too few for a header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > HEADER_BYTES_MAX:
        raise RemoteProtocolError(f"header of {length} bytes exceeds the limit of {HEADER_BYTES_MAX}")
    if LENGTH_BYTES + length > file_bytes:
        raise RemoteProtocolError(f"header of {length} bytes in a file of {file_bytes}")
    return LENGTH_BYTES + length


def parse_header(header: bytes, *, file_bytes: int) -> Layout:
    """Return the layout that `header` (length field included) describes, every bound checked.

    Raises RemoteProtocolError naming the tensor and the fault.
    """
    if len(header) != header_length(header, file_bytes=file_bytes):
        raise RemoteProtocolError(f"header is cut short: {len(header)} bytes")
    try:
        entries = json.loads(header[LENGTH_BYTES:])
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise RemoteProtocolError("header is not a JSON object")
    entries.pop("__metadata__", None)
    placed = [_place(name, entry, len(header)) for name, entry in entries.items()]
    placed.sort(key=lambda one: (one.start, one.stop))
    end = len(header)
    for one in placed:
        if one.start != end:
            raise RemoteProtocolError(f"tensor {one.spec.name!r} starts at {one.start}, expected {end}")
        end = one.stop
    if end != file_bytes:
        raise RemoteProtocolError(f"tensors end at {end} in a file of {file_bytes} bytes")
    return Layout({one.spec.name: one for one in placed}, len(header), file_bytes)


def _place(name: str, entry: object, data_start: int) -> Placed:
    def fault(what: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"tensor {name[:NAME_CHARS_MAX]!r}: {what}")

    if len(name) > NAME_CHARS_MAX:
        raise fault(f"its name has {len(name)} characters, limit {NAME_CHARS_MAX}")
    if not isinstance(entry, dict):
        raise fault("its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fault(f"unknown dtype {str(dtype)[:32]!r}")
    if not _counts(shape) or len(shape) > DIMENSIONS_MAX:
        raise fault(f"shape is not a list of at most {DIMENSIONS_MAX} counts")
    if not _counts(offsets) or len(offsets) != 2:
        raise fault("data_offsets is not a pair of counts")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.bytes:
        raise fault(f"{offsets[1] - offsets[0]} bytes of data for {spec}, which takes {spec.bytes}")
    return Placed(spec, data_start + offsets[0], data_start + offsets[1])


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**53 for one in value)
