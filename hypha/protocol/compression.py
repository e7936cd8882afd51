"""How tensors travel between workers and the parameter server: codecs by name, their parameters and their sizes.

    codec  dtype  one row stands for  and takes
    none   F32    1 element           4 bytes, the element itself
    fp16   F16    1 element           2 bytes
    bf16   BF16   1 element           2 bytes
    int8   U8     128 elements        scale f32 ‖ 128 × int8
    int4   U8     128 elements        scale f32 ‖ 64 bytes of two 4-bit numbers
    topk   U8     4096 elements       two magnitudes f32 ‖ k indices of 12 bits ‖ k values of 2 bits

A coded update is one canonical SafeTensors file (hypha.protocol.tensorfile): tensor `w` becomes `int8:w`, U8 of as
many bytes as its rows take, the last row cut to the elements that are left. Names keep their order, and any run of
whole rows is a run of bytes. From codec and shapes the whole header follows: one that says anything else is a lie.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from hypha.protocol.tensorfile import Layout, TensorSpec

CodecName = Literal["none", "fp16", "bf16", "int8", "int4", "topk"]
CODECS: tuple[CodecName, ...] = ("none", "fp16", "bf16", "int8", "int4", "topk")

# One fp32 scale costs 1/32 of an int8 block and 1/16 of an int4 block, and an outlier spoils only 127 others.
BLOCK_ELEMENTS = 128
# Chunks of 64 × 64 as in SparseLoCo (arXiv 2508.15706): an index takes 12 bits.
CHUNK_ELEMENTS = 4096
SCALE_BYTES = 4
LEVELS = 2  # magnitudes per chunk
FLOAT_DTYPES = {"none": "F32", "fp16": "F16", "bf16": "BF16"}
FLOAT_BYTES = {"none": 4, "fp16": 2, "bf16": 2}


class Coding(Struct, frozen=True, kw_only=True):
    """One direction's codec with its parameters; `density` is the part of each chunk that topk sends."""

    codec: CodecName = "none"
    density: float = 0.02
    stochastic: bool = False

    @property
    def feedback(self) -> bool:
        """Whether what coding loses must be added to the next update: topk and rounding to 4 bits always lose the small
        elements of a row, so without feedback these would never move. Stochastic rounding is right on average.
        """
        return self.codec == "topk" or (self.codec == "int4" and not self.stochastic)

    @property
    def row_elements(self) -> int:
        """How many elements are coded together; a power of two."""
        return {"int8": BLOCK_ELEMENTS, "int4": BLOCK_ELEMENTS, "topk": CHUNK_ELEMENTS}.get(self.codec, 1)

    def kept(self, elements: int) -> int:
        """How many of a row's elements topk sends: at least one."""
        return min(elements, max(1, math.ceil(self.density * elements)))

    def row_bytes(self, elements: int) -> int:
        """Size of one row of at most `row_elements`."""
        match self.codec:
            case "int8":
                return SCALE_BYTES + elements
            case "int4":
                return SCALE_BYTES + (elements + 1) // 2
            case "topk":
                kept = self.kept(elements)
                return LEVELS * SCALE_BYTES + (kept + 1) // 2 * 3 + (kept + 3) // 4
            case "none" | "fp16" | "bf16":
                return FLOAT_BYTES[self.codec] * elements

    def bytes_of(self, elements: int) -> int:
        """Size of so many elements of one tensor, counted from the beginning of a row."""
        rows, rest = divmod(elements, self.row_elements)
        return rows * self.row_bytes(self.row_elements) + (self.row_bytes(rest) if rest else 0)

    def name(self, tensor: str) -> str:
        """Return the name a model's tensor has in a coded file."""
        return tensor if self.codec == "none" else f"{self.codec}:{tensor}"

    def spec(self, tensor: str, shape: tuple[int, ...]) -> TensorSpec:
        """What a coded file says of a model's tensor."""
        if self.codec in FLOAT_DTYPES:
            return TensorSpec(self.name(tensor), FLOAT_DTYPES[self.codec], shape)
        return TensorSpec(self.name(tensor), "U8", (self.bytes_of(math.prod(shape)),))

    def mismatch(self, found: Layout, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Say how a header differs from the one that follows from this coding and a model's shapes; None if not."""
        wanted = {self.name(name): (name, self.spec(name, tuple(shape))) for name, shape in shapes.items()}
        missing, extra = sorted(wanted.keys() - found.tensors.keys()), sorted(found.tensors.keys() - wanted.keys())
        for name in extra:
            codec, colon, tensor = name.partition(":")
            if colon and tensor in shapes:
                return f"tensor {tensor!r} is coded {codec!r}, expected {self.codec!r}"
        if missing:
            return f"tensor {missing[0]!r} is missing ({len(missing)} in all)"
        if extra:
            return f"tensor {extra[0]!r} is not of this model ({len(extra)} in all)"
        for name, placed in found.tensors.items():
            if placed.spec != wanted[name][1]:
                return f"tensor {name!r} is {placed.spec}, expected {wanted[name][1]}"
        return None


PLAIN = Coding()


class Compression(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """In what form updates travel. `docs/explanation/compression.md` compares the codecs.

    pseudo_gradients  codec from worker to parameter server
    outer_updates     codec from parameter server to workers
    rounding          of int4 pseudo-gradients; outer updates are always rounded to nearest, as a record must replay
    density           the part of each chunk of 4096 elements that topk sends, from each worker
    outer_density     the same of outer updates: the choices of all workers meet there, so it takes more to keep up
    """

    pseudo_gradients: CodecName = "none"
    outer_updates: CodecName = "none"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    density: Annotated[float, Meta(ge=0.01, le=0.03)] = 0.02
    outer_density: Annotated[float, Meta(ge=0.01, le=0.2)] = 0.1

    def __post_init__(self) -> None:
        """Refuse a way of rounding for what is not rounded so."""
        if self.rounding == "stochastic" and self.pseudo_gradients != "int4":
            raise ValueError(f"rounding 'stochastic' is for pseudo_gradients 'int4', not {self.pseudo_gradients!r}")

    @property
    def upward(self) -> Coding:
        """From worker to parameter server."""
        return Coding(codec=self.pseudo_gradients, density=self.density, stochastic=self.rounding == "stochastic")

    @property
    def downward(self) -> Coding:
        """From parameter server to workers."""
        return Coding(codec=self.outer_updates, density=self.outer_density)
