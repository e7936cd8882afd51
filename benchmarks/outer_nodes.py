"""A network of the product's own processes for the outer-round benchmark, all on this machine.

    gateway · data node · worker-1 … worker-N (train) · worker-0 (serves parameters) · scheduler ─▶ the job, to its end

Configurations and certificates go to DIR, logs to DIR/logs, what the executors note to DIR/notes.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from benchmarks.certificates import issue
from benchmarks.ending import end

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SIDE = 1024
LAYER_BYTES = (SIDE * SIDE + SIDE) * 4
STEPS, BATCH = 8, 4
STOP_S = 20.0
READY = {"gateway": "Gateway ready", "data": "Serving", "worker": "Worker ready"}


class Cluster(Struct, frozen=True, kw_only=True):
    """One run: workers that train, MB (10^6 bytes) of the model in fp32, outer steps; `prefix`: in what a node runs."""

    directory: Path
    work: Path
    workers: int
    megabytes: int
    rounds: int
    codec: str = "none"
    addresses: dict[str, str] = {}
    elsewhere: str = "127.0.0.1"  # address of nodes that have none of their own
    prefix: dict[str, tuple[str, ...]] = {}

    @property
    def layers(self) -> int:
        """Linear layers of SIDE by SIDE that make up the model."""
        return max(1, round(self.megabytes * 1e6 / LAYER_BYTES))

    @property
    def model_bytes(self) -> int:
        """Exact bytes of all parameters."""
        return self.layers * LAYER_BYTES

    @property
    def names(self) -> list[str]:
        """Workers, the one that serves first."""
        return [f"worker-{number}" for number in range(self.workers + 1)]

    def address(self, name: str) -> str:
        """IP address of a node."""
        return self.addresses.get(name, self.elsewhere)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(cluster: Cluster) -> None:
    """Write certificates, configurations and a dataset."""
    directory = cluster.directory
    for each in ("certs", "configs", "logs", "notes"):
        (directory / each).mkdir(parents=True, exist_ok=True)
    roles = {"gateway": "gateway", "data": "data", **dict.fromkeys(cluster.names, "worker"), "scheduler": "scheduler"}
    issue(directory / "certs", roles)
    port = free_port()
    for name in roles:
        (directory / "configs" / f"{name}.toml").write_text(_config(cluster, name, port))
    text = directory / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 40_000)
    command = [str(BIN / "hypha-data"), "prepare", str(text), "--out", str(directory / "dataset"), "--name", "bench"]
    subprocess.run([*command, "--sequence-length", "16"], check=True, capture_output=True)


def _config(cluster: Cluster, name: str, port: int) -> str:
    certs = cluster.directory / "certs"
    gateway = f"/ip4/{cluster.address('gateway')}/tcp/{port}"
    own_port, gateways = (port, "") if name == "gateway" else (0, f'"{gateway}"')
    text = (
        f'cert_pem = "{certs / name}.pem"\nkey_pem = "{certs / name}-key.pem"\ntrust_pem = "{certs / "trust.pem"}"\n'
        f'listen_addresses = ["/ip4/{cluster.address(name)}/tcp/{own_port}"]\ngateway_addresses = [{gateways}]\n'
    )
    if name == "data":
        text += f'dataset_path = "{cluster.directory / "dataset"}"\n'
    if name.startswith("worker"):
        text += _worker(cluster, name)
    if name == "scheduler":
        text += _job(cluster)
    return text


def _worker(cluster: Cluster, name: str) -> str:
    text = f'work_dir = "{cluster.work / name}"\n[resources]\ncpu = 1.0\nmemory = 1.0\nstorage = 1.0\ngpu = 0.0\n'
    text += "[[executors]]\n"
    if name == "worker-0":
        return text + 'class = "aggregate"\nname = "parameter-server"\nruntime = "parameter-server"\n'
    ours = ["--bench-folder", str(cluster.directory / "notes"), "--bench-workers", str(cluster.workers)]
    usual = ["--socket", "{SOCKET_PATH}", "--work-dir", "{WORK_DIR}", "--job", "{JOB_JSON}"]
    arguments = json.dumps(["-m", "benchmarks.outer_executor", *ours, *usual])
    return text + f'class = "train"\nname = "diloco-transformer"\ncmd = "{sys.executable}"\nargs = {arguments}\n'


def _job(cluster: Cluster) -> str:
    layers = json.dumps([["linear", SIDE, SIDE]] * cluster.layers)
    compression = ""
    if cluster.codec != "none":
        compression = (
            f'[scheduler.job.compression]\npseudo_gradients = "{cluster.codec}"\nouter_updates = "{cluster.codec}"\n'
        )
    return f"""
state_dir = "{cluster.work / "state"}"
[scheduler.job]
name = "outer"
dataset = "bench"
{compression}
[scheduler.job.model]
type = "torch"
[scheduler.job.model.config]
layers = {layers}
[scheduler.job.rounds]
updates = {cluster.rounds}
samples_between_updates = {STEPS * BATCH * cluster.workers}
max_batch_size = {BATCH}
evaluate_every = 0
[scheduler.job.checkpoint]
every = 1000
[scheduler.job.resources]
workers = {cluster.workers}
worker = {{ cpu = 1.0, memory = 1.0 }}
parameter_server = {{ cpu = 1.0, memory = 1.0 }}
"""


class Running(Struct, frozen=True):
    """Node processes by name."""

    processes: dict[str, subprocess.Popen[bytes]]


def start(cluster: Cluster, name: str, role: str) -> subprocess.Popen[bytes]:
    """Start one node; what it says goes to logs/NAME.log."""
    command = [str(BIN / f"hypha-{role}"), "run", "-c", str(cluster.directory / "configs" / f"{name}.toml")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (cluster.directory / "logs" / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*cluster.prefix.get(name, ()), *command], stdout=log, stderr=log, env=environment, cwd=cluster.directory
        )


@contextmanager
def nodes(cluster: Cluster) -> Iterator[Running]:
    """Run everything but the scheduler while the block runs."""
    running = Running({})
    try:
        running.processes["gateway"] = start(cluster, "gateway", "gateway")
        _wait_for(cluster, "gateway", READY["gateway"])
        running.processes["data"] = start(cluster, "data", "data")
        for name in cluster.names:
            running.processes[name] = start(cluster, name, "worker")
        for name in ("data", *cluster.names):
            _wait_for(cluster, name, READY["data" if name == "data" else "worker"])
        yield running
    finally:
        end(running.processes.values(), STOP_S)


def _wait_for(cluster: Cluster, name: str, word: str, patience_s: float = 300.0) -> None:
    log = cluster.directory / "logs" / f"{name}.log"
    until = time.monotonic() + patience_s
    while word not in log.read_text():
        if time.monotonic() > until:
            raise RuntimeError(f"{name} does not say {word!r}:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)
