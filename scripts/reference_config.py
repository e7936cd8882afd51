"""docs/reference/configuration.md: every key of every role, its type, range, default and meaning.

key, type, range, default ◀── Config structs
meaning, the first found  ◀── configs/ROLE.toml: the comment behind the key, or above it
                          ◀── the struct's docstring (`key   text`), or the comment at the field
                          ◀── reference_meanings.toml, for keys whose names say nearly all
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import tomli
from msgspec import Struct
from msgspec import inspect as kinds

from hypha.config import NodeConfig
from hypha.data_node import Config as DataConfig
from hypha.gateway import Config as GatewayConfig
from hypha.scheduler.config import Config as SchedulerConfig
from hypha.worker.config import Config as WorkerConfig
from scripts.reference_words import GENERATED, aligned, default_in_words, in_words, paragraphs, table

CONFIGS = Path(__file__).parent.parent / "configs"
ROLES: dict[str, type[NodeConfig]] = {
    "gateway": GatewayConfig,
    "data": DataConfig,
    "worker": WorkerConfig,
    "scheduler": SchedulerConfig,
}
_MEANINGS = tomli.loads((Path(__file__).parent / "reference_meanings.toml").read_text())
_HEADING = re.compile(r"^#? ?\[+([a-z_.]+)\]+\s*(?:#\s*(.*))?$")
_KEY = re.compile(r"^(?:# ?)?([a-z_]+) = (?:[^#\"]|\"[^\"]*\")*(?:#\s*(.*))?$")

_INTRODUCTION = f"""\
{GENERATED}

# Configuration

One TOML file per node; `hypha-ROLE init` writes it with every key and its comment, `hypha-ROLE run -c FILE --validate`
checks it. Later layers win:

1. defaults
2. the TOML file; a key that nobody knows is refused by its path, a syntax error by its line
3. the environment: `HYPHA_LEASE__TTL_S=10` sets `ttl_s` of `[lease]`; values read as TOML. `HYPHA_LOG` is no key but
   the log filter (`HYPHA_LOG=info,network=debug`)
4. flags: `--set lease.ttl_s=10`

Paths are relative to the file. Durations end in `_s` and are seconds. Where a list is wanted, one string stands for a
list of one. For telemetry the standard `OTEL_*` variables win over the file.
"""


def configuration_page() -> str:
    """Return the page."""
    lines = [_INTRODUCTION, "## Every role", "", paragraphs(NodeConfig), ""]
    lines += _table(NodeConfig, "", _comments("data"))
    for role, config in ROLES.items():
        lines += [f"## `hypha-{role}`", "", paragraphs(config), ""]
        lines += _sections(config, "", _comments(role), level=3)
    return "\n".join(lines).rstrip() + "\n"


def keys_of(kind: type[Struct], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key, those of tables inside included."""
    for field in kinds.type_info(kind).fields:  # type: ignore[attr-defined]
        yield prefix + field.encode_name
        for inner in _tables_in(field.type):
            yield from keys_of(inner, f"{prefix}{field.encode_name}.")


def meaning_of(kind: type[Struct], name: str) -> str:
    """Return the text of last resort about a field, of the class or of one that it inherits from; empty: none."""
    return next((text for each in kind.__mro__ if (text := _MEANINGS.get(each.__name__, {}).get(name))), "")


def _sections(kind: type[Struct], prefix: str, comments: dict[str, str], *, level: int) -> list[str]:
    lines = _table(kind, prefix, comments) if prefix or kind is not GatewayConfig else []
    for field in kinds.type_info(kind).fields:  # type: ignore[attr-defined]
        if not prefix and field.name in NodeConfig.__struct_fields__:
            continue
        for inner in _tables_in(field.type):
            path = f"{prefix}{field.encode_name}"
            several = isinstance(field.type, kinds.VarTupleType)
            lines += [f"{'#' * level} `{'[[' if several else '['}{path}{']]' if several else ']'}`", ""]
            lines += [paragraphs(inner), ""]
            lines += _sections(inner, f"{path}.", comments, level=level)
    return lines


def _table(kind: type[Struct], prefix: str, comments: dict[str, str]) -> list[str]:
    own = {**field_comments(kind), **aligned(kind)}
    inherited = set(NodeConfig.__struct_fields__) if kind is not NodeConfig and issubclass(kind, NodeConfig) else set()
    rows = []
    for field in kinds.type_info(kind).fields:  # type: ignore[attr-defined]
        if field.name in inherited or (_tables_in(field.type) and isinstance(field.type, kinds.StructType)):
            continue
        meaning = comments.get(prefix + field.encode_name) or own.get(field.name) or meaning_of(kind, field.name)
        words = "one or more tables, below" if _is_list_of_tables(field.type) else in_words(field.type)
        default = "" if _is_list_of_tables(field.type) else default_in_words(field)
        rows.append([f"`{prefix}{field.encode_name}`", _without_links(words), default, meaning])
    return [*table(["key", "type", "default", "meaning"], rows), ""] if rows else []


def _is_list_of_tables(kind: kinds.Type) -> bool:
    return isinstance(kind, kinds.VarTupleType) and isinstance(kind.item_type, kinds.StructType)


def _without_links(words: str) -> str:
    return re.sub(r"\[(\w+)\]\(#\w+\)", "table", words)


def _tables_in(kind: kinds.Type) -> list[type[Struct]]:
    if isinstance(kind, kinds.StructType):
        return [kind.cls]
    if isinstance(kind, kinds.VarTupleType):
        return _tables_in(kind.item_type)
    if isinstance(kind, kinds.UnionType):
        return [each for inner in kind.types for each in _tables_in(inner)]
    return []


def _comments(role: str) -> dict[str, str]:
    """Return what the role's documented configuration says about each key, by its dotted path."""
    path = CONFIGS / f"{role}.toml"
    if not path.exists():
        return {}
    known = set(keys_of(ROLES[role]))
    found: dict[str, str] = {}
    section, above, shared = "", [], ""
    for line in path.read_text().splitlines():
        if match := _HEADING.match(line):
            found[match[1]] = found.get(match[1]) or match[2] or " ".join(above)
            section, above, shared = f"{match[1]}.", [], ""
        elif (match := _KEY.match(line)) and section + match[1] in known:
            shared = " ".join(above) or shared
            # A table that comes several times is documented once.
            found[section + match[1]] = found.get(section + match[1]) or match[2] or shared
            above = []
        elif line.startswith("# ") and not line.startswith("# ---"):
            above, shared = [*above, line[2:]], ""
        else:
            above, shared = [], ""
    return {key: text for key, text in found.items() if text}


def field_comments(kind: type[Struct]) -> dict[str, str]:
    """Return the comments behind or above the fields in the struct's source."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        text = line.strip()
        if match := re.match(r"([a-z_]+): [^#]*(?:#\s*(.*))?$", text):
            if comment := match[2] or " ".join(above):
                found[match[1]] = comment
            above = []
        else:
            above = [*above, text[2:]] if text.startswith("# ") else []
    return found
