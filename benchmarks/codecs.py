"""Codecs: fp32 input per second and core, what they lose, and bytes beside fp32 data-parallel.

    ELEMENTS normal numbers, in the pieces that files are written in ─▶ encode ─▶ decode      one thread
    ratio = H · 2(N−1)/N · 4 ÷ bytes per element      N workers by ring all-reduce every step, against one coded update
                                                      each way every H steps; by arithmetic, with N = 2, the least

Speed is the best of REPETITIONS passes, all of which are in the detail: what else runs on the machine only slows one.
"""

import argparse
import os
import time

import torch

from benchmarks.report import Figure, print_report
from hypha.protocol.compression import CODECS, PLAIN, Coding
from hypha.training import codecs
from hypha.training.tensors import PIECE_ELEMENTS

ELEMENTS = 1 << 24
REPETITIONS = 3
FP32_BYTES = 4
INNER_STEPS = 500
WORKERS = 2
GBPS_WANTED = {"int8": 1.0, "int4": 1.0}
RATIO_WANTED = {"int8": 1_900.0, "int4": 3_700.0, "topk": 10_000.0}
# What is recommended (docs/explanation/compression.md): the choices of all workers meet in an outer update.
DOWNWARD = {"topk": Coding(codec="topk", density=0.1)}
CODINGS = {codec: Coding(codec=codec) for codec in CODECS} | {
    "topk": Coding(codec="topk", density=0.03),
    "int4-stochastic": Coding(codec="int4", stochastic=True),
}


def ratio(upward: Coding, downward: Coding) -> float:
    """Bytes of fp32 data-parallel by ring all-reduce over bytes of updates, both directions together."""
    parallel = 2 * INNER_STEPS * 2 * (WORKERS - 1) / WORKERS * FP32_BYTES
    return parallel * ELEMENTS / (upward.bytes_of(ELEMENTS) + downward.bytes_of(ELEMENTS))


def gbps(began: float) -> float:
    """fp32 gigabytes per second, for all elements since `began`."""
    return round(ELEMENTS * FP32_BYTES / (time.perf_counter() - began) / 1e9, 2)


def once(pieces: list[torch.Tensor], coding: Coding) -> dict[str, float]:
    """Code all pieces and decode them again."""
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    data = [codecs.encode(piece, coding, generator) for piece in pieces]
    encoded = gbps(began)
    began = time.perf_counter()
    again = [codecs.decode(one, piece.numel(), coding) for one, piece in zip(data, pieces, strict=True)]
    decoded = gbps(began)
    lost = sum(float((a - b).norm()) ** 2 for a, b in zip(again, pieces, strict=True))
    whole = sum(float(piece.norm()) ** 2 for piece in pieces)
    return {"encode_gbps": encoded, "decode_gbps": decoded, "lost": round((lost / whole) ** 0.5, 5)}


def main() -> None:
    """Measure every codec and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    whole = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1)) * 0.01
    pieces = list(whole.view(-1, PIECE_ELEMENTS))
    figures, detail = [], {}
    for name, coding in CODINGS.items():
        runs = [once(pieces, coding) for _ in range(REPETITIONS)]
        fast = {key: max(run[key] for run in runs) for key in ("encode_gbps", "decode_gbps")}
        both = ratio(coding, DOWNWARD.get(name, coding))
        if name in GBPS_WANTED:
            for key, got in fast.items():
                figures.append(Figure(f"{name} {key}", got, GBPS_WANTED[name], "higher", "GB/s of fp32 per core"))
        if name in RATIO_WANTED:
            figures.append(Figure(f"{name} both ways", round(both), RATIO_WANTED[name], "higher", "×"))
        detail[name] = {
            "bits_per_element": coding.bytes_of(ELEMENTS) * 8 / ELEMENTS,
            "ratio_both_ways": round(both),
            "ratio_upward_only": round(ratio(coding, PLAIN)),
            "ratio_with_int4_down": round(ratio(coding, CODINGS["int4"])),
            "runs": runs,
        }
    print_report("codecs", figures, {"codecs": detail, "cores": os.cpu_count(), "load": os.getloadavg()})


if __name__ == "__main__":
    main()
