"""The documentation against the code: generated pages, links, commands, keys, metrics, messages, the example."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from hypha.config import load_config
from hypha.dataset import faults_of as faults_of_dataset
from hypha.protocol.bridge import BaseReady
from hypha.telemetry import metrics
from scripts import reference
from scripts.reference_commands import APPS, command_names, helps
from scripts.reference_config import ROLES, keys_of
from tests.training.running import finish, start_server
from tests.training.tiny_network import Job

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "certs" / "README.md"])
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
GENERATED = sorted(reference.pages())
TARGETS = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
HELP = dict(helps())
# What stands for any of several programs, and names that are no programs.
NOT_PROGRAMS = {"hypha-ROLE", "hypha-p2p"}


def name_of(path):
    return str(path.relative_to(ROOT))


def prose(path):
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(path, *languages):
    found = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def spans(path):
    return re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", GENERATED)
def test_the_reference_is_what_the_code_says(name):
    assert (reference.DIRECTORY / name).read_text() == reference.pages()[name], "run `make docs`"


def test_every_configuration_key_has_a_meaning():
    rows = [line for line in reference.pages()["configuration.md"].splitlines() if line.startswith("| `")]
    assert [row for row in rows if re.search(r"\|\s*\|$", row)] == []
    keys = {key for config in ROLES.values() for key in keys_of(config)}
    tables = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    assert keys - tables <= {row.split("`")[1] for row in rows}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_documented_configurations_load(path):
    config = ROLES[path.stem]
    assert isinstance(load_config(config, path, {}), config)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        where = (path.parent / file).resolve() if file else path
        if not where.exists() or (anchor and anchor not in anchors(where)):
            broken.append(target)
    assert broken == []


def command_lines(path):
    """Yield the words of every command line in sh blocks and of every code span that begins with a program."""
    for block in blocks(path, "sh", "bash"):
        shell = re.sub(r"<<'END'.*?^END$", "", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        yield from (shlex.split(line, comments=True) for line in shell.splitlines())
    yield from (span.split() for span in spans(path) if span.startswith("hypha"))


def faults_of(words):
    """Return what a command line names that does not exist."""
    program, *rest = words
    if program in NOT_PROGRAMS or not re.fullmatch(r"hypha(-[a-z]+)?", program):
        return []
    if program not in APPS:
        return [program]
    command = f"{program} {rest[0]}" if rest and re.fullmatch(r"[a-z]+", rest[0]) else program
    if command not in command_names():
        return [command]
    flags = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    return [f"{command} {flag}" for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", HELP[command])]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_that_is_named_exists(path):
    faults = [fault for words in command_lines(path) if words for fault in faults_of(words)]
    assert faults == []


def test_a_command_that_does_not_exist_is_found():
    assert faults_of(shlex.split("hypha-gatway run")) == ["hypha-gatway"]
    assert faults_of(shlex.split("hypha-data serve -c x")) == ["hypha-data serve"]
    assert faults_of(shlex.split("hypha-data verify --fast DIR")) == ["hypha-data verify --fast"]
    assert faults_of(shlex.split("hypha-worker probe -c worker.toml ADDRESS --json")) == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_make_target_that_is_named_exists(path):
    lines = [line for block in blocks(path, "sh", "bash") for line in block.splitlines()]
    named = {match[1] for text in [*lines, *spans(path)] if (match := re.match(r"make ([a-z0-9]+)", text))}
    assert named <= TARGETS


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_toml_block_is_toml(path):
    for block in blocks(path, "toml"):
        assert tomli.loads(block)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_metric_that_is_named_exists(path):
    known = {name for each in vars(metrics).values() if isinstance(name := getattr(each, "name", None), str)}
    assert "hypha_active_workers" in known
    code = " ".join([*spans(path), *blocks(path, "promql", "yaml")])
    named = {re.sub(r"_(bucket|count|sum)$", "", word) for word in re.findall(r"\bhypha_[a-z_]+", code)}
    renamed = {"hypha_network", "hypha_data_fetch_duration_seconds", "hypha_network_bytes_sent_bytes_total"}
    assert named - renamed <= known


def strings_of_the_product():
    for path in (ROOT / "hypha").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_that_troubleshooting_quotes_is_one_of_ours():
    said = "\n".join(strings_of_the_product())
    quoted = [span[1:-1] for span in spans(ROOT / "docs" / "how-to" / "troubleshooting.md") if span.startswith('"')]
    parts = {part.strip() for message in quoted for part in message.split("…") if part.strip()}
    assert len(parts) > 20
    assert sorted(part for part in parts if part not in said) == []


def test_the_documents_speak_of_the_product_only():
    told = re.compile(r"design §|/work/|/tmp/(?!five)|\b(TODO|FIXME)\b|github issue|prompt", re.IGNORECASE)
    assert [f"{name_of(path)}: {match[0]}" for path in PAGES if (match := told.search(path.read_text()))] == []


class Strict(Job):
    """As in a network: who has not said that it stands on the round's base is a follower, not a member."""

    def members(self):
        return [machine for machine in self.workers if self.stands(machine)]

    def stands(self, machine):
        return any(isinstance(report, BaseReady) and report.round == self.round for report in machine.reports)

    def report(self, machine, report):
        answer = super().report(machine, report)
        if isinstance(report, BaseReady):
            self.show_view(final=self.round > self.spec.rounds.updates)
        return answer


def test_the_example_executor_takes_part_in_a_job(tmp_path):
    (source,) = blocks(ROOT / "docs" / "how-to" / "own-executors.md", "python")
    program = tmp_path / "shrink.py"
    program.write_text(source)
    with Strict(tmp_path, workers=1, sync_after=2) as job:
        server = start_server(job)
        machine = job.workers[0]
        command = [sys.executable, program, machine.socket, machine.dir]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
        finish(job, server, [])
        assert [done.round for done in job.rounds] == [1, 2, 3]
        assert len({done.model.digest for done in job.rounds}) == 3


def test_the_example_of_a_dataset_is_one(tmp_path):
    (source,) = blocks(ROOT / "docs" / "how-to" / "datasets.md", "python")
    program = tmp_path / "make.py"
    program.write_text(source)
    made = [sys.executable, program, tmp_path / "images"]
    subprocess.run(made, check=True, timeout=60)
    assert faults_of_dataset(tmp_path / "images") == []
