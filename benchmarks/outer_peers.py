"""The other systems of the outer-round benchmark, each in an environment of its own below .bench/.

environment(SYSTEM)                    made once with pip from pinned packages; seconds to a minute each
spans(SYSTEM, workers, elements, n)    python outer_SYSTEM.py … ─▶ [(begin, end), …] and processor seconds of each
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.outer_watch import Watch

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".bench"
PACKAGES = {
    "hivemind": ("hivemind==1.1.12", "torch==2.13.0", "numpy"),
    "flower": ("flwr==1.41.0", "numpy"),
    "torchft": ("torchft==0.2.0", "torch==2.13.0", "numpy"),
}
PATIENCE_S = 900.0


def environment(system: str) -> Path:
    """Return the interpreter of a system's environment, made where it is missing. Raises CalledProcessError."""
    directory = CACHE / system
    python, done = directory / "bin" / "python", directory / ".installed"
    wanted = "\n".join(PACKAGES[system])
    if not (done.exists() and done.read_text() == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES[system]], check=True)
        done.write_text(wanted)
    return python


def rounds_of(system: str, workers: int, elements: int, rounds: int) -> list[dict[str, float]]:
    """Run a system; returns seconds and processor seconds of each round. Raises RuntimeError: it averaged wrongly."""
    script = REPOSITORY / "benchmarks" / f"outer_{system}.py"
    command = [str(environment(system)), str(script), str(workers), str(elements), str(rounds)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=threads) as process,
        Watch({system: process.pid}) as watch,
    ):
        said, _ = process.communicate(timeout=PATIENCE_S)
    lines = [line for line in said.decode().splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        raise RuntimeError(f"{system} ended with {process.returncode}")
    answer = json.loads(lines[-1])
    if not answer["fine"] or answer["error"] > 1e-3:
        raise RuntimeError(f"{system} averaged wrongly: {answer}")
    return [
        {"s": round(end - begin, 3), "cpu_s": round(sum(watch.between(begin, end).values()), 2)}
        for begin, end in answer["spans"]
    ]
