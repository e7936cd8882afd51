"""Who takes part in the chaos, and their configurations.

gateway-1 ◀─▶ gateway-2      data-1, data-2: the same dataset
worker-1, worker-2 train     worker-3 serves parameters     worker-4 is a spare for either
scheduler-1 leads, scheduler-2 stands by: a certificate and a state directory each, one store for chain and artifacts
configs/RUN-1.toml, RUN-2.toml: the job of a run, calm or chaos, for either of them
"""

import subprocess
from pathlib import Path

from msgspec import Struct

from hypha.demo.nodes import free_port
from tests.chaos import dataset
from tests.e2e.programs import ENVIRONMENT

GATEWAYS = ("gateway-1", "gateway-2")
DATA_NODES = ("data-1", "data-2")
EXECUTORS = {
    "worker-1": ("train",),
    "worker-2": ("train",),
    "worker-3": ("aggregate",),
    "worker-4": ("train", "aggregate"),
}
WORKERS = tuple(EXECUTORS)
SCHEDULERS = ("scheduler-1", "scheduler-2")
CALM, CHAOS = "calm", "chaos"
TRAINERS = 2
ROLES = {
    **dict.fromkeys(GATEWAYS, "gateway"),
    **dict.fromkeys(DATA_NODES, "data"),
    **dict.fromkeys(WORKERS, "worker"),
    **dict.fromkeys(SCHEDULERS, "scheduler"),
}
SETUP_S = 60.0
BATCH_SAMPLES = 16
HOLD_MAX_S, HOLD_MORE_S = 30.0, 2.0


class Job(Struct, frozen=True, kw_only=True):
    """What is trained, and under which leases. `samples` per round, over all workers; `calm_rounds` of the calm run."""

    rounds: int
    calm_rounds: int = 0
    slices: int = dataset.SLICES
    samples: int = 4800
    ttl_s: float = 6.0
    deadline_s: float = 30.0
    language: bool = False  # a small transformers model on tokens instead of a plain module
    warm: tuple[str, ...] = ()  # workers that keep a warm executor

    @property
    def hold_s(self) -> float:
        """A scheduler that is killed and started again is back before its standby leads; the default is the most."""
        return min(HOLD_MAX_S, self.ttl_s + HOLD_MORE_S)


def prepare(directory: Path, job: Job, seed: int) -> None:
    """Write configurations and dataset, and issue certificates with the public command."""
    for name in ("configs", "logs", "work"):
        (directory / name).mkdir()
    addresses = [f"/ip4/127.0.0.1/tcp/{free_port()}" for _ in GATEWAYS]
    for name in ROLES:
        text = _node(name, addresses)
        if name in SCHEDULERS:
            for run in (CALM, CHAOS):
                (directory / "configs" / f"{title(name, run)}.toml").write_text(text + _job(directory, name, run, job))
            continue
        if name in DATA_NODES:
            text += 'dataset_path = "../dataset"\n'
        if name in EXECUTORS:
            text += _worker(name, job)
        (directory / "configs" / f"{name}.toml").write_text(text)
    dataset.write(directory / "dataset", seed, slices=job.slices, language=job.language)
    _certify(directory)


def title(name: str, run: str = "") -> str:
    """Return what a node's configuration and log are called; a scheduler has one of each for every run."""
    return f"{run}-{name.rpartition('-')[2]}" if name in SCHEDULERS else name


def command(name: str, run: str = "") -> list[str]:
    """Return the command that runs a node."""
    return [f"hypha-{ROLES[name]}", "run", "-c", f"configs/{title(name, run)}.toml"]


def store(directory: Path, run: str) -> Path:
    """Return where the chain and the artifacts of a run lie."""
    return directory / "store" / run


def journal(directory: Path, name: str, run: str) -> Path:
    """Return the journal of a scheduler."""
    return directory / "state" / name / run / "journal"


def _certify(directory: Path) -> None:
    def certutil(*arguments: str) -> None:
        subprocess.run(
            ["hypha-certutil", *arguments, "--out", "certs"],
            cwd=directory,
            env=ENVIRONMENT,
            check=True,
            timeout=SETUP_S,
            capture_output=True,
        )

    certutil("root", "--name", "Chaos root")
    certutil("org", "--name", "Chaos organisation")
    for name, role in ROLES.items():
        certutil("node", "--name", name, "--role", role)


def _node(name: str, addresses: list[str]) -> str:
    own = addresses[GATEWAYS.index(name)] if name in GATEWAYS else "/ip4/127.0.0.1/tcp/0"
    others = ", ".join(f'"{address}"' for address in addresses if address != own)
    return _NODE.format(name=name, own=own, others=others)


def _worker(name: str, job: Job) -> str:
    executors = "".join(_EXECUTORS[work] for work in EXECUTORS[name])
    warm = str(name in job.warm).lower()
    return _WORKER.format(name=name, ttl_s=job.ttl_s, warm=warm) + executors


def _job(directory: Path, name: str, run: str, job: Job) -> str:
    return _JOB.format(
        name=name,
        store=directory / "store",
        hold_s=job.hold_s,
        run=run,
        dataset=dataset.NAME,
        model=_LANGUAGE_MODEL if job.language else _MODEL,
        rounds=job.calm_rounds if run == CALM and job.calm_rounds else job.rounds,
        samples=job.samples,
        batch=BATCH_SAMPLES,
        deadline_s=job.deadline_s,
        trainers=TRAINERS,
    )


_NODE = """\
cert_pem = "../certs/{name}.pem"
key_pem = "../certs/{name}-key.pem"
trust_pem = "../certs/trust.pem"
listen_addresses = ["{own}"]
gateway_addresses = [{others}]
"""

_WORKER = """\
work_dir = "../work/{name}"
# Half the dataset: slices are fetched as long as the job runs.
cache_bytes = 1048576
warm_executor = {warm}

[resources]
cpu = 1.0
memory = 1.0
storage = 1.0
gpu = 0.0

[lease]
ttl_s = {ttl_s}
"""

_EXECUTORS = {
    "train": '\n[[executors]]\nclass = "train"\nname = "diloco-transformer"\n',
    "aggregate": '\n[[executors]]\nclass = "aggregate"\nname = "parameter-server"\nruntime = "parameter-server"\n',
}

_MODEL = f"""
[scheduler.job.model]
type = "torch"
seed = 0

[scheduler.job.model.config]
layers = [["linear", {dataset.INPUTS}, 64], ["tanh"], ["linear", 64, {dataset.CLASSES}]]
"""

_LANGUAGE_MODEL = f"""
[scheduler.job.model]
type = "causal-lm"
seed = 0

[scheduler.job.model.config]
model_type = "llama"
vocab_size = {dataset.TOKENS}
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
"""

_JOB = """\
state_dir = "../state/{name}"
checkpoint_url = "{store}"

[scheduler]
hold_s = {hold_s}
welcome_s = 1.0
retry_s = 1.0
patience_s = 5.0

[scheduler.job]
name = "{run}"
dataset = "{dataset}"

{model}
[scheduler.job.inner_optimizer]
learning_rate = 2e-3

[scheduler.job.outer_optimizer]
learning_rate = 0.7
momentum = 0.9

[scheduler.job.rounds]
updates = {rounds}
samples_between_updates = {samples}
max_batch_size = {batch}
deadline_s = {deadline_s}

[scheduler.job.resources]
workers = {trainers}
min_workers = 1
worker = {{ cpu = 1.0, memory = 0.5 }}
parameter_server = {{ cpu = 1.0, memory = 0.5 }}

[scheduler.job.checkpoint]
every = 5
keep = 2
"""
