"""Every command of the demo, as argument vectors to run and as DIR/commands.sh to read and repeat.

    certificates ─ root, org, one node each ─▶ certs/
    dataset      ─ hypha-data prepare       ─▶ dataset/
    nodes        ─ gateway, data, workers, scheduler
    export       ─ python -m hypha.training.export ─▶ model/

All paths are relative to DIR, where every command runs.
"""

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from hypha.demo.corpus import Corpus
from hypha.demo.nodes import DATASET, SCHEDULER, SEQUENCE_LENGTH, Cast
from hypha.demo.progress import Finished
from hypha.errors import ConfigError

# So much text is prepared in two or three seconds, and a run of the usual length reads an eighth of it.
TEXT_BYTES_MAX = 8_000_000
SLICE_BYTES = 512 * 1024
HELD_OUT_SHARE = 0.02
SAMPLED_BYTES = 200
SCRIPT_NAME = "commands.sh"


class Command(Struct, frozen=True):
    """One command: `name` of its log, arguments, and how a person would type it where that differs."""

    name: str
    arguments: tuple[str, ...]
    shown: str | None = None

    def __str__(self) -> str:
        """Return it as a line for the shell."""
        return self.shown or shlex.join(self.arguments)


def programs() -> Path:
    """Return the directory of the console scripts, that of this interpreter first. Raises ConfigError."""
    beside = Path(sys.executable).parent
    if (beside / "hypha-gateway").exists():
        return beside
    found = shutil.which("hypha-gateway")
    if found is None:
        raise ConfigError(f"hypha-gateway is neither in {beside} nor on the PATH: is hypha-p2p installed?")
    return Path(found).parent


def authorities() -> list[Command]:
    """Return the commands for root and organisation, one after the other."""
    return [
        Command("certs-root", ("hypha-certutil", "root", "--name", "Demo root", "--out", "certs")),
        Command("certs-org", ("hypha-certutil", "org", "--name", "Demo organisation", "--out", "certs")),
    ]


def certificates(cast: Cast) -> list[Command]:
    """Return the commands for the nodes' certificates, in any order."""
    return [
        Command(f"certs-{name}", ("hypha-certutil", "node", "--name", name, "--role", role, "--out", "certs"))
        for name, role in cast.roles.items()
    ]


def show(cast: Cast) -> Command:
    """Return the command that tells the nodes' peer ids."""
    files = [f"certs/{name}.pem" for name in cast.roles]
    return Command("certs-show", ("hypha-certutil", "show", "--json", *files))


def dataset(corpus: Corpus) -> Command:
    """Return the command that prepares the text."""
    options = ["--out", "dataset", "--name", DATASET, "--sequence-length", str(SEQUENCE_LENGTH)]
    options += [
        "--slice-bytes",
        str(SLICE_BYTES),
        "--held-out",
        str(HELD_OUT_SHARE),
        "--max-bytes",
        str(TEXT_BYTES_MAX),
    ]
    head = ("hypha-data", "prepare")
    shown = f"{shlex.join(head)} {corpus.shown} {shlex.join(options)}"
    return Command("dataset", (*head, *corpus.sources, *options), shown)


def node(name: str, role: str) -> Command:
    """Return the command that runs a node until it is told to stop, or the scheduler until its job is done."""
    return Command(name, (f"hypha-{role}", "run", "-c", f"configs/{name}.toml"))


def export(finished: Finished, directory: Path) -> Command:
    """Return the command that makes a directory for `from_pretrained` of the job's model."""
    job, model = (_inside(directory, Path(each)) for each in (finished.job_file, finished.model_file))
    files = ("--job", job, "--model-file", model)
    tail = ("--out", "model", "--sample", str(SAMPLED_BYTES))
    return Command("export", (sys.executable, "-m", "hypha.training.export", *files, *tail))


def plot(report: str, out: str) -> Command:
    """Return the command that draws the losses."""
    return Command("plot", (sys.executable, "-m", "hypha.demo.plot", report, out))


def write_script(directory: Path, cast: Cast, corpus: Corpus) -> None:
    """Write commands.sh up to the scheduler's end."""
    nodes = [node(name, role) for name, role in cast.roles.items() if name != SCHEDULER]
    text = _SCRIPT.format(
        programs=shlex.quote(str(programs())),
        certificates=_lines([*authorities(), *certificates(cast)], indent="    "),
        dataset=_lines([dataset(corpus)], indent="    "),
        nodes="\n".join(f'{each} 2>> logs/{each.name}.log & nodes="$nodes $!"' for each in nodes),
        scheduler=node(SCHEDULER, "scheduler"),
    )
    (directory / SCRIPT_NAME).write_text(text)


def append_to_script(directory: Path, command: Command) -> None:
    """Add a command that is known only now."""
    with (directory / SCRIPT_NAME).open("a") as script:
        script.write(f"{command}\n")


def _inside(directory: Path, path: Path) -> str:
    """Return a path relative to the directory, if it lies in it."""
    path = path.resolve()
    return str(path.relative_to(directory) if path.is_relative_to(directory) else path)


def _lines(commands: Iterable[Command], *, indent: str) -> str:
    return "\n".join(f"{indent}{command}" for command in commands)


_SCRIPT = """\
#!/bin/sh
# What `hypha demo` ran, in this order. Every line can be given by hand, each node in a terminal of its own and without
# what follows `2>>`. `sh commands.sh` runs all of it with the certificates and the dataset that are here; as long as
# state/ is there, too, the scheduler finds its job done.
set -eu
cd "$(dirname "$0")"
PATH={programs}:"$PATH"

# A private root, an organisation below it, and a key and a certificate for each node.
if [ ! -d certs ]; then
{certificates}
fi

# Text becomes slices of samples, some of them never trained on.
if [ ! -d dataset ]; then
{dataset}
fi

# The network: all but the gateway know the gateway's address only.
nodes=
trap 'kill $nodes; wait' EXIT
trap 'exit 130' INT TERM
{nodes}

# The scheduler leases workers, runs the job, and ends with it.
{scheduler}

# The model as a directory for AutoModelForCausalLM.from_pretrained.
"""
