"""A handful of seeds, and that a seed is a whole history: told twice, or by another interpreter, it is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.flavours import FLAVOURS
from tests.sim.main import run_seed

ROOT = Path(__file__).parent.parent.parent
# One of each flavour.
SEEDS = range(len(FLAVOURS))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_breaks_no_invariant(seed):
    report = run_seed(seed)
    assert report.broken is None, report.broken


@pytest.mark.parametrize("seed", [1, 8])
def test_the_same_seed_gives_the_same_event_log_twice(seed):
    first, again = run_seed(seed).lines, run_seed(seed).lines
    assert first == again
    assert len(first) > 100


def test_hashing_decides_nothing():
    assert elsewhere(2, "1") == elsewhere(2, "2") == "\n".join(run_seed(2).lines) + "\n"


def elsewhere(seed: int, hash_seed: str) -> str:
    """The event log of a seed, told by another interpreter that hashes otherwise."""
    code = f"from tests.sim.main import run_seed; print(*run_seed({seed}).lines, sep=chr(10))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout
