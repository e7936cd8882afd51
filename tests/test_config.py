"""Configuration: which layer wins, what is refused, and in which words."""

from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta, Struct, field

from hypha.config import NodeConfig, load_config, parse_value
from hypha.errors import ConfigError

BASE = 'cert_pem = "pki/node.pem"\nkey_pem = "/etc/key.pem"\ntrust_pem = "~/trust.pem"\n'


class Offer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table with a bound."""

    floor: Annotated[float, Meta(gt=0)] = 1.0
    price: float | None = None


class Executor(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename={"kind": "class"}):
    """One of an array of tables, with a key that is a Python keyword."""

    kind: str
    args: tuple[str, ...] = ()


class Wire(Struct, frozen=True, kw_only=True):
    """A Struct that also crosses the network, where unknown fields are ignored."""

    cpu: float = 1.0


class Config(NodeConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A role's configuration as an engineer would write it."""

    work_dir: Path = Path("work")
    state_dir: Path | None = None
    dataset_path: tuple[Path, ...] = ()
    offer: Offer = Offer()
    executors: tuple[Executor, ...] = ()
    needs: Wire = Wire()
    dataset: Wire | str = ""
    quotas: dict[str, Offer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.offer.price is not None and self.offer.price < self.offer.floor:
            raise ValueError("`offer.price`: is below `offer.floor`")


@pytest.fixture
def load(tmp_path):
    def load(text="", *, environ=None, flags=None, base=BASE):
        path = tmp_path / "worker.toml"
        path.write_text(base + text)
        return load_config(Config, path, environ or {}, flags)

    return load


@pytest.fixture
def refusal(load, tmp_path):
    def refusal(text="", **layers):
        with pytest.raises(ConfigError) as caught:
            load(text, **layers)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refusal


# --- layers ----------------------------------------------------------------------------------------------------------


def test_each_layer_wins_over_the_one_below(load):
    toml, environ, flags = "[offer]\nfloor = 2", {"HYPHA_OFFER__FLOOR": "3"}, {"offer.floor": 4}
    assert load().offer.floor == 1
    assert load(toml).offer.floor == 2
    assert load(toml, environ=environ).offer.floor == 3
    assert load(toml, environ=environ, flags=flags).offer.floor == 4


def test_layers_merge_inside_a_table(load):
    config = load("[offer]\nprice = 9", environ={"HYPHA_OFFER__FLOOR": "3"})
    assert (config.offer.price, config.offer.floor) == (9, 3)


def test_environment_of_others_is_left_alone(load):
    environ = {"HYPHA_LOG": "debug", "OTEL_SERVICE_NAME": "x", "PATH": "/bin", "hypha_offer": "1"}
    assert load(environ=environ) == load()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("true", True),
        ('["a", "b"]', ["a", "b"]),
        ('"1"', "1"),
        ("/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_value_is_read_as_toml_and_else_is_a_string(text, value):
    assert parse_value(text) == value


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_in_every_layer_and_in_defaults(load, tmp_path):
    config = load('state_dir = "state"', environ={"HYPHA_DATASET_PATH": '["a", "/b"]'})
    assert config.cert_pem == tmp_path / "pki/node.pem"
    assert config.key_pem == Path("/etc/key.pem")
    assert config.trust_pem == Path.home() / "trust.pem"
    assert config.work_dir == tmp_path / "work"
    assert config.state_dir == tmp_path / "state"
    assert config.dataset_path == (tmp_path / "a", Path("/b"))


def test_one_string_stands_for_a_list_of_one(load, tmp_path):
    config = load('crls_pem = "crls.pem"\ndataset_path = "d"\n[[executors]]\nclass = "train"\nargs = "-v"')
    assert config.crls_pem == (tmp_path / "crls.pem",)
    assert config.dataset_path == (tmp_path / "d",)
    assert config.executors == (Executor(kind="train", args=("-v",)),)


def test_node_keys_have_the_documented_defaults(load):
    config = load()
    assert config.listen_addresses == ("/ip4/0.0.0.0/tcp/0",)
    assert (config.crls_pem, config.gateway_addresses, config.relay_circuit) == ((), (), True)
    assert (config.telemetry_endpoint, config.telemetry_protocol) == (None, "grpc")


def test_addresses_of_every_usual_kind_are_taken(load):
    addresses = (
        "/ip6/::1/tcp/4001",
        "/dns4/gateway.example.org/tcp/4001/p2p/12D3KooWFcjz7kmMyvhuT6rNovKuKMrPcVq1ATpG5aYU1vByfDkp",
    )
    assert load(f"gateway_addresses = {list(addresses)}").gateway_addresses == addresses


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[offer]\nflor = 1", "worker.toml: `offer.flor`: unknown key (do you mean `floor`?)"),
        ("xyzzy = 1", "worker.toml: `xyzzy`: unknown key"),
        ("gateway_address = []", "worker.toml: `gateway_address`: unknown key (do you mean `gateway_addresses`?)"),
        ("[[executors]]", "worker.toml: `executors[0].class`: missing"),
        (
            '[[executors]]\nclass = "a"\n[[executors]]\nclas = "b"',
            "worker.toml: `executors[1].clas`: unknown key (do you mean `class`?)",
        ),
        ("[needs]\ncpus = 1", "worker.toml: `needs.cpus`: unknown key (do you mean `cpu`?)"),
        ("[dataset]\nwhat = 1", "worker.toml: `dataset.what`: unknown key"),
        ("dataset = 1", "worker.toml: `dataset`: expected `str | table`, got `int`"),
        ("[quotas.a]\nflor = 0", "worker.toml: `quotas.a.flor`: unknown key (do you mean `floor`?)"),
        ("[quotas.a]\nfloor = 0", "worker.toml: `quotas[...].floor`: expected `float` > 0.0"),
        ("[offer]\nfloor = -1", "worker.toml: `offer.floor`: expected `float` > 0.0"),
        ("offer = 3", "worker.toml: `offer`: expected `table`, got `int`"),
        ("relay_circuit = 1", "worker.toml: `relay_circuit`: expected `bool`, got `int`"),
        ("work_dir = 1", "worker.toml: `work_dir`: expected a path, got 1"),
        ('work_dir = ""', "worker.toml: `work_dir`: expected a path, got ''"),
        ("[offer]\nprice = 0.5", "worker.toml: `offer.price`: is below `offer.floor`"),
        ("listen_addresses = []", "worker.toml: `listen_addresses`: at least one address is needed"),
        (
            'telemetry_protocol = "udp"',
            "worker.toml: `telemetry_protocol`: invalid enum value 'udp' (one of grpc, http/protobuf, http/json)",
        ),
        ("telemetry_sample_ratio = 2", "worker.toml: `telemetry_sample_ratio`: expected `float` <= 1.0"),
        ("exclude_cidr = '10.0.0.1/8'", "worker.toml: `exclude_cidr[0]`: 10.0.0.1/8 has host bits set"),
        (
            "listen_addresses = ['/ip4/127.0.0.1/udp/1']",
            "worker.toml: `listen_addresses[0]`: '/ip4/127.0.0.1/udp/1' is not a TCP address (/ip4/192.0.2.1/tcp/4001)",
        ),
        ("a = 1\nb =\n", "worker.toml:5: Invalid value (column 4)"),
    ],
)
def test_bad_key_is_named_by_path_and_file(refusal, text, message):
    assert refusal(text) == message


def test_missing_key_is_named(refusal):
    assert refusal(base="") == "worker.toml: `cert_pem`: missing"


@pytest.mark.parametrize("address", ["localhost:4001", "/ip4/300.1.1.1/tcp/1", "/ip4/127.0.0.1/tcp/x", ""])
def test_address_that_does_not_parse_is_named(refusal, address):
    text = f"gateway_addresses = ['/ip4/127.0.0.1/tcp/1', '{address}']"
    assert refusal(text).startswith(f"worker.toml: `gateway_addresses[1]`: '{address}' is not a ")


def test_value_from_another_layer_is_blamed_on_that_layer(refusal):
    environ = {"HYPHA_OFFER__FLOOR": "cheap"}
    assert refusal(environ=environ) == "HYPHA_OFFER__FLOOR: `offer.floor`: expected `float`, got `str`"
    assert refusal(flags={"offer.flor": 1}).startswith("--set offer.flor: `offer.flor`: unknown key")
    assert refusal("work_dir = 'x'", environ={"HYPHA_WORK_DIR__X": "1"}) == (
        "HYPHA_WORK_DIR__X: `work_dir` is not a table"
    )


def test_missing_file_and_file_that_is_no_text_are_named(tmp_path):
    path = tmp_path / "worker.toml"
    with pytest.raises(ConfigError, match=r"no such configuration file: .*worker.toml"):
        load_config(Config, path, {})
    path.write_bytes(b"a = 1\n\xff")
    with pytest.raises(ConfigError, match=r"worker.toml:2: not UTF-8"):
        load_config(Config, path, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*worker.toml: Is a directory"):
        load_config(Config, path, {})
