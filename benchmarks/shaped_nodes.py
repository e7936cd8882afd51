"""The network of the utilisation benchmark: the product's own processes, its workers behind links of their own.

    gateway · data node · scheduler           on the bridge's side
    worker-0 (serves parameters) · worker-1 · worker-2 (train)      each in a namespace (shaped_links)

Configurations and certificates go to DIR, logs to DIR/NAME.log, what the executors note to DIR/notes.
"""

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from benchmarks import shaped_links
from benchmarks.certificates import issue
from benchmarks.ending import end
from hypha.demo.nodes import free_port

TRAINERS = 2
LAYERS, HIDDEN = 4, 128
BATCH, TOKENS = 24, 64
# Far more samples than any run takes; many small slices, since they travel on the slow link as well.
TEXT_BYTES, SLICE_BYTES = 4_000_000, 32_768
STOP_S, READY_S = 20.0, 240.0
READY = {"gateway": "Gateway ready", "data": "Serving", "worker": "Worker ready"}
REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent


class Variant(Struct, frozen=True, kw_only=True):
    """A way to train: inner steps of each worker per outer step, outer steps, and how updates travel."""

    name: str
    steps: int
    rounds: int
    codec: str = "none"
    fragments: int = 1
    overlap: int = 0

    @property
    def job(self) -> list[str]:
        """Lines of the scheduler's configuration."""
        lines = []
        if self.codec != "none":
            lines = ["[scheduler.job.compression]"]
            lines += [f'{key} = "{self.codec}"' for key in ("pseudo_gradients", "outer_updates")]
        if self.fragments > 1:
            lines += ["[scheduler.job.streaming]", f"fragments = {self.fragments}"]
        if self.overlap:
            lines += [f"overlap_steps = {self.overlap}", "mixing = 0.5"]
        return lines


def prepare(directory: Path, variant: Variant) -> dict[str, str]:
    """Write certificates, configurations and a dataset; returns role by name in the order of starting."""
    workers = [f"worker-{number}" for number in range(TRAINERS + 1)]
    roles = {"gateway": "gateway", "data": "data", **dict.fromkeys(workers, "worker"), "scheduler": "scheduler"}
    (directory / "notes").mkdir()
    files, port = issue(directory, roles), free_port()
    gateway = f"/ip4/{shaped_links.NETWORK}.1/tcp/{port}"
    for name in roles:
        own = f"/ip4/{_address(name)}/tcp/0"
        addresses = (gateway, "[]") if name == "gateway" else (own, json.dumps([gateway]))
        lines = [f'{key} = "{getattr(files[name], key)}"' for key in ("cert_pem", "key_pem", "trust_pem")]
        lines += [f'listen_addresses = ["{addresses[0]}"]', f"gateway_addresses = {addresses[1]}"]
        (directory / f"{name}.toml").write_text("\n".join([*lines, *_more(directory, name, variant)]) + "\n")
    sources = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    command = [str(PROGRAMS / "hypha-data"), "prepare", *sources, "--out", str(directory / "dataset")]
    sizes = ["--sequence-length", str(TOKENS), "--max-bytes", str(TEXT_BYTES), "--slice-bytes", str(SLICE_BYTES)]
    subprocess.run([*command, "--name", "bench", *sizes], check=True, stdout=subprocess.DEVNULL)
    return roles


def _address(name: str) -> str:
    number = name.removeprefix("worker-")
    return shaped_links.address(int(number)) if number != name else f"{shaped_links.NETWORK}.1"


def _more(directory: Path, name: str, variant: Variant) -> list[str]:
    if name == "gateway":
        return []
    if name == "data":
        return [f'dataset_path = "{directory / "dataset"}"']
    if name == "scheduler":
        return _job(directory, variant)
    machine = [f'work_dir = "{directory / name}"', "[resources]", "cpu = 1", "memory = 1", "storage = 1", "gpu = 0"]
    if name == "worker-0":
        return [*machine, "[[executors]]", 'class = "aggregate"', 'name = "ps"', 'runtime = "parameter-server"']
    usual = ["--socket", "{SOCKET_PATH}", "--work-dir", "{WORK_DIR}", "--job", "{JOB_JSON}"]
    arguments = ["-m", "benchmarks.shaped_executor", "--bench-folder", str(directory / "notes"), *usual]
    command = [f'cmd = "{sys.executable}"', f"args = {json.dumps(arguments)}"]
    return [*machine, "[[executors]]", 'class = "train"', 'name = "t"', *command]


def _job(directory: Path, variant: Variant) -> list[str]:
    return (
        f"""
state_dir = "{directory / "state"}"
[scheduler.job]
dataset = "bench"
[scheduler.job.model]
type = "causal-lm"
[scheduler.job.model.config]
model_type = "llama"
vocab_size = 256
hidden_size = {HIDDEN}
intermediate_size = 352
num_hidden_layers = {LAYERS}
num_attention_heads = 4
num_key_value_heads = 4
max_position_embeddings = {TOKENS}
tie_word_embeddings = false
bos_token_id = 0
eos_token_id = 0
[scheduler.job.rounds]
updates = {variant.rounds}
samples_between_updates = {variant.steps * BATCH * TRAINERS}
max_batch_size = {BATCH}
evaluate_every = 0
deadline_s = 3600
batch_sizes = "equal"
[scheduler.job.checkpoint]
every = 1000
[scheduler.job.resources]
workers = {TRAINERS}
executor = "t"
parameter_server_executor = "ps"
worker = {{ cpu = 1, memory = 0.5 }}
parameter_server = {{ cpu = 1, memory = 0.5 }}
""".splitlines()
        + variant.job
    )


@contextmanager
def running(directory: Path, roles: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run all of them while the block runs; gives the scheduler, which ends with the job."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, role in roles.items():
            if role == "scheduler":
                for other in started:
                    _wait_for(directory / f"{other}.log", READY[roles[other]])
            started[name] = _start(directory, name, role)
            if role == "gateway":
                _wait_for(directory / f"{name}.log", READY[role])
        yield started["scheduler"]
    finally:
        end(started.values(), STOP_S)


def _start(directory: Path, name: str, role: str) -> subprocess.Popen[bytes]:
    number = name.removeprefix("worker-")
    prefix = shaped_links.inside(int(number)) if number != name else ()
    command = [*prefix, str(PROGRAMS / f"hypha-{role}"), "run", "-c", str(directory / f"{name}.toml")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _wait_for(log: Path, word: str) -> None:
    until = time.monotonic() + READY_S
    while word not in log.read_text():
        if time.monotonic() > until:
            raise RuntimeError(f"{log.name} does not say {word!r}:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)
