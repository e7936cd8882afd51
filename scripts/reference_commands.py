"""docs/reference/commands.md: every console script and its commands, as their own --help says it."""

from collections.abc import Iterator
from typing import Any

import typer

from hypha import certutil, cli
from scripts.reference_words import GENERATED

WIDTH = 110
APPS: dict[str, typer.Typer] = {
    "hypha": cli.hypha_app,
    "hypha-certutil": certutil.app,
    "hypha-gateway": cli.gateway_app,
    "hypha-data": cli.data_app,
    "hypha-worker": cli.worker_app,
    "hypha-scheduler": cli.scheduler_app,
}

_INTRODUCTION = f"""\
{GENERATED}

# Commands

Exit codes: 0 done, or stopped by SIGINT or SIGTERM · 1 it failed, or is not healthy · 2 usage, configuration or
certificates, told in one line on standard error. `hypha demo` that is ended by a signal exits with 128 and its number.
Logs are JSON lines on standard error, readable lines on a terminal. `--json` prints one object on standard output.

Two programs are not on the `PATH`, because they need the extra `train`: `python -m hypha.training.export` turns a model
file into a directory that `from_pretrained` loads, and executors are started by workers.
"""


def commands_page() -> str:
    """Return the page."""
    lines = [_INTRODUCTION]
    for path, text in helps():
        lines += [f"{'##' if path in APPS else '###'} {path}", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def helps() -> Iterator[tuple[str, str]]:
    """Yield every program, and every program with each of its commands, with what --help prints."""
    for program, app in APPS.items():
        yield from _helps(typer.main.get_command(app), program, None)


def command_names() -> set[str]:
    """Return every program, and every program with each of its commands."""
    return {path for path, _ in helps()}


def _helps(command: Any, path: str, parent: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - typer's vendored click
    context = command.context_class(
        command,
        info_name=path.rpartition(" ")[2],
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,
    )
    with context:
        yield path, command.get_help(context)
        for name, inner in getattr(command, "commands", {}).items():
            yield from _helps(inner, f"{path} {name}", context)
