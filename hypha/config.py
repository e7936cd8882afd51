"""Configuration in layers, checked once: what comes out of `load_config` needs no second look.

    defaults          in the role's Config, a frozen Struct beside its reader
      ◀ TOML file     unknown keys forbidden
      ◀ environment   HYPHA_LEASE__TTL_S=10  →  [lease] ttl_s
      ◀ flags         --set lease.ttl_s=10
      ──▶ Config      or a ConfigError:  worker.toml: `offer.flor`: unknown key (do you mean `floor`?)

For whoever writes a role's Config: fields of type `Path` come out resolved against the file's directory; where a
field is `tuple[…, ...]` one string stands for a list of one; keys that no Struct knows are refused in every table.
`__post_init__` refuses with ``ValueError("`key`: reason")``; the table's path and the file are put in front.
"""

import ipaddress
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec
import tomli
from msgspec import Meta, Struct

from hypha.errors import ConfigError

ENV_PREFIX = "HYPHA_"
# Read by the log filter (hypha.telemetry), not a key of any configuration.
ENV_NOT_KEYS = frozenset({"HYPHA_LOG"})
# A configuration is a page or two; anything larger is the wrong file.
CONFIG_BYTES_MAX = 2**20

Sampler = Literal[
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]
C = TypeVar("C", bound=Struct)
KeyPath = tuple[str, ...]


class NodeConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every role reads: who it is, where it listens, whom it knows, what it tells the collector."""

    cert_pem: Path
    key_pem: Path
    trust_pem: Path
    crls_pem: tuple[Path, ...] = ()
    gateway_addresses: tuple[str, ...] = ()
    listen_addresses: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    # Announced as they are, beside those that the listeners find out.
    external_addresses: tuple[str, ...] = ()
    # Networks whose addresses are neither announced nor dialled.
    exclude_cidr: tuple[str, ...] = ()
    # Be reachable, and reach others, through a gateway's relay.
    relay_circuit: bool = True
    telemetry_endpoint: str | None = None
    telemetry_protocol: Literal["grpc", "http/protobuf", "http/json"] = "grpc"
    telemetry_sampler: Sampler = "parentbased_always_on"
    telemetry_sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    telemetry_attributes: dict[str, str] = {}
    telemetry_headers: dict[str, str] = {}

    def check_addresses(self) -> None:
        """Raise ValueError for an address or network that does not parse; `load_config` calls it."""
        for key in ("gateway_addresses", "listen_addresses", "external_addresses"):
            for index, address in enumerate(getattr(self, key)):
                _require_tcp_multiaddr(f"{key}[{index}]", address)
        for index, network in enumerate(self.exclude_cidr):
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"`exclude_cidr[{index}]`: {error}") from error
        if not self.listen_addresses:
            raise ValueError("`listen_addresses`: at least one address is needed")


def load_config(
    config_type: type[C],
    path: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> C:
    """Merge the layers into a `config_type`; `overrides` are flags by dotted key, with TOML values.

    Raises ConfigError naming the key's path and where the value came from; for a syntax error the line.
    """
    merged = _read_toml(path)
    sources: dict[KeyPath, str] = {}
    for name, key_path, value in _environment(environ):
        _put(merged, key_path, value, source=name)
        sources[key_path] = name
    for dotted, value in (overrides or {}).items():
        key_path = tuple(dotted.split("."))
        _put(merged, key_path, value, source=f"--set {dotted}")
        sources[key_path] = f"--set {dotted}"
    try:
        if config_type.__struct_config__.forbid_unknown_fields:
            _refuse_unknown(config_type, merged, "")
        config = msgspec.convert(_lists_of_one(config_type, merged), config_type, dec_hook=_custom)
        if isinstance(config, NodeConfig):
            config.check_addresses()
    except ValueError as error:  # msgspec's ValidationError is one
        key_path, reason = _explain(str(error), config_type)
        raise ConfigError(f"{_source_of(key_path, sources, path)}: {reason}") from error
    return cast(C, _resolved(config, path.absolute().parent))


def parse_value(text: str) -> object:
    """Read a value as TOML would; what is no TOML value is a string."""
    try:
        table = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    # A line break in the text could smuggle in a second key.
    return table["value"] if len(table) == 1 else text


def _require_tcp_multiaddr(key: str, address: str) -> None:
    # Imported late: it costs more than all the rest of this module.
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error

    try:
        protocols = {protocol.name for protocol in Multiaddr(address).protocols()}
    except (Error, ValueError) as error:
        raise ValueError(f"`{key}`: {address!r} is not a multiaddr: {error}") from error
    if "tcp" not in protocols or protocols & {"ws", "wss", "tls", "quic"}:
        raise ValueError(f"`{key}`: {address!r} is not a TCP address (/ip4/192.0.2.1/tcp/4001)")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path} is larger than {CONFIG_BYTES_MAX} bytes: not a configuration")
    try:
        return tomli.loads(data.decode())
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8") from error


def _environment(environ: Mapping[str, str]) -> list[tuple[str, KeyPath, object]]:
    """Return (variable, key path, value), sorted so that a table comes before what refines it."""
    names = sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in ENV_NOT_KEYS)
    return [
        (name, tuple(name.removeprefix(ENV_PREFIX).lower().split("__")), parse_value(environ[name])) for name in names
    ]


def _put(table: dict[str, Any], key_path: KeyPath, value: object, *, source: str) -> None:
    *parents, last = key_path
    for depth, key in enumerate(parents):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: `{'.'.join(parents[: depth + 1])}` is not a table")
    table[last] = value


def _lists_of_one(kind: object, value: object) -> object:
    """Turn a lone string into a list wherever the type `kind`, or what lies inside it, wants one."""
    alternatives = _alternatives(kind)
    if isinstance(value, str):
        wants_list = any(get_origin(each) is tuple for each in alternatives) and str not in alternatives
        return [value] if wants_list else value
    if isinstance(value, list):
        return [_lists_of_one(_item_kind(kind), each) for each in value]
    if isinstance(value, dict):
        wanted = _fields(kind)
        return {key: _lists_of_one(wanted.get(key, _item_kind(kind)), each) for key, each in value.items()}
    return value


def _refuse_unknown(kind: object, value: object, at: str) -> None:
    """Raise ValueError for a key that no Struct knows, those of the wire included, which would ignore it."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            _refuse_unknown(_item_kind(kind), each, f"{at}[{index}]")
    if not isinstance(value, dict):
        return
    known = _fields(kind)
    for key, each in value.items():
        path = f"{at}.{key}".lstrip(".")
        if known and key not in known:
            close = get_close_matches(key, known, n=1)
            raise ValueError(f"`{path}`: unknown key" + (f" (do you mean `{close[0]}`?)" if close else ""))
        _refuse_unknown(known.get(key, _item_kind(kind)), each, path)


def _item_kind(kind: object) -> object:
    """Return the type of a list's items or of a table's free values; None for anything else."""
    generic = {tuple: 0, dict: 1}
    arguments = [
        get_args(each)[generic[each_of]] for each in _alternatives(kind) if (each_of := get_origin(each)) in generic
    ]
    return arguments[0] if arguments else None


def _fields(kind: object) -> dict[str, object]:
    """Return type by key of the Structs among a type's alternatives; empty where there is none."""
    return {field.encode_name: field.type for each in _structs(kind) for field in msgspec.structs.fields(each)}


def _alternatives(kind: object) -> tuple[object, ...]:
    """Return the members of a union, the type inside Annotated, or the type itself."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) in _UNIONS else (kind,)


_UNIONS = (get_origin(int | None), get_origin(Literal[1] | None))


def _custom(kind: type, value: object) -> object:
    if kind is not Path:
        raise NotImplementedError(f"no configuration field can be a {kind}")
    if not isinstance(value, str) or not value:
        raise ValueError(f"Expected a path, got {value!r}")
    return Path(value).expanduser()


def _resolved(value: object, base: Path) -> object:
    """Make every path absolute, those in defaults, too."""
    if isinstance(value, Path):
        return base / value
    if isinstance(value, tuple):
        return tuple(_resolved(each, base) for each in value)
    if isinstance(value, Struct):
        before = {name: getattr(value, name) for name in value.__struct_fields__}
        after = {name: _resolved(each, base) for name, each in before.items()}
        return msgspec.structs.replace(value, **after) if after != before else value
    return value


_AT = re.compile(r"^(?P<said>.*) - at `(?P<key>)?\$(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<key>[^`]+)`$")
_OWN = re.compile(r"^`(?P<key>[^`]+)`: (?P<said>.*)$", re.DOTALL)


def _explain(message: str, config_type: type[Struct]) -> tuple[KeyPath, str]:
    """Turn msgspec's sentence into (key path, the operator's sentence)."""
    at = _AT.match(message)
    said, parent = (at["said"], at["path"].lstrip(".")) if at else (message, "")
    # msgspec speaks JSON, the file is TOML.
    reason = said[:1].lower() + re.sub(r"\bobject\b", "table", said[1:])
    key = parent
    if missing := _MISSING.match(said):
        key, reason = f"{parent}.{missing['key']}".lstrip("."), "missing"
    elif own := _OWN.match(said):
        key, reason = f"{parent}.{own['key']}".lstrip("."), own["said"]
    elif said.startswith("Invalid enum"):
        reason += _choices(config_type, parent)
    return tuple(re.split(r"[.\[]", key)), f"`{key}`: {reason}" if key else reason


def _choices(config_type: type[Struct], key: str) -> str:
    literals = [each for each in _alternatives(_kind_at(config_type, _steps(key))) if get_origin(each) is Literal]
    values = ", ".join(str(value) for literal in literals for value in get_args(literal))
    return f" (one of {values})" if values else ""


def _steps(key: str) -> list[str]:
    """Split `executors[1].cmd` into `executors`, `[`, `1]`, `cmd`."""
    return re.findall(r"[^.\[]+|\[", key)


def _structs(kind: object) -> list[type[Struct]]:
    return [each for each in _alternatives(kind) if isinstance(each, type) and issubclass(each, Struct)]


def _kind_at(kind: object, steps: list[str]) -> object:
    """Return the type that a value has at the end of the steps; None where they lead nowhere."""
    if not steps:
        return kind
    if steps[0] == "[":  # into the items of a list or the values of a table
        return _kind_at(_item_kind(kind), steps[2:])
    return _kind_at(_fields(kind).get(steps[0]), steps[1:])


def _source_of(key_path: KeyPath, sources: Mapping[KeyPath, str], path: Path) -> str:
    """Say which layer the value at `key_path` came from."""
    for length in range(len(key_path), 0, -1):
        if key_path[:length] in sources:
            return sources[key_path[:length]]
    return str(path)
