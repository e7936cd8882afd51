"""Every key of [scheduler.job], and what is said of a wrong one."""

from pathlib import Path

import pytest

from hypha.config import load_config
from hypha.errors import ConfigError
from hypha.protocol.job import ModelSpec
from hypha.protocol.resources import Resources
from hypha.scheduler.config import CheckpointConfig, Config, DatasetConfig, Price

HEAD = 'cert_pem = "a.pem"\nkey_pem = "k.pem"\ntrust_pem = "t.pem"\n'
JOB = """
[scheduler.job]
name = "demo-1"
dataset = "text"
model = { path = "/model" }
rounds = { updates = 3, samples_between_updates = 320 }
"""
WHOLE = """
checkpoint_url = "s3://bucket/jobs"
[scheduler]
welcome_s = 1.5
retry_s = 4.0
patience_s = 9.0
[scheduler.job]
name = "whole"
dataset = { name = "text", digest = "%s" }
preprocessor = { type = "tokenizer", repository = "org/name", inputs = { text = "text" } }
[scheduler.job.model]
type = "causal-lm"
repository = "org/name"
revision = "main"
[scheduler.job.inner_optimizer]
learning_rate = 3e-3
betas = [0.8, 0.95]
epsilon = 1e-7
weight_decay = 0.1
clip_norm = 1.0
schedule = { type = "wsd", warmup_steps = 5, total_steps = 100, decay_steps = 20, floor = 0.1 }
[scheduler.job.outer_optimizer]
learning_rate = 0.6
momentum = 0.8
[scheduler.job.rounds]
updates = 20
samples_between_updates = 640
max_batch_size = 8
deadline_s = 60.0
quorum = 2
evaluate_every = 5
[scheduler.job.resources]
workers = 4
min_workers = 2
executor = "mine"
parameter_server_executor = "ps"
worker = { cpu = 2.0, memory = 4.0, gpu = 1.0 }
parameter_server = { cpu = 1.0, memory = 8.0 }
worker_price = { bid = 100.0, max = 120.0 }
parameter_server_price = { bid = 5.0 }
find_s = 30.0
[scheduler.job.checkpoint]
every = 5
keep = 2
keep_every = 10
""" % ("a" * 64)


@pytest.fixture
def load(tmp_path):
    def load(text, **environ):
        path = tmp_path / "scheduler.toml"
        path.write_text(HEAD + text)
        return load_config(Config, path, environ)

    return load


def test_every_key_is_read(load):
    config = load(WHOLE)
    job = config.scheduler.job
    assert (config.scheduler.welcome_s, config.scheduler.retry_s, config.scheduler.patience_s) == (1.5, 4.0, 9.0)
    assert config.checkpoint_url == "s3://bucket/jobs"
    assert job.dataset_config == DatasetConfig(name="text", digest="a" * 64)
    assert job.model == ModelSpec(type="causal-lm", repository="org/name", revision="main")
    assert job.preprocessor is not None
    assert job.preprocessor.inputs == {"text": "text"}
    assert (job.inner_optimizer.betas, job.inner_optimizer.schedule.type) == ((0.8, 0.95), "wsd")
    assert (job.outer_optimizer.learning_rate, job.outer_optimizer.momentum) == (0.6, 0.8)
    assert (job.rounds.updates, job.rounds.quorum, job.rounds.evaluate_every) == (20, 2, 5)
    assert (job.resources.fewest, job.resources.executor) == (2, "mine")
    assert job.resources.worker == Resources(cpu=2.0, memory=4.0, gpu=1.0)
    assert (job.resources.worker_price.limit, job.resources.parameter_server_price.limit) == (120.0, 5.0)
    assert job.checkpoint == CheckpointConfig(every=5, keep=2, keep_every=10)


def test_what_is_left_out_has_defaults(load):
    config = load(JOB)
    job = config.scheduler.job
    assert config.state_dir.name == "state"
    assert config.state_dir != Path("state")  # beside the file, wherever the process runs
    assert job.dataset_config == DatasetConfig(name="text")
    assert (job.resources.workers, job.resources.fewest, job.resources.most, job.rounds.quorum) == (1, 1, 1, 1)
    assert job.resources.worker_price == Price(bid=1.0)


def test_the_environment_wins_over_the_file(load):
    assert load(JOB, HYPHA_SCHEDULER__JOB__ROUNDS__UPDATES="7").scheduler.job.rounds.updates == 7


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("resources = { workers = 2, min_workers = 3 }", "`scheduler.job.resources`: min_workers 3 exceeds workers 2"),
        ("resources = { workers = 3, max_workers = 2 }", "`scheduler.job.resources`: max_workers 2 is below workers 3"),
        ("resources = { workers = 0 }", "`scheduler.job.resources.workers`: expected `int` >= 1"),
        (
            "resources = { worker_price = { bid = 2.0, max = 1.0 } }",
            "`scheduler.job.resources.worker_price`: max 1 is below bid 2",
        ),
        ("resources = { worker_price = { bid = 0 } }", "`scheduler.job.resources.worker_price.bid`: expected"),
        ("resources = { find_s = 0 }", "`scheduler.job.resources.find_s`: expected"),
        ("resources = { worker = { cpu = -1.0 } }", "`scheduler.job.resources.worker"),
        ("resources = { wrkers = 2 }", "`scheduler.job.resources.wrkers`: unknown key (do you mean `workers`?)"),
        ("checkpoint = { every = 0 }", "`scheduler.job.checkpoint.every`: expected `int` >= 1"),
        ("inner_optimizer = { learning_rate = -1.0 }", "`scheduler.job.inner_optimizer.learning_rate`: expected"),
        (
            'inner_optimizer = { schedule = { type = "cosine" } }',
            "`scheduler.job.inner_optimizer.schedule`: schedule 'cosine' needs total_steps",
        ),
        ("outer_optimizer = { momentum = 2.0 }", "`scheduler.job.outer_optimizer.momentum`: expected"),
        ('preprocessor = { type = "tokenizer" }', "`scheduler.job.preprocessor"),
    ],
)
def test_a_wrong_key_is_named_with_its_path(load, line, said):
    with pytest.raises(ConfigError) as caught:
        load(JOB + line)
    assert f"scheduler.toml: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "demo-1"', 'name = "../demo"', "`scheduler.job.name`: expected `str` matching"),
        ('dataset = "text"\n', "", "`scheduler.job.dataset`: missing"),
        (
            'dataset = "text"',
            'dataset = { name = "text", digest = "short" }',
            "`scheduler.job.dataset.digest`: expected",
        ),
        (
            '{ path = "/model" }',
            '{ path = "/model", repository = "x" }',
            "`scheduler.job.model`: model needs exactly one of repository, path, config",
        ),
        (
            '{ path = "/model" }',
            "{}",
            "`scheduler.job.model`: model needs exactly one of repository, path, config; got none",
        ),
        ("updates = 3,", "updates = 0,", "`scheduler.job.rounds.updates`: expected `int` >= 1"),
        (
            "updates = 3,",
            "updates = 3, quorum = 2,",
            "`scheduler.job`: rounds.quorum 2 exceeds resources.workers 1",
        ),
        ("updates = 3,", 'updates = "3",', "`scheduler.job.rounds.updates`: expected `int`, got `str`"),
        ("updates = 3,", "", "`scheduler.job.rounds.updates`: missing"),
    ],
)
def test_a_wrong_value_in_place_of_a_right_one_is_named(load, old, new, said):
    assert old in JOB
    with pytest.raises(ConfigError) as caught:
        load(JOB.replace(old, new))
    assert said in str(caught.value)
