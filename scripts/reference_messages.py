"""docs/reference/protocol.md and bridge.md: every message with its fields, in the words of its own docstring."""

import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from types import ModuleType

from msgspec import Struct
from msgspec import inspect as kinds

from hypha.network.probe import PROTOCOL_ID as PROTOCOL_PROBE
from hypha.protocol import bridge, messages, resources
from hypha.protocol.codec import GOSSIP_BYTES_MAX, MESSAGE_BYTES_MAX
from hypha.protocol.messages import base, leases, rounds, streams
from scripts.reference_config import field_comments
from scripts.reference_words import GENERATED, aligned, default_in_words, drawing, in_words, paragraphs, table

# Headers of tensor streams; they are not answered like requests but by what their docstrings say.
STREAM_HEADERS = (messages.PushUpdate, messages.OuterUpdate, messages.FetchModel, messages.FetchSlice)
_SIZES = f"{MESSAGE_BYTES_MAX >> 20} MiB, in gossip {GOSSIP_BYTES_MAX >> 10} KiB"
_ALIASES = ("Name", "Reason", "PeerId", "Digest", "Count", "Seconds", "SignedAddresses")
_SECTIONS = ((base, "Everywhere"), (leases, "Auctions, leases, jobs"), (rounds, "Rounds"), (streams, "Streams, health"))
_HIDDEN = {"Message", "Request", "LeaseMessage", "RoundMessage", "BridgeMessage"}
_JOB_SPEC = """\
### JobSpec

A `JobSpec`, the `job` of a DispatchJob, is the scheduler's `[scheduler.job]` with its dataset resolved: its tables are
those of [configuration.md](configuration.md#hypha-scheduler), declared in `hypha/protocol/job.py`."""
_BRIDGE_REMARKS = """\
HTTP status 400: not understood · 409: refused · 413: too large · 503: nobody answered, try again · 507: the disk.

`POST /telemetry?kind=traces` (or `metrics`, `logs`) takes an OTLP request in protobuf and answers 204.

`Count`, `Digest`, `Reason` and `Interval` are those of [protocol.md](protocol.md).
[How to write an executor](../how-to/own-executors.md).
"""
_BRIDGE_CALLS = (
    ("POST /resources/fetch", bridge.Fetch, bridge.Fetched),
    ("POST /resources/send", bridge.Send, bridge.Sent),
    ("POST /resources/receive", None, bridge.Event),
    ("POST /status/send", bridge.Report, bridge.Instruction),
)


def protocol_page() -> str:
    """Return the page about what crosses the network."""
    aliases = [(kinds.type_info(getattr(base, name)), f"`{name}`") for name in _ALIASES]
    lines = [_protocol_introduction(), "## Types", ""]
    lines += table(["name", "is"], ([f"`{name}`", in_words(kinds.type_info(getattr(base, name)))] for name in _ALIASES))
    for module, title in _SECTIONS:
        lines += ["", f"## {title}", "", *_messages(_structs(module), aliases, protocols=True)]
    lines += [*_messages([resources.Resources], [], protocols=False)]
    lines += [_JOB_SPEC]
    return "\n".join(lines).rstrip() + "\n"


def bridge_page() -> str:
    """Return the page about what a worker and its executor say to each other."""
    aliases = [(kinds.type_info(getattr(base, name)), f"`{name}`") for name in _ALIASES]
    aliases += [(kinds.type_info(bridge.RelativePath), "path in the work directory")]
    lines = [GENERATED, "", "# Job bridge", "", *drawing(bridge)]
    rows = [[f"`{path}`", _names(asked), _names(answered)] for path, asked, answered in _BRIDGE_CALLS]
    lines += [*table(["call", "takes", "answers"], rows), ""]
    lines += [_BRIDGE_REMARKS]
    lines += _messages(_structs(bridge), aliases, protocols=False)
    return "\n".join(lines).rstrip().replace("(#interval)", "(protocol.md#interval)") + "\n"


def _protocol_introduction() -> str:
    drawn = "\n".join(drawing(messages)[:-1])
    return f"""\
{GENERATED}

# Protocol

{drawn}

Everything runs inside libp2p connections over mutual TLS 1.3 (`/hypha/mtls/1.0.0`). A message is CBOR of a map whose
`type` is the message's name: at most {_SIZES}, checked before anything is decoded. Unknown
fields are ignored; missing or ill-typed ones are refused with their path. On a stream a frame is four bytes of length,
big endian, and the CBOR. Any request may be answered by a `Failure`; any message may carry a `traceparent`.

| protocol | carries |
|---|---|
| `{messages.PROTOCOL_API}` | one request, one answer, one stream |
| `{messages.PROTOCOL_PROGRESS}` | the same, for Progress |
| `{messages.PROTOCOL_HEALTH}` | the same, for Health |
| `{messages.PROTOCOL_STREAM}` | a header, then bytes and frames in both directions |
| `{PROTOCOL_PROBE}` | a bare client's one request: `hypha-ROLE probe` |
| gossip topic `{messages.TOPIC_WORKER}` | TaskAdvertisement, signed |
"""


def _structs(module: ModuleType) -> list[type[Struct]]:
    found = [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, Struct)]
    return [each for each in found if each.__module__ == module.__name__ and each.__name__ not in _HIDDEN]


def _messages(
    found: Iterable[type[Struct]], aliases: Sequence[tuple[kinds.Type, str]], *, protocols: bool
) -> list[str]:
    lines: list[str] = []
    for kind in found:
        lines += [f"### {kind.__name__}", "", paragraphs(kind), ""]
        if protocols and (how := _travels(kind)):
            lines += [how, ""]
        lines += _fields(kind, aliases)
    return lines


def _fields(kind: type[Struct], aliases: Sequence[tuple[kinds.Type, str]]) -> list[str]:
    comments = {**field_comments(kind), **aligned(kind)}
    rows = []
    for field in kinds.type_info(kind[None] if getattr(kind, "__parameters__", ()) else kind).fields:  # type: ignore
        if field.name != "traceparent":
            words = in_words(field.type, aliases)
            rows.append([f"`{field.encode_name}`", words, default_in_words(field), comments.get(field.name, "")])
    return [*table(["field", "type", "default", ""], rows), ""] if rows else []


def _travels(kind: type[Struct]) -> str:
    if kind is messages.TaskAdvertisement:
        return f"Gossip, topic `{messages.TOPIC_WORKER}`."
    if kind in STREAM_HEADERS:
        return f"Header of a stream, `{messages.PROTOCOL_STREAM}`."
    if not issubclass(kind, messages.Request) or getattr(kind, "__parameters__", ()):
        return ""
    answers = [each for base_kind in kind.__orig_bases__ for each in typing.get_args(base_kind)]  # type: ignore
    return f"Request, `{messages.protocol_of(kind)}`, answered by {' or '.join(map(_names, answers))}."


def _names(kind: object) -> str:
    if kind is None:
        return "nothing"
    each = typing.get_args(kind) or (kind,)
    links = [f"[{one.__name__}](#{one.__name__.lower()})" for one in each]
    return re.sub(r", (?=[^,]*$)", " or ", ", ".join(links))
