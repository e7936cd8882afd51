"""The console scripts, but for certificates (hypha.certutil).

hypha-gateway    init run probe
hypha-scheduler  init run probe status
hypha-worker     init run probe
hypha-data       init run probe prepare verify
hypha            demo doctor
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hypha.cli_app import EXIT_FAILED, Force, Json, Version, main, new_app
from hypha.cli_role import PROBE_TIMEOUT_S, ConfigFile, Role, Run, TimeoutS, ask, report_health, role_app
from hypha.errors import ConfigError

if TYPE_CHECKING:
    from hypha.config import NodeConfig


def _gateway_config() -> "type[NodeConfig]":
    from hypha.gateway import Config

    return Config


def _gateway_run() -> Run:
    from hypha.gateway import run

    return run


def _scheduler_config() -> "type[NodeConfig]":
    from hypha.scheduler.config import Config

    return Config


def _scheduler_run() -> Run:
    from hypha.scheduler.service import run

    return run


def _worker_config() -> "type[NodeConfig]":
    from hypha.worker.config import Config

    return Config


def _worker_run() -> Run:
    from hypha.worker.service import run

    return run


def _data_config() -> "type[NodeConfig]":
    from hypha.data_node import Config

    return Config


def _data_run() -> Run:
    from hypha.data_node import run

    return run


GATEWAY = Role("gateway", "A node that others find each other through.", _gateway_config, _gateway_run)
SCHEDULER = Role(
    "scheduler",
    "Leases workers and coordinates a training job.",
    _scheduler_config,
    _scheduler_run,
    starts_over=True,
)
WORKER = Role(
    "worker", "Leases this machine out and runs jobs on it.", _worker_config, _worker_run, leaves_politely=True
)
DATA = Role("data", "Serves datasets to workers.", _data_config, _data_run)

gateway_app = role_app(GATEWAY)
scheduler_app = role_app(SCHEDULER)
worker_app = role_app(WORKER)
data_app = role_app(DATA)
hypha_app = new_app("A peer-to-peer, lease-based network that trains one model on scattered machines.")


@scheduler_app.command()
def status(
    config: ConfigFile,
    address: Annotated[str | None, typer.Argument(help="Where it listens  [default: from the configuration]")] = None,
    timeout_s: TimeoutS = PROBE_TIMEOUT_S,
    json: Json = False,
) -> None:
    """Ask the scheduler that runs with this configuration what it is doing: exit 0, or 1 where it does not answer."""
    loaded = SCHEDULER.read(config)
    where = address or _loopback_address(loaded.listen_addresses)
    report_health(lambda: ask(SCHEDULER, loaded, where, timeout_s), json=json)


@data_app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="Text files and folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the dataset.")],
    name: Annotated[str | None, typer.Option(help="Name of the dataset  [default: the directory's]")] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 128,
    slice_bytes: Annotated[int, typer.Option(min=1024, help="About so many bytes per slice.")] = 4 * 2**20,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of the text never trained on.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Shuffles the samples; same seed, same dataset.")] = 0,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop reading after so many bytes of text.")] = None,
    digest: Annotated[str, typer.Option(help="blake3, or sha256 at a quarter of its speed.")] = "blake3",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json  [default: one token per byte]")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn text into a dataset: slices, held-out split and manifest."""
    import msgspec

    from hypha import dataset_tool

    manifest = dataset_tool.prepare(
        sources,
        out,
        name=name or out.resolve().name,
        sequence_length=sequence_length,
        slice_bytes=slice_bytes,
        held_out=held_out,
        seed=seed,
        max_bytes=max_bytes,
        digest=digest,
        force=force,
        tokenizer=tokenizer,
    )
    if json:
        typer.echo(msgspec.json.encode(manifest))
    else:
        samples = sum(each.samples for each in manifest.slices)
        typer.echo(f"{out}: dataset {manifest.name}, {len(manifest.slices)} slices, {samples} samples")


@data_app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(help="Directory of the dataset.")],
    json: Json = False,
) -> None:
    """Check every slice of a dataset against its manifest: exit 1 and one line for each fault."""
    import msgspec

    from hypha import dataset_tool

    faults = dataset_tool.verify(dataset)
    if json:
        typer.echo(msgspec.json.encode({"dataset": str(dataset), "faults": faults}))
    elif not faults:
        typer.echo(f"{dataset}: sound")
    else:
        for fault in faults:
            typer.echo(f"{dataset}: {fault}", err=True)
    if faults:
        raise typer.Exit(EXIT_FAILED)


@hypha_app.callback(no_args_is_help=True)
def options(version: Version = False) -> None:
    """A peer-to-peer, lease-based network that trains one model on scattered machines."""


@hypha_app.command()
def demo(
    text: Annotated[
        list[Path] | None, typer.Option(help="Files or folders to learn from  [default: Python's standard library]")
    ] = None,
    workers: Annotated[int, typer.Option(min=2, help="Workers to start; one of them serves parameters.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Outer rounds to train.")] = 10,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where all it makes goes  [default: a new folder here]")
    ] = None,
    otlp: Annotated[str | None, typer.Option(help="OTLP endpoint for everything's telemetry.")] = None,
    json: Json = False,
) -> None:
    """Start a whole network on this machine, train a small model on real text, report, and stop it."""
    from hypha.demo import main as run_demo

    raise typer.Exit(
        run_demo(text=text or [], workers=workers, rounds=rounds, directory=directory, otlp=otlp, json=json)
    )


@hypha_app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check this node's certificates and addresses, too.")
    ] = None,
    dial: Annotated[bool, typer.Option("--dial", help="Dial the gateways that the configuration names.")] = False,
    json: Json = False,
) -> None:
    """Say whether this machine can run Hypha: exit 0 if nothing fails, else 1."""
    import msgspec

    from hypha import doctor as examination

    findings = examination.run(config, dial=dial)
    failed = any(each.verdict == "fail" for each in findings)
    if json:
        typer.echo(msgspec.json.encode({"healthy": not failed, "findings": findings}))
    else:
        for each in findings:
            typer.echo(f"{each.verdict:<5} {each.subject:<13} {each.detail}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _loopback_address(listen_addresses: tuple[str, ...]) -> str:
    """Return where a node that listens so can be reached from this machine."""
    for address in listen_addresses:
        if not address.endswith("/tcp/0"):
            return address.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/").replace("/ip6/::/", "/ip6/::1/")
    raise ConfigError("`listen_addresses` names no fixed port: say where the scheduler listens")


def gateway() -> None:
    """Entry point of hypha-gateway."""
    main(gateway_app, GATEWAY.program)


def scheduler() -> None:
    """Entry point of hypha-scheduler."""
    main(scheduler_app, SCHEDULER.program)


def worker() -> None:
    """Entry point of hypha-worker."""
    main(worker_app, WORKER.program)


def data() -> None:
    """Entry point of hypha-data."""
    main(data_app, DATA.program)


def hypha() -> None:
    """Entry point of hypha."""
    main(hypha_app, "hypha")
