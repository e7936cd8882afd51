"""kill -9 of a scheduler and of a parameter server while a small model trains: the job goes on from its last commit."""

import json
from pathlib import Path

import pytest

import hypha
from hypha.demo.nodes import free_port
from hypha.protocol.manifest import JobEpochStarted, RoundCommitted, from_bytes
from hypha.store.blobs import Artifact, Blobs
from hypha.store.chain import Chain
from hypha.store.objects import open_objects
from tests.e2e.programs import run, stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 8
JOB = f"""
state_dir = "state"
[scheduler]
retry_s = 0.5
patience_s = 5.0
[scheduler.job]
name = "demo"
dataset = "text"
[scheduler.job.model.config]
model_type = "llama"
vocab_size = 256
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 128
tie_word_embeddings = true
[scheduler.job.rounds]
updates = {ROUNDS}
samples_between_updates = 640
max_batch_size = 8
deadline_s = 60.0
evaluate_every = {ROUNDS}
[scheduler.job.resources]
workers = 2
worker = {{ cpu = 1.0, memory = 0.5 }}
parameter_server = {{ cpu = 1.0, memory = 0.5 }}
[scheduler.job.checkpoint]
every = 3
"""
WORKER = """
[resources]
cpu = 1.0
memory = 1.0
storage = 1.0
gpu = 0.0
[lease]
ttl_s = 6.0
"""
TRAINS = '[[executors]]\nclass = "train"\nname = "diloco-transformer"\n'
SERVES = '[[executors]]\nclass = "aggregate"\nname = "parameter-server"\nruntime = "parameter-server"\n'


class Town:
    """A gateway, a data node, two trainers and two that may serve parameters."""

    def __init__(self, on_stage, pki) -> None:
        self.stage = on_stage
        self.pki = pki
        self.port = free_port()
        self.schedulers = 0

    def begin(self) -> None:
        """Start everybody but the scheduler."""
        source = Path(hypha.__file__).parent / "protocol"
        command = ["hypha-data", "prepare", str(source), "-o", "dataset", "--name", "text", "--slice-bytes", "65536"]
        assert run(command, self.stage.directory)[0] == 0
        self.node("gateway", "gateway", f'listen_addresses = ["/ip4/127.0.0.1/tcp/{self.port}"]\n')
        self.start("gateway", "gateway").wait_for("Gateway ready")
        self.node("data", "data", 'dataset_path = "dataset"\n')
        self.start("data", "data")
        for name, executors in {"train-1": TRAINS, "train-2": TRAINS, "serve-1": SERVES, "serve-2": SERVES}.items():
            self.node(name, "worker", f'work_dir = "{name}"\n{WORKER}{executors}')
            self.start(name, "worker")
        for name in ("train-1", "train-2", "serve-1", "serve-2"):
            self.stage.programs[name].wait_for("Worker ready")
        self.node("scheduler", "scheduler", JOB)

    def node(self, name, role, text) -> None:
        """Write a node's configuration."""
        reach = (
            ""
            if role == "gateway"
            else (
                f'gateway_addresses = ["/ip4/127.0.0.1/tcp/{self.port}"]\nlisten_addresses = ["/ip4/127.0.0.1/tcp/0"]\n'
            )
        )
        path = self.stage.directory / f"{name}.toml"
        path.write_text(self.pki.node(name, [role]).toml() + reach + text)

    def start(self, name, role):
        """Start a node under its name."""
        return self.stage.start(name, [f"hypha-{role}", "run", "-c", f"{name}.toml"])

    def scheduler(self):
        """Start the scheduler, again."""
        self.schedulers += 1
        return self.stage.start(f"scheduler-{self.schedulers}", ["hypha-scheduler", "run", "-c", "scheduler.toml"])

    def chain(self):
        """Every entry of the job's chain."""
        links = Chain(open_objects(str(self.stage.directory / "state" / "demo"))).load()
        return [from_bytes(link.payload) for link in links]


def rounds_of(chain):
    return [entry for entry in chain if isinstance(entry, RoundCommitted)]


def committed(round_made: int) -> str:
    """What stands in the log line of a committed round, and in no other."""
    return f'"round": {round_made}, "samples": '


def names_of(program, message):
    return [record["worker"] for record in program.records() if record["message"] == message]


@pytest.fixture
def town(tmp_path, pki):
    with stage(tmp_path) as opened:
        made = Town(opened, pki)
        made.begin()
        yield made


def test_scheduler_and_parameter_server_are_killed_and_nothing_committed_is_lost(town):
    first = town.scheduler()
    first.wait_for(committed(2))

    # Another one on the same state directory has to go, and does no harm.
    code, output = run(["hypha-scheduler", "run", "-c", "scheduler.toml"], town.stage.directory)
    assert (code, "in use by another process (pid" in output, "Traceback" in output) == (2, True, False), output

    first.kill()
    before = town.chain()
    last = rounds_of(before)[-1].merged

    second = town.scheduler()
    started = json.loads(second.wait_for('"message": "Job started"'))
    assert (started["job_epoch"], started["round"]) == (2, last.round + 1)
    assert started["model_digest"] == last.model_digest
    assert started["samples_total"] == sum(entry.samples for entry in rounds_of(before))
    second.wait_for(committed(last.round + 1))
    assert sorted(names_of(second, "Worker adopted")) == sorted(names_of(first, "Worker leased"))
    assert names_of(second, "Worker leased") == []

    leased = {record["worker"]: record["work"] for record in second.records() if record["message"] == "Worker adopted"}
    (serving,) = [
        n for n in ("serve-1", "serve-2") if any("Job started" in line for line in town.stage.programs[n].lines)
    ]
    town.stage.programs[serving].kill()
    lost = json.loads(second.wait_for('"message": "Worker lost"'))
    assert leased[lost["worker"]] == "aggregate"

    assert second.wait(200) == 0, "\n".join(second.lines[-30:])
    chain = town.chain()
    assert chain[: len(before)] == before
    assert [entry.merged.round for entry in rounds_of(chain)] == list(range(1, ROUNDS + 1))
    assert [entry.job_epoch for entry in chain if isinstance(entry, JobEpochStarted)] == [1, 2]
    # The trainers went on from the first round to the last under their first leases.
    trained = {each.lease_id for entry in rounds_of(chain) for each in entry.contributions}
    assert len(trained) == 2
    blobs = Blobs(open_objects(str(town.stage.directory / "state" / "demo")))
    blobs.verify(Artifact(kind="model", round=ROUNDS, digest=rounds_of(chain)[-1].merged.model_digest))
    assert second.errors() == []
