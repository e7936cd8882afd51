"""The worker's configuration: what the documented file says, every table's keys, and what is refused in which words."""

from pathlib import Path

import psutil
import pytest

from hypha.config import load_config
from hypha.errors import ConfigError
from hypha.protocol.auction import OfferWeights
from hypha.worker.config import Config, ExecutorConfig, executor_named

DOCUMENTED = Path(__file__).parents[2] / "configs" / "worker.toml"
PEM = 'cert_pem = "a.pem"\nkey_pem = "b.pem"\ntrust_pem = "c.pem"\n'


@pytest.fixture
def load(tmp_path):
    def load(text="", environ=None):
        path = tmp_path / "worker.toml"
        path.write_text(PEM + text)
        return load_config(Config, path, environ or {})

    return load


def test_the_documented_file_says_what_the_defaults_are(load):
    documented, default = load_config(Config, DOCUMENTED, {}), load()
    own = ("resources", "offer", "lease", "transfers", "executors", "cache_bytes", "relay_circuit", "listen_addresses")
    assert {key: getattr(documented, key) for key in own} == {key: getattr(default, key) for key in own}
    assert documented.work_dir == DOCUMENTED.parent / "work"


def test_the_documented_file_names_every_key_of_every_table():
    text = DOCUMENTED.read_text()
    config = load_config(Config, DOCUMENTED, {})
    tables = [config, config.resources, config.offer, config.offer.weights, config.lease, config.transfers]
    names = {field for each in (*tables, config.executors[0]) for field in each.__struct_fields__}
    renamed = {"class" if name == "work" else name for name in names}
    assert sorted(name for name in renamed if name not in text) == []


def test_all_keys_of_all_tables_are_read(load, tmp_path):
    config = load(
        'work_dir = "w"\ncache_bytes = 2000000\n'
        "[resources]\ncpu = 2.5\nmemory = 8\nstorage = 40\ngpu = 1\n"
        '[offer]\nprice = 120\nfloor = 80\nstrategy = "whole"\nutilisation_slope = 0.5\npreferred_schedulers = "s"\n'
        "[offer.weights]\nprofit = 2\nutilisation = 3\naffinity = 4\n"
        "[lease]\noffer_ttl_s = 7\nttl_s = 45\n"
        "[transfers]\nbackoff_s = 1\nbackoff_max_s = 2\nstall_s = 3\nat_once = 4\n"
        '[[executors]]\nclass = "train"\nname = "mine"\nruntime = "process"\ncmd = "/bin/run"\n'
        'args = ["--socket", "{SOCKET_PATH}"]\nstall_s = 9\nthreads = 3\n'
    )
    assert (config.work_dir, config.cache_bytes) == (tmp_path / "w", 2_000_000)
    capacity = config.resources.detect(tmp_path)
    assert (capacity.cpu, capacity.memory, capacity.storage, capacity.gpu) == (2.5, 8.0, 40.0, 1.0)
    offer = config.offer
    assert (offer.price, offer.floor, offer.strategy, offer.utilisation_slope) == (120, 80, "whole", 0.5)
    assert (offer.preferred_schedulers, offer.weights) == (("s",), OfferWeights(profit=2, utilisation=3, affinity=4))
    assert (config.lease.offer_ttl_s, config.lease.ttl_s) == (7, 45)
    transfers = config.transfers
    assert (transfers.backoff_s, transfers.backoff_max_s, transfers.stall_s, transfers.at_once) == (1, 2, 3, 4)
    args = ("--socket", "{SOCKET_PATH}")
    executor = ExecutorConfig(work="train", name="mine", cmd="/bin/run", args=args, stall_s=9, threads=3)
    assert config.executors == (executor,)


def test_what_is_left_out_is_what_the_machine_has(load, tmp_path):
    found = load().resources.detect(tmp_path)
    assert 1 <= found.cpu <= psutil.cpu_count()
    assert found.memory == psutil.virtual_memory().total / 1e9
    assert 0 < found.storage <= psutil.disk_usage(str(tmp_path)).total / 1e9
    assert found.gpu == int(found.gpu)


def test_the_environment_and_one_table_of_one_key_leave_the_rest_as_it_is(load):
    config = load("[resources]\ngpu = 0\n", {"HYPHA_LEASE__TTL_S": "10"})
    assert (config.resources.gpu, config.resources.cpu) == (0.0, None)
    assert (config.lease.ttl_s, config.lease.offer_ttl_s) == (10, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[resources]\ncpus = 2\n", "worker.toml: `resources.cpus`: unknown key (do you mean `cpu`?)"),
        ("[resources]\nmemory = 0\n", "worker.toml: `resources.memory`: expected `float` > 0.0"),
        ('[offer]\nstrategy = "greedy"\n', "`offer.strategy`: invalid enum value 'greedy' (one of flexible, whole)"),
        ("[offer]\nfloor = -1\n", "`offer.floor`: expected `float` >= 0.0"),
        ("[lease]\nttl_s = 0\n", "`lease.ttl_s`: expected `float` > 0.0"),
        ("[lease]\nttl = 3\n", "`lease.ttl`: unknown key (do you mean `ttl_s`?)"),
        ("[transfers]\nat_once = 0\n", "`transfers.at_once`: expected `int` >= 1"),
        ("cache_bytes = 3\n", "`cache_bytes`: expected `int` >= 1048576"),
        ("executors = []\n", "worker.toml: `executors`: at least one is needed"),
        ('[[executors]]\nname = "x"\n', "`executors[0].class`: missing"),
        ('[[executors]]\nclass = "train"\nname = ""\n', "`executors[0].name`: expected `str` of length >= 1"),
        ('[[executors]]\nclass = "teach"\nname = "x"\n', "`executors[0].class`: invalid enum value 'teach'"),
        (
            '[[executors]]\nclass = "train"\nname = "x"\nargs = ["-v"]\n',
            "`executors[0].args`: they need `cmd`; the built-in executors take none",
        ),
        (
            '[[executors]]\nclass = "train"\nname = "x"\nruntime = "parameter-server"\n',
            "`executors[0].runtime`: parameter-server is for class aggregate",
        ),
        (
            '[[executors]]\nclass = "train"\nname = "x"\n[[executors]]\nclass = "aggregate"\nname = "x"\n',
            "worker.toml: `executors`: names must differ, got x, x",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_path_in_the_file(load, text, message):
    with pytest.raises(ConfigError) as error:
        load(text)
    assert message in str(error.value)


def test_an_executor_is_found_by_name_and_class(load):
    config = load()
    assert executor_named(config, "diloco-transformer", "train") == config.executors[0]
    assert executor_named(config, "diloco-transformer", "aggregate") is None
    assert executor_named(config, "else", "train") is None
