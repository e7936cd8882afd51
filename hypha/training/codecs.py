"""Codecs: elements of a tensor to bytes and back, all rows at once (hypha.protocol.compression says what a row is).

    fp32 ── rows ──▶ encode ──▶ U8 [rows, row_bytes] ──▶ decode ──▶ fp32, the same bits on every machine
      int8   scale = max|x| / 127     q = round(x / scale)                    x' = q · scale
      int4   scale = max|x| / 7       q = round or floor(x / scale + random)  x' = q · scale
      topk   the k largest |x|, split at their mean into two sets; x' = ± the mean of its set, else 0

Every operation here rounds by itself (hypha.training.outer says why), ties are broken by index, and the only sums are
of integers, in fp64: neither the order nor the width of a machine's vectors changes a bit. Only `stochastic` depends on
anything but the elements. What decoders read is another machine's word: scales and indices are checked.
"""

from collections.abc import Callable

import torch

from hypha.errors import RemoteProtocolError
from hypha.protocol.compression import LEVELS, SCALE_BYTES, Coding
from hypha.training.tensors import is_finite

INT8_MAX, INT4_MAX = 127, 7
INT4_ZERO = 8  # four bits hold q + 8
# The largest magnitude coded: products with a scale stay finite. No pseudo-gradient of a living model comes near.
MAGNITUDE_MAX = 2.0**100
# Scales below are taken for zero: their reciprocals stay finite, and no result is subnormal.
SCALE_MIN = 2.0**-100
FP16_MAX = 65_504.0
# Magnitudes are averaged as integer parts of the largest: 4096 of them add up exactly in fp64.
GRID = 2.0**20

Generator = torch.Generator | None
Encode = Callable[[torch.Tensor, Coding, Generator], torch.Tensor]
Decode = Callable[[torch.Tensor, int, Coding], torch.Tensor]


def encode(elements: torch.Tensor, coding: Coding, generator: Generator = None) -> torch.Tensor:
    """Return the bytes (U8, flat) of flat fp32 elements on the CPU that begin where a row does.

    `generator` is the randomness of stochastic rounding. Raises RemoteProtocolError: not finite, or too large to code.
    """
    if coding.codec == "none":
        return elements.contiguous().view(torch.uint8)
    if elements.numel() and not bool(elements.abs().amax() <= MAGNITUDE_MAX):
        raise RemoteProtocolError("elements are not finite, or too large to be coded")
    work, row = ENCODERS[coding.codec], coding.row_elements
    whole = elements.numel() // row * row
    parts = [work(elements[:whole].reshape(-1, row), coding, generator)] if whole else []
    if whole < elements.numel():
        parts.append(work(elements[whole:].reshape(1, -1), coding, generator))
    flat = [part.reshape(-1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat or [torch.empty(0, dtype=torch.uint8)])


def decode(data: torch.Tensor, elements: int, coding: Coding) -> torch.Tensor:
    """Return the fp32 elements that flat bytes stand for, always finite except with `none`.

    `data` has `coding.bytes_of(elements)` bytes. Raises RemoteProtocolError naming what is wrong in them.
    """
    assert data.numel() == coding.bytes_of(elements), f"{data.numel()} bytes for {elements} elements as {coding}"
    if coding.codec == "none":
        return data.view(torch.float32)
    work, row = DECODERS[coding.codec], coding.row_elements
    rows, rest = divmod(elements, row)
    split = rows * coding.row_bytes(row)
    parts = [work(data[:split].view(rows, -1), row, coding)] if rows else []
    if rest:
        parts.append(work(data[split:].view(1, -1), rest, coding))
    flat = [part.reshape(-1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat or [torch.empty(0)])


# --- floats: a row is one element ---


def _encode_fp16(rows: torch.Tensor, _coding: Coding, _generator: Generator) -> torch.Tensor:
    """What is beyond fp16 becomes its largest number; what is below 2^-25 becomes zero."""
    return rows.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).view(torch.uint8)


def _encode_bf16(rows: torch.Tensor, _coding: Coding, _generator: Generator) -> torch.Tensor:
    return rows.to(torch.bfloat16).contiguous().view(torch.uint8)


def _decode_fp16(data: torch.Tensor, _elements: int, _coding: Coding) -> torch.Tensor:
    return _finite(data.contiguous().view(torch.float16).to(torch.float32))


def _decode_bf16(data: torch.Tensor, _elements: int, _coding: Coding) -> torch.Tensor:
    return _finite(data.contiguous().view(torch.bfloat16).to(torch.float32))


def _finite(elements: torch.Tensor) -> torch.Tensor:
    if not is_finite(elements):
        raise RemoteProtocolError("not finite")
    return elements


# --- integers with a scale per block ---


def _scales(largest: torch.Tensor) -> torch.Tensor:
    """What is too small to be worth a scale is zero."""
    return torch.where(largest < SCALE_MIN, torch.zeros(()), largest)


def _over(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rows / scale, and 0 where the scale is 0; one division per row."""
    return rows * torch.where(scale > 0, scale.reciprocal(), torch.zeros(()))


def _with_scale(scale: torch.Tensor, body: torch.Tensor) -> torch.Tensor:
    data = torch.empty(body.shape[0], SCALE_BYTES + body.shape[1], dtype=torch.uint8)
    data[:, :SCALE_BYTES] = scale.view(torch.uint8)
    data[:, SCALE_BYTES:] = body
    return data


def _scales_of(data: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first `count` fp32 numbers of each row, checked; copied, as a row's bytes need not be aligned."""
    scales = data[:, : count * SCALE_BYTES].reshape(-1).clone().view(torch.float32).view(len(data), count)
    if not bool(((scales >= 0) & (scales <= MAGNITUDE_MAX)).all()):
        raise RemoteProtocolError(f"a scale is negative, not finite or above {MAGNITUDE_MAX:g}")
    return scales


def _encode_int8(rows: torch.Tensor, _coding: Coding, _generator: Generator) -> torch.Tensor:
    scale = _scales(rows.abs().amax(1, keepdim=True) / INT8_MAX)
    return _with_scale(scale, _over(rows, scale).round_().to(torch.int8).view(torch.uint8))


def _decode_int8(data: torch.Tensor, _elements: int, _coding: Coding) -> torch.Tensor:
    return data[:, SCALE_BYTES:].view(torch.int8).to(torch.float32).mul_(_scales_of(data, 1))


def _encode_int4(rows: torch.Tensor, coding: Coding, generator: Generator) -> torch.Tensor:
    """Byte i holds element i in its low half and, in its high half, the element half a row further on."""
    scale = _scales(rows.abs().amax(1, keepdim=True) / INT4_MAX)
    q = _over(rows, scale)
    q = q.add_(torch.rand(q.shape, generator=generator)).floor_() if coding.stochastic else q.round_()
    q = q.clamp_(-INT4_MAX, INT4_MAX).add_(INT4_ZERO).to(torch.uint8)
    half = (q.shape[1] + 1) // 2
    packed = q[:, :half].clone()
    packed[:, : q.shape[1] - half] |= q[:, half:] << 4
    return _with_scale(scale, packed)


def _decode_int4(data: torch.Tensor, elements: int, _coding: Coding) -> torch.Tensor:
    body, half = data[:, SCALE_BYTES:], (elements + 1) // 2
    rows = torch.empty(data.shape[0], elements)
    rows[:, :half] = body & 15
    rows[:, half:] = (body >> 4)[:, : elements - half]
    return rows.sub_(INT4_ZERO).mul_(_scales_of(data, 1))


# --- the largest of each chunk ---


def _encode_topk(rows: torch.Tensor, coding: Coding, _generator: Generator) -> torch.Tensor:
    magnitudes, kept = rows.abs(), coding.kept(rows.shape[1])
    index = _largest(magnitudes, kept)
    levels, high = _two_levels(magnitudes.gather(1, index))
    codes = high.to(torch.uint8) | (rows.gather(1, index) < 0).to(torch.uint8) << 1
    return torch.cat([levels.view(torch.uint8), _pack_indices(index), _pack_codes(codes)], dim=1)


def _largest(magnitudes: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the indices [rows, kept] of the largest, ascending; of equal ones the first.

    torch.topk leaves open which of equal elements it takes, so only its smallest value is used.
    """
    least = magnitudes.topk(kept, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = magnitudes >= least
    if int(chosen.sum()) != kept * len(magnitudes):
        above, equal = magnitudes > least, magnitudes == least
        room = kept - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(len(magnitudes), kept)


def _two_levels(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two magnitudes [rows, 2] that stand for all, and which elements the larger one stands for."""
    largest = magnitudes.amax(1, keepdim=True).to(torch.float64)
    unit = torch.where(largest < SCALE_MIN, torch.zeros((), dtype=torch.float64), largest / GRID)
    grid = torch.where(unit > 0, magnitudes.to(torch.float64) / unit, torch.zeros((), dtype=torch.float64)).round()
    high = grid * grid.shape[1] >= grid.sum(1, keepdim=True)
    means = [_mean_of(grid, ~high) * unit, _mean_of(grid, high) * unit]
    return _scales(torch.cat(means, dim=1).to(torch.float32)), high


def _mean_of(grid: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return (grid * chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp_(min=1)


def _decode_topk(data: torch.Tensor, elements: int, coding: Coding) -> torch.Tensor:
    kept, start = coding.kept(elements), LEVELS * SCALE_BYTES
    levels = _scales_of(data, LEVELS)
    stop = start + (kept + 1) // 2 * 3
    index = _unpack_indices(data[:, start:stop], kept)
    if not bool((index[:, 1:] > index[:, :-1]).all()):
        raise RemoteProtocolError("indices do not ascend")
    if not bool((index[:, -1] < elements).all()):
        raise RemoteProtocolError(f"an index exceeds its chunk of {elements} elements")
    codes = _unpack_codes(data[:, stop:], kept)
    values = levels.gather(1, (codes & 1).to(torch.int64))
    values = torch.where(codes > 1, -values, values)
    return torch.zeros(len(data), elements).scatter_(1, index, values)


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Rows with zeros behind them, as groups [rows, groups, multiple]."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % multiple))
    return padded.view(len(rows), -1, multiple)


def _pack_indices(index: torch.Tensor) -> torch.Tensor:
    """Two indices of 12 bits in three bytes, low bits first."""
    first, second = _padded(index.to(torch.int32), 2).unbind(2)
    packed = torch.stack([first & 255, first >> 8 | (second & 15) << 4, second >> 4], dim=2)
    return packed.to(torch.uint8).view(len(index), -1)


def _unpack_indices(data: torch.Tensor, kept: int) -> torch.Tensor:
    one, two, three = data.to(torch.int64).view(len(data), -1, 3).unbind(2)
    index = torch.stack([one | (two & 15) << 8, two >> 4 | three << 4], dim=2)
    return index.view(len(data), -1)[:, :kept]


def _pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Four values of 2 bits in a byte, low bits first: 1 for the larger magnitude, 2 for the negative sign."""
    one, two, three, four = _padded(codes, 4).unbind(2)
    return one | two << 2 | three << 4 | four << 6


def _unpack_codes(data: torch.Tensor, kept: int) -> torch.Tensor:
    codes = torch.stack([data & 3, data >> 2 & 3, data >> 4 & 3, data >> 6], dim=2)
    return codes.view(len(data), -1)[:, :kept]


ENCODERS: dict[str, Encode] = {
    "fp16": _encode_fp16,
    "bf16": _encode_bf16,
    "int8": _encode_int8,
    "int4": _encode_int4,
    "topk": _encode_topk,
}
DECODERS: dict[str, Decode] = {
    "fp16": _decode_fp16,
    "bf16": _decode_bf16,
    "int8": _decode_int8,
    "int4": _decode_int4,
    "topk": _decode_topk,
}
