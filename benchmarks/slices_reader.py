"""Our reader in the slices benchmark: the executor's own rows, from slices that are fetched while it reads.

stdin: path of a slice per line, in order, until it ends       stdout: one JSON line: seconds, samples, digest
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import msgspec
import torch

from hypha.training.batches import Rows

LINE_CHARS_MAX = 4096


def main() -> None:
    """Read every batch, and with `--digest` say what all of them hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schema", type=msgspec.json.decode, help="JSON of the dataset's schema")
    parser.add_argument("batch", type=int)
    parser.add_argument("--digest", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("ready", flush=True)
    samples, sha, started = 0, hashlib.sha256(), 0.0
    while line := sys.stdin.readline(LINE_CHARS_MAX):
        started = started or time.perf_counter()
        rows = Rows(Path(line.strip()), asked.schema)
        for start in range(0, rows.samples, asked.batch):
            batch = rows.read(start, min(start + asked.batch, rows.samples))
            samples += len(next(iter(batch.values())))
            # Mapped rows are brought in when they are looked at, and the others look at theirs when they copy them.
            for name in sorted(batch):
                looked = batch[name].sum()
                if asked.digest:
                    sha.update(batch[name].numpy().tobytes())
            del looked
    print(msgspec.json.encode({"samples": samples, "digest": sha.hexdigest(), "ended": time.perf_counter()}).decode())


if __name__ == "__main__":
    main()
