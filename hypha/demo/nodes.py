"""What the demo writes before anything runs: the cast, their configurations, and a job.

    DIR/configs/gateway.toml     listens on a port that was free
    DIR/configs/data.toml  worker-1.toml … worker-N.toml  scheduler.toml     know the gateway's address only

`worker-N` serves parameters, the others train. Paths in the files are relative to them, so DIR may be moved.
"""

import socket
from pathlib import Path

from msgspec import Struct

from hypha.errors import ConfigError

GATEWAY, DATA, SCHEDULER = "gateway", "data", "scheduler"
DATASET = "demo-text"
SEQUENCE_LENGTH = 128
BATCH_SAMPLES = 16
# Inner steps of each worker between two outer ones.
STEPS_PER_ROUND = 16
WARMUP_STEPS = 10
PEAK_LEARNING_RATE = 3e-3
# Short, so that a worker that dies is missed for seconds, not for half a minute; two busy cores renew in time.
LEASE_TTL_S = 10.0
# OTLP's registered port for HTTP; any other is taken for gRPC.
OTLP_HTTP_PORT = ":4318"


class Cast(Struct, frozen=True, kw_only=True):
    """Who takes part: `workers` in all, of which the last serves parameters."""

    workers: int
    rounds: int
    port: int
    otlp: str | None = None

    @property
    def worker_names(self) -> list[str]:
        """Names of all workers."""
        return [f"worker-{number}" for number in range(1, self.workers + 1)]

    @property
    def trainers(self) -> int:
        """How many workers train."""
        return self.workers - 1

    @property
    def roles(self) -> dict[str, str]:
        """Role by node's name, in the order of starting."""
        return {GATEWAY: "gateway", DATA: "data", **dict.fromkeys(self.worker_names, "worker"), SCHEDULER: "scheduler"}

    @property
    def gateway_address(self) -> str:
        """The one address that every other node is told; the gateway's certificate says who it is."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"

    @property
    def samples_per_round(self) -> int:
        """Samples between two outer steps, over all workers."""
        return STEPS_PER_ROUND * BATCH_SAMPLES * self.trainers


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on. Raises ConfigError where there is none."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"no free TCP port on 127.0.0.1: {error.strerror}") from error


def write_configs(directory: Path, cast: Cast) -> None:
    """Write every node's configuration."""
    directory.mkdir(exist_ok=True)
    texts = {
        GATEWAY: _node(GATEWAY, cast),
        DATA: _node(DATA, cast) + '\ndataset_path = "../dataset"\n',
        SCHEDULER: _node(SCHEDULER, cast) + _scheduler(cast),
    }
    for number, name in enumerate(cast.worker_names, start=1):
        texts[name] = _node(name, cast) + _worker(name, trains=number < cast.workers)
    for name, text in texts.items():
        telemetry = "" if cast.otlp is None else _TELEMETRY.format(name=name)
        (directory / f"{name}.toml").write_text(text + telemetry)


def _node(name: str, cast: Cast) -> str:
    own_port, gateways = (cast.port, "") if name == GATEWAY else (0, f'"{cast.gateway_address}"')
    text = _NODE.format(name=name, port=own_port, gateways=gateways)
    if cast.otlp is None:
        return text
    protocol = "http/protobuf" if OTLP_HTTP_PORT in cast.otlp else "grpc"
    return text + f'\ntelemetry_endpoint = "{cast.otlp}"\ntelemetry_protocol = "{protocol}"\n'


def _worker(name: str, *, trains: bool) -> str:
    executor = _TRAINS if trains else _SERVES
    return _WORKER.format(name=name, ttl_s=LEASE_TTL_S) + executor


def _scheduler(cast: Cast) -> str:
    return _JOB.format(
        dataset=DATASET,
        length=SEQUENCE_LENGTH,
        trainers=cast.trainers,
        rounds=cast.rounds,
        samples=cast.samples_per_round,
        batch=BATCH_SAMPLES,
        rate=PEAK_LEARNING_RATE,
        warmup=min(WARMUP_STEPS, cast.rounds * STEPS_PER_ROUND),
        steps=cast.rounds * STEPS_PER_ROUND,
    )


_NODE = """\
# {name}, as the demo runs it. The documented defaults of every key: `hypha-ROLE init`.
cert_pem = "../certs/{name}.pem"
key_pem = "../certs/{name}-key.pem"
trust_pem = "../certs/trust.pem"
listen_addresses = ["/ip4/127.0.0.1/tcp/{port}"]
gateway_addresses = [{gateways}]
"""

_TELEMETRY = """
[telemetry_attributes]
"service.instance.id" = "{name}"
"""

_WORKER = """
work_dir = "../work/{name}"
# A worker that was killed and started again has imported torch by the time its old lease has run out.
warm_executor = true

# One core and one gigabyte (10^9 bytes) are leased out, whatever else the machine has.
[resources]
cpu = 1.0
memory = 1.0
storage = 1.0
gpu = 0.0

[lease]
ttl_s = {ttl_s}

[[executors]]
"""
_TRAINS = 'class = "train"\nname = "diloco-transformer"\n'
_SERVES = 'class = "aggregate"\nname = "parameter-server"\nruntime = "parameter-server"\n'

_JOB = """
state_dir = "../state"

[scheduler.job]
name = "demo"
dataset = "{dataset}"

# A Llama of 0.9 million parameters whose tokens are bytes, from scratch.
[scheduler.job.model]
type = "causal-lm"
seed = 0

[scheduler.job.model.config]
model_type = "llama"
vocab_size = 256
hidden_size = 128
intermediate_size = 352
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
max_position_embeddings = {length}
tie_word_embeddings = false
initializer_range = 0.06
bos_token_id = 0
eos_token_id = 0

[scheduler.job.inner_optimizer]
learning_rate = {rate}
weight_decay = 0.1
clip_norm = 1.0

[scheduler.job.inner_optimizer.schedule]
type = "cosine"
warmup_steps = {warmup}
total_steps = {steps}
floor = 0.1

[scheduler.job.outer_optimizer]
learning_rate = 0.7
momentum = 0.9

[scheduler.job.rounds]
updates = {rounds}
samples_between_updates = {samples}
max_batch_size = {batch}
deadline_s = 60.0

[scheduler.job.resources]
workers = {trainers}
worker = {{ cpu = 1.0, memory = 1.0 }}
parameter_server = {{ cpu = 1.0, memory = 1.0 }}
worker_price = {{ bid = 1.0, max = 1.0 }}
parameter_server_price = {{ bid = 1.0, max = 1.0 }}
"""
