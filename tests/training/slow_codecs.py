"""The codecs once more, one element at a time in plain Python: what the fast ones are held against.

numpy's float32 scalars round every operation as the tensors do. Packing is by shifts on one big integer.
"""

import math
import struct

import numpy as np

F32 = np.float32


def blocks(values, coding):
    for start in range(0, len(values), coding.row_elements):
        yield [F32(value) for value in values[start : start + coding.row_elements]]


def packed(numbers, bits, size):
    total = 0
    for index, number in enumerate(numbers):
        total |= int(number) << (bits * index)
    return total.to_bytes(size, "little")


def encode(values, coding):
    """Bytes of a list of floats; int4 rounds to nearest."""
    work = {"int8": int8, "int4": int4, "topk": topk}[coding.codec]
    return b"".join(work(row, coding) for row in blocks(values, coding))


def quantised(row, largest):
    scale = max(abs(value) for value in row) / F32(largest)
    if scale < 2.0**-100:
        return struct.pack("<f", 0.0), [0] * len(row)
    inverse = F32(1) / scale
    return struct.pack("<f", scale), [round(float(value * inverse)) for value in row]


def int8(row, _coding):
    scale, q = quantised(row, 127)
    return scale + bytes(one & 255 for one in q)


def int4(row, _coding):
    scale, q = quantised(row, 7)
    half = (len(q) + 1) // 2
    high = [*(one + 8 for one in q[half:]), *([0] * (2 * half - len(q)))]
    return scale + bytes(low + 8 | up << 4 for low, up in zip(q[:half], high, strict=True))


def topk(row, coding):
    kept = coding.kept(len(row))
    by_size = sorted(range(len(row)), key=lambda index: (-abs(row[index]), index))
    chosen = sorted(by_size[:kept])
    largest = float(max(abs(row[index]) for index in chosen))
    unit = 0.0 if largest < 2.0**-100 else largest / 2**20
    grid = [round(float(abs(row[index])) / unit) if unit else 0 for index in chosen]
    high = [one * kept >= sum(grid) for one in grid]
    levels = []
    for wanted in (False, True):
        members = [one for one, is_high in zip(grid, high, strict=True) if is_high == wanted]
        level = F32(sum(members) / max(1, len(members)) * unit)
        levels.append(0.0 if level < 2.0**-100 else float(level))
    codes = [is_high + 2 * bool(row[index] < 0) for index, is_high in zip(chosen, high, strict=True)]
    return (
        struct.pack("<ff", *levels)
        + packed(chosen, 12, math.ceil(kept / 2) * 3)
        + packed(codes, 2, math.ceil(kept / 4))
    )


def decode(data, elements, coding):
    """Floats that bytes stand for, unchecked."""
    values = []
    while len(values) < elements:
        count = min(coding.row_elements, elements - len(values))
        size = coding.row_bytes(count)
        values += DECODERS[coding.codec](data[:size], count, coding)
        data = data[size:]
    return values


def undo_int8(row, _count, _coding):
    scale = np.frombuffer(row[:4], "<f4")[0]
    return [float(F32(one) * scale) for one in np.frombuffer(row[4:], "i1")]


def undo_int4(row, count, _coding):
    scale = np.frombuffer(row[:4], "<f4")[0]
    q = [byte & 15 for byte in row[4:]] + [byte >> 4 for byte in row[4:]]
    return [float(F32(one - 8) * scale) for one in q[:count]]


def undo_topk(row, count, coding):
    kept = coding.kept(count)
    levels = struct.unpack("<ff", row[:8])
    stop = 8 + math.ceil(kept / 2) * 3
    indices, codes = int.from_bytes(row[8:stop], "little"), int.from_bytes(row[stop:], "little")
    values = [0.0] * count
    for number in range(kept):
        code = codes >> (2 * number) & 3
        values[indices >> (12 * number) & 4095] = levels[code & 1] * (-1 if code & 2 else 1)
    return values


DECODERS = {"int8": undo_int8, "int4": undo_int4, "topk": undo_topk}
