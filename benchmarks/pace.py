"""How long fast workers wait for slow ones: three real workers whose inner steps take 1, 2 and 4 times as long.

    gateway, data node, parameter server, 3 workers, scheduler   real processes; the slowness is the executors' own
                                                                 (pace_executor)
    loaded ─ steps ─ push ─ pushed ─── others still push ───┬─ merge, broadcast, load ─ loaded     one round, one worker
             compute        waiting for others              └ other

    waiting ÷ round, and everything that is no inner step ÷ round: rounds after the first two, all workers together

The same once more with `batch_sizes = "equal"` for comparison. The first round has full batches and no forecast, the
second opens on what was measured in the first.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.certificates import issue
from benchmarks.ending import end
from benchmarks.report import Figure, print_report
from hypha.demo.nodes import free_port

SLOWNESS = (1, 2, 4)
ROUNDS, ROUNDS_BEFORE = 11, 2
BATCH = 16
# 80 batches of everybody, sizes 16, 8 and 4: five seconds of each round are inner steps.
SAMPLES = 80 * (16 + 8 + 4)
WAITING_WANTED_PERCENT = 5.0
PROPORTION_WANTED_PERCENT = 12.5
JOB_S = 900.0
STOP_S = 10.0
LAYERS = [["linear", 64, 64]]
REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent


class Event(Struct, frozen=True, kw_only=True):
    """A line of what an executor notes."""

    round: int
    event: str
    at: float
    seconds: float = 0.0
    rows: int = 0
    samples: int = 0


class Round(Struct, frozen=True, kw_only=True):
    """One worker's part in one round: seconds, inner steps, and samples of the usual batch."""

    seconds: float
    computing_s: float
    pushed_at: float
    steps: int
    batch: float


# --- the network ------------------------------------------------------------------------------------------------------


def configure(directory: Path, sizes: str) -> list[tuple[str, Path]]:
    """Write certificates and configurations; returns (program, configuration) in the order of starting."""
    workers = {f"worker-{slowness}": "worker" for slowness in SLOWNESS}
    roles = {"gateway": "gateway", "data": "data", "server": "worker", **workers, "scheduler": "scheduler"}
    files, port = issue(directory, roles), free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    found = []
    for name, role in roles.items():
        own, known = (address, "[]") if name == "gateway" else ("/ip4/127.0.0.1/tcp/0", json.dumps([address]))
        lines = [f'{key} = "{getattr(files[name], key)}"' for key in ("cert_pem", "key_pem", "trust_pem")]
        lines += [f'listen_addresses = ["{own}"]', f"gateway_addresses = {known}", *_more(directory, name, sizes)]
        path = directory / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        found.append((f"hypha-{role}", path))
    return found


def _more(directory: Path, name: str, sizes: str) -> list[str]:
    if name == "data":
        return [f'dataset_path = "{directory / "dataset"}"']
    if name == "scheduler":
        return _job(directory, sizes)
    if name == "gateway":
        return []
    machine = [f'work_dir = "{directory / name}"', "[resources]", "cpu = 1", "memory = 1", "storage = 1", "gpu = 0"]
    if name == "server":
        return [*machine, "[[executors]]", 'class = "aggregate"', 'name = "ps"', 'runtime = "parameter-server"']
    ours = ["--bench-folder", str(directory), "--bench-slowness", name.removeprefix("worker-")]
    usual = ["--socket", "{SOCKET_PATH}", "--work-dir", "{WORK_DIR}", "--job", "{JOB_JSON}"]
    arguments = json.dumps(["-m", "benchmarks.pace_executor", *ours, *usual])
    return [
        *machine,
        "[[executors]]",
        'class = "train"',
        'name = "t"',
        f'cmd = "{sys.executable}"',
        f"args = {arguments}",
    ]


def _job(directory: Path, sizes: str) -> list[str]:
    return [
        f'state_dir = "{directory / "state"}"',
        "[scheduler.job]",
        'dataset = "bench"',
        'model = { type = "torch", config = { layers = ' + json.dumps(LAYERS) + " } }",
        "[scheduler.job.rounds]",
        f"updates = {ROUNDS}",
        f"samples_between_updates = {SAMPLES}",
        f"max_batch_size = {BATCH}",
        "evaluate_every = 0",
        f'batch_sizes = "{sizes}"',
        "[scheduler.job.resources]",
        f"workers = {len(SLOWNESS)}",
        'executor = "t"',
        'parameter_server_executor = "ps"',
        "worker = { cpu = 1, memory = 0.5 }",
        "parameter_server = { cpu = 1, memory = 0.5 }",
    ]


@contextmanager
def nodes(found: list[tuple[str, Path]]) -> Iterator[subprocess.Popen[bytes]]:
    """Run all of them while the context is open; gives the last one, the scheduler."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = []
    try:
        for program, path in found:
            with path.with_suffix(".log").open("wb") as log:
                command = [str(PROGRAMS / program), "run", "-c", str(path)]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        yield running[-1]
    finally:
        end(running, STOP_S)


def play(sizes: str) -> dict[int, list[Event]]:
    """Run the job; returns what each executor noted, by slowness. Raises RuntimeError where the job failed."""
    with tempfile.TemporaryDirectory() as path:
        directory = Path(path)
        text = directory / "text"
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 40_000)
        prepare = [str(PROGRAMS / "hypha-data"), "prepare", str(text), "--out", str(directory / "dataset")]
        command = [*prepare, "--name", "bench", "--sequence-length", "16"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = configure(directory, sizes)
        with nodes(found) as scheduler:
            code = scheduler.wait(JOB_S)
        if code:
            raise RuntimeError(f"the scheduler ended with {code}: {(directory / 'scheduler.log').read_text()[-2000:]}")
        return {slowness: noted((directory / f"{slowness}.jsonl").read_text()) for slowness in SLOWNESS}


def noted(text: str) -> list[Event]:
    """Read an executor's notes."""
    return [msgspec.json.decode(line, type=Event) for line in text.splitlines()]


# --- what came of it --------------------------------------------------------------------------------------------------


def rounds_of(events: list[Event]) -> dict[int, Round]:
    """Return one worker's rounds that are whole: from one base loaded to the next."""
    loaded = {event.round: event.at for event in events if event.event == "loaded"}
    found = {}
    for number, began in loaded.items():
        mine = [event for event in events if event.round == number]
        pushed = [event.at for event in mine if event.event == "pushed"]
        steps = [event for event in mine if event.event == "step"]
        if number + 1 in loaded and pushed and steps:
            found[number] = Round(
                seconds=loaded[number + 1] - began,
                computing_s=sum(step.seconds for step in steps),
                pushed_at=pushed[-1],
                steps=len(steps),
                batch=statistics.median(step.rows for step in steps),
            )
    return found


def shares(notes: dict[int, list[Event]]) -> dict[str, object]:
    """Return shares of all workers' time in the rounds that count, in per cent, and each worker's steps and batch."""
    by_worker = {slowness: rounds_of(events) for slowness, events in notes.items()}
    whole = set.intersection(*(set(rounds) for rounds in by_worker.values()))
    numbers = sorted(number for number in whole if number > ROUNDS_BEFORE)
    waited = {
        (slowness, number): max(other[number].pushed_at for other in by_worker.values()) - rounds[number].pushed_at
        for (slowness, rounds), number in itertools.product(by_worker.items(), numbers)
    }
    spent = [rounds[number] for rounds in by_worker.values() for number in numbers]
    seconds = sum(each.seconds for each in spent)
    batches = {slowness: statistics.mean(rounds[n].batch for n in numbers) for slowness, rounds in by_worker.items()}
    return {
        "rounds": len(numbers),
        "round_s": round(seconds / len(spent), 3),
        "waiting_percent": round(100 * sum(waited.values()) / seconds, 2),
        "idle_percent": round(100 * (1 - sum(each.computing_s for each in spent) / seconds), 2),
        "steps": {f"{s}x": round(statistics.mean(r[n].steps for n in numbers), 1) for s, r in by_worker.items()},
        "batch": {f"{slowness}x": round(batch, 2) for slowness, batch in batches.items()},
        "waiting_by_round": [
            round(100 * sum(waited[s, n] for s in by_worker) / sum(r[n].seconds for r in by_worker.values()), 2)
            for n in numbers
        ],
    }


def out_of_proportion(batch: dict[str, float]) -> float:
    """Return by how many per cent the batch furthest from batch of the fastest ÷ slowness is off."""
    fastest = batch[f"{SLOWNESS[0]}x"]
    return round(max(abs(batch[f"{slowness}x"] * slowness / fastest - 1) for slowness in SLOWNESS) * 100, 1)


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {sizes: shares(play(sizes)) for sizes in ("proportional", "equal")}
    fitted = found["proportional"]
    batch = fitted["batch"]
    assert isinstance(batch, dict), "by worker"
    figures = [
        Figure(
            "waiting for other workers", float(str(fitted["waiting_percent"])), WAITING_WANTED_PERCENT, "lower", "%"
        ),
        Figure(
            "batch furthest from proportion to speed", out_of_proportion(batch), PROPORTION_WANTED_PERCENT, "lower", "%"
        ),
    ]
    print_report("pace", figures, {**found, "cores": os.cpu_count(), "load": os.getloadavg()})


if __name__ == "__main__":
    main()
