"""What a node's configuration and the standard `OTEL_*` environment say about telemetry, checked and merged.

    file: telemetry_endpoint, _protocol, _sampler, _sample_ratio, [telemetry_attributes], [telemetry_headers]
      └─▶ OTEL_EXPORTER_OTLP_{ENDPOINT,PROTOCOL,HEADERS,COMPRESSION,CERTIFICATE,CLIENT_CERTIFICATE,CLIENT_KEY},
          each also per signal (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT …); OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG;
          OTEL_{TRACES,METRICS,LOGS}_EXPORTER=none; OTEL_SDK_DISABLED         ─▶ Settings

`OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` are merged where the resource is made. Meanings are those of
https://opentelemetry.io/docs/specs/otel/protocol/exporter/ ; what is wrong raises ConfigError instead of a warning.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args
from urllib.parse import unquote, urlsplit

from hypha.errors import ConfigError

Kind = Literal["traces", "metrics", "logs"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WireProtocol = Literal["grpc", "http/protobuf", "http/json"]
HEADER_KEY = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
PROTOCOLS: tuple[WireProtocol, ...] = get_args(WireProtocol)
SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)


class TelemetryConfig(Protocol):
    """The keys of a node's configuration that telemetry reads."""

    @property
    def telemetry_endpoint(self) -> str | None:
        """Base URL of an OTLP collector; None or empty exports nothing."""

    @property
    def telemetry_protocol(self) -> str:
        """One of PROTOCOLS."""

    @property
    def telemetry_sampler(self) -> str:
        """One of SAMPLERS."""

    @property
    def telemetry_sample_ratio(self) -> float:
        """Share of traces recorded by the ratio samplers, 0 to 1."""

    @property
    def telemetry_attributes(self) -> Mapping[str, str]:
        """Resource attributes; `{component}` in a value stands for gateway, worker, …"""

    @property
    def telemetry_headers(self) -> Mapping[str, str]:
        """Sent with every export: authentication, tenant."""


@dataclass(frozen=True)
class Target:
    """Where one signal goes. `url` is complete for HTTP and scheme://host:port for gRPC."""

    url: str
    protocol: WireProtocol
    headers: tuple[tuple[str, str], ...] = ()
    gzip: bool = True
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None

    def __repr__(self) -> str:
        """Without the headers: they hold tokens."""
        return f"<Target {self.protocol} {self.url}>"


@dataclass(frozen=True)
class Settings:
    """All of it, valid. A kind without a target is not exported."""

    sampler: str
    sample_ratio: float
    attributes: Mapping[str, str]
    targets: Mapping[Kind, Target]


def resolve(component: str, config: TelemetryConfig, environ: Mapping[str, str]) -> Settings:
    """Merge file and environment. Raises ConfigError naming the key or variable that is wrong."""
    sampler = _pick(environ, "OTEL_TRACES_SAMPLER", "telemetry_sampler", config.telemetry_sampler, SAMPLERS)
    short = component.removeprefix("hypha-")
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    found = {} if disabled else {kind: _target(kind, config, environ) for kind in KINDS}
    return Settings(
        sampler=sampler,
        sample_ratio=_ratio(config, environ),
        attributes={key: value.replace("{component}", short) for key, value in config.telemetry_attributes.items()},
        targets={kind: target for kind, target in found.items() if target is not None},
    )


def _pick(environ: Mapping[str, str], variable: str, key: str, given: str, allowed: tuple[str, ...]) -> str:
    source, value = (variable, environ[variable]) if environ.get(variable) else (key, given)
    if value not in allowed:
        raise ConfigError(f"{source} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def _ratio(config: TelemetryConfig, environ: Mapping[str, str]) -> float:
    source, text = "telemetry_sample_ratio", str(config.telemetry_sample_ratio)
    if environ.get("OTEL_TRACES_SAMPLER_ARG"):
        source, text = "OTEL_TRACES_SAMPLER_ARG", environ["OTEL_TRACES_SAMPLER_ARG"]
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"{source} is {text!r}; it must be a number from 0 to 1")
    return ratio


def _variable(environ: Mapping[str, str], kind: Kind, name: str) -> tuple[str, str] | None:
    """The signal's own variable, else the general one; (its name, its value)."""
    for variable in (f"OTEL_EXPORTER_OTLP_{kind.upper()}_{name}", f"OTEL_EXPORTER_OTLP_{name}"):
        if environ.get(variable):
            return variable, environ[variable]
    return None


def _target(kind: Kind, config: TelemetryConfig, environ: Mapping[str, str]) -> Target | None:
    source, endpoint = "telemetry_endpoint", config.telemetry_endpoint or ""
    if (named := _variable(environ, kind, "ENDPOINT")) is not None:
        source, endpoint = named
    if not endpoint or environ.get(f"OTEL_{kind.upper()}_EXPORTER") == "none":
        return None
    protocol_from, protocol = "telemetry_protocol", config.telemetry_protocol
    if (named := _variable(environ, kind, "PROTOCOL")) is not None:
        protocol_from, protocol = named
    if protocol not in PROTOCOLS:
        raise ConfigError(f"{protocol_from} is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")

    def text(name: str) -> str | None:
        return None if (named := _variable(environ, kind, name)) is None else named[1]

    headers = text("HEADERS")
    chosen = config.telemetry_headers if headers is None else _headers(headers)
    for key, value in chosen.items():
        # The value may be a secret: only the key is named.
        if not HEADER_KEY.fullmatch(key) or not (value.isascii() and value.isprintable()):
            raise ConfigError(f"telemetry_headers: {key!r} or its value is not something HTTP can carry")
    return Target(
        # A signal's own endpoint is used as it stands; a general one is the base of its path.
        url=_url(endpoint, source, kind, text("INSECURE"), grpc=protocol == "grpc"),
        protocol=protocol,
        headers=tuple(sorted(chosen.items())),
        gzip=text("COMPRESSION") != "none",
        ca_file=text("CERTIFICATE"),
        client_cert_file=text("CLIENT_CERTIFICATE"),
        client_key_file=text("CLIENT_KEY"),
    )


def _url(endpoint: str, source: str, kind: Kind, insecure: str | None, *, grpc: bool) -> str:
    if grpc and "://" not in endpoint:
        scheme = "http" if (insecure or "").lower() == "true" else "https"
        endpoint = f"{scheme}://{endpoint}"
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an impossible port or IPv6 address
        usable = False
    if not usable:
        raise ConfigError(f"{source} is {endpoint!r}; it must be http://host:port or https://…")
    if grpc:
        return f"{parts.scheme}://{parts.netloc}"
    if source == f"OTEL_EXPORTER_OTLP_{kind.upper()}_ENDPOINT":
        return endpoint
    return f"{endpoint.rstrip('/')}/v1/{kind}"


def _headers(text: str) -> dict[str, str]:
    """Parse `key=value,key=value` with percent-encoded values (W3C baggage, as the specification has it)."""
    headers = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError("OTEL_EXPORTER_OTLP_HEADERS must read key=value,key=value")
        headers[key.strip()] = unquote(value.strip())
    return headers
