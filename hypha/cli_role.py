"""The commands that all four roles have.

    hypha-ROLE init  [--output FILE] [--force]           the documented defaults, ready to edit
    hypha-ROLE run   -c FILE [--set KEY=VALUE]… [--validate]
    hypha-ROLE       -c FILE --validate
    hypha-ROLE probe -c FILE ADDRESS [--timeout-s S] [--json]

Everything heavy (trio, libp2p, the role itself) is imported inside the commands: `--help` has half a second.
"""

import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import Struct

from hypha.cli_app import EXIT_FAILED, Force, Json, Version, new_app
from hypha.errors import ConfigError, PeerUnreachable, RemoteProtocolError

if TYPE_CHECKING:
    from hypha.config import NodeConfig
    from hypha.protocol.messages import HealthReport

CONFIGS = Path(__file__).parent / "configs"
PROBE_TIMEOUT_S = 10.0
Run = Callable[..., Coroutine[Any, Any, None]]

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="Configuration file (TOML).")]
MaybeConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="Configuration file (TOML).")]
Validate = Annotated[bool, typer.Option("--validate", help="Check configuration and certificates, then exit.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set lease.ttl_s=10; repeat for several."),
]
Standby = Annotated[bool, typer.Option("--standby", help="Wait, and lead the job once nobody else does any more.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: set the state of earlier runs aside.")]
TimeoutS = Annotated[float, typer.Option(min=0.1, help="Patience in seconds.")]


class Role(Struct, frozen=True):
    """One kind of node; its Config and its `run` are imported by these two when they are needed."""

    name: str
    summary: str
    config: "Callable[[], type[NodeConfig]]"
    run: Callable[[], Run]
    # Its `run` takes fresh=True (what it did before is set aside) and standby=True (it waits for its turn).
    starts_over: bool = False
    # Its `run` takes stopping=Event: once that is set it leaves politely and returns.
    leaves_politely: bool = False

    @property
    def program(self) -> str:
        """The console script's name."""
        return f"hypha-{self.name}"

    def read(self, path: Path, overrides: list[str] | None = None) -> "NodeConfig":
        """Load the role's configuration from all layers. Raises ConfigError."""
        from hypha.config import load_config

        return load_config(self.config(), path, os.environ, _parsed(overrides or []))


@contextmanager
def leaving_quietly() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into exit code 0 wherever trio does not listen for them: slow imports, the very end."""
    before = {each: signal.signal(each, _leave) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def role_app(role: Role) -> typer.Typer:
    """Make a role's command line."""
    app = new_app(role.summary)

    @app.callback(invoke_without_command=True)
    def options(
        context: typer.Context,
        *,
        config: MaybeConfigFile = None,
        validate: Validate = False,
        version: Version = False,
    ) -> None:
        if context.invoked_subcommand is not None:
            context.obj = config
        elif config is not None and validate:
            _validate(role, config, None)
        elif config is not None:
            raise ConfigError("say `run -c FILE` to start, or add --validate to check the file")
        else:
            typer.echo(context.get_help())
            raise typer.Exit

    app.command()(_init_command(role))
    app.command()(_run_command(role))
    app.command()(_probe_command(role))
    return app


def ask(role: Role, config: "NodeConfig", address: str, timeout_s: float) -> "HealthReport":
    """Ask the node at a multiaddress for its health. Raises PeerUnreachable, ConfigError, RemoteProtocolError."""
    import trio

    from hypha.network.probe import probe
    from hypha.pki import load_identity

    async def patiently() -> "HealthReport":
        return await probe(load_identity(config), address, timeout_s=timeout_s)

    return trio.run(patiently)


def report_health(answer: "Callable[[], HealthReport]", *, json: bool) -> None:
    """Print what `answer` returns; exits 1 where there is none."""
    import msgspec

    try:
        report = answer()
    except (PeerUnreachable, RemoteProtocolError) as error:
        if json:
            typer.echo(msgspec.json.encode({"healthy": False, "reason": str(error)}))
        else:
            typer.echo(f"not healthy: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    if json:
        fields = msgspec.structs.asdict(report)
        typer.echo(msgspec.json.encode({"healthy": True, **fields}))
        return
    typer.echo(f"healthy: {report.role} {report.version}, up {report.uptime_s:.0f} s, {report.peer_id}")
    for key, value in sorted(report.detail.items()):
        typer.echo(f"  {key}: {value}")


def _init_command(role: Role) -> Callable[..., None]:
    def init(
        *,
        output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(f"{role.name}.toml"),
        force: Force = False,
    ) -> None:
        """Write a commented configuration with every key and its default."""
        from hypha.pki import save

        template = CONFIGS / f"{role.name}.toml"
        if not template.is_file():
            raise ConfigError(f"this installation lacks {template}")
        save(output, template.read_bytes(), force=force)
        typer.echo(output)

    return init


def _run_command(role: Role) -> Callable[..., None]:
    def run(
        context: typer.Context,
        *,
        config: MaybeConfigFile = None,
        overrides: Overrides = None,
        validate: Validate = False,
    ) -> None:
        """Run the node until SIGINT or SIGTERM."""
        _start(role, config or context.obj, overrides, validate=validate, run=role.run)

    def run_or_start_over(
        context: typer.Context,
        *,
        config: MaybeConfigFile = None,
        overrides: Overrides = None,
        validate: Validate = False,
        fresh: Fresh = False,
        standby: Standby = False,
    ) -> None:
        """Run the job to its end, going on where an earlier run left it; SIGINT or SIGTERM ends it before."""

        def started() -> Run:
            return partial(role.run(), fresh=fresh, standby=standby)

        _start(role, config or context.obj, overrides, validate=validate, run=started)

    if not role.starts_over:
        return run
    run_or_start_over.__name__ = "run"
    return run_or_start_over


def _start(
    role: Role, path: Path | None, overrides: list[str] | None, *, validate: bool, run: Callable[[], Run]
) -> None:
    if path is None:
        raise ConfigError("`run` needs a configuration: -c FILE")
    if validate:
        _validate(role, path, overrides)
        return
    with leaving_quietly():
        from hypha.cli_run import run_role

        loaded = role.read(path, overrides)
        run_role(role.program, run(), loaded, polite=role.leaves_politely)


def _probe_command(role: Role) -> Callable[..., None]:
    def probe(
        config: ConfigFile,
        address: Annotated[str, typer.Argument(help="Multiaddress, e.g. /ip4/192.0.2.1/tcp/4001.")],
        *,
        timeout_s: TimeoutS = PROBE_TIMEOUT_S,
        json: Json = False,
    ) -> None:
        """Ask the node at ADDRESS whether it is well, with this node's certificate: exit 0 if so, else 1."""
        loaded = role.read(config)
        report_health(lambda: ask(role, loaded, address, timeout_s), json=json)

    return probe


def _validate(role: Role, path: Path, overrides: list[str] | None) -> None:
    from hypha import telemetry
    from hypha.pki import load_identity

    config = role.read(path, overrides)
    telemetry.check(config)
    identity = load_identity(config)
    for warning in identity.warnings:
        typer.echo(f"{role.program}: warning: {warning}", err=True)
    typer.echo(f"{path}: valid for {role.name} {identity.subject} {identity.peer_id}")


def _parsed(overrides: list[str]) -> dict[str, object]:
    from hypha.config import parse_value

    values: dict[str, object] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"`--set {text}`: it takes KEY=VALUE")
        values[key] = parse_value(value)
    return values
