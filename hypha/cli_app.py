"""What every Hypha command line shares: how it looks, and how it ends.

0  done, or stopped by SIGINT / SIGTERM      1  it failed, or is not healthy
2  usage, configuration or certificates: one line on stderr, never a traceback
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hypha import __version__
from hypha.errors import ConfigError, HyphaError

EXIT_FAILED = 1
EXIT_CONFIG = 2


def _show_version(context: typer.Context, wanted: bool) -> None:  # noqa: FBT001 - typer passes it by position
    if wanted:
        typer.echo(f"{context.find_root().info_name} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]


def new_app(summary: str) -> typer.Typer:
    """Make an application without rich's boxes: importing rich would double the time to `--help`."""
    return typer.Typer(
        help=summary,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def main(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> None:
    """Run the command line, the process's own unless given, and leave the process with its exit code."""
    try:
        app(arguments, prog_name=program)
    except HyphaError as error:
        line = " ".join(str(error).split())
        typer.echo(f"{program}: {line}", err=True)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)
