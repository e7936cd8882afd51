"""docs/tutorial/by-hand.md, command by command, in a new folder with real processes.

```sh        runs to its end: exit code 0
```sh NAME   a terminal of its own: runs on
```text      phrases, one a line, that the block above says sooner or later; "a|b": either
"""

import re
import signal
from pathlib import Path

import pytest
from msgspec import Struct

from hypha.demo.nodes import free_port
from tests.e2e.programs import run, stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TUTORIALS = Path(__file__).parent.parent.parent / "docs" / "tutorial"
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
PORT = "4001"


class Block(Struct, frozen=True):
    """One fenced block: `terminal` is empty where the commands end by themselves."""

    commands: str
    terminal: str
    phrases: tuple[str, ...] = ()


def blocks(text: str) -> list[Block]:
    """Return the commands of a page in order, each with what it says."""
    found: list[Block] = []
    for fence in FENCE.finditer(text):
        language, _, terminal = fence["info"].partition(" ")
        if language == "sh":
            found.append(Block(fence["body"], terminal))
        elif language == "text":
            last = found.pop()
            found.append(Block(last.commands, last.terminal, tuple(fence["body"].splitlines())))
    return found


def says(phrase: str, output: str) -> bool:
    return any(alternative in output for alternative in phrase.split("|"))


def test_the_tutorial_by_hand_works_as_written(tmp_path):
    # Somebody may use the tutorial's port on this machine; everything else is as written.
    page = (TUTORIALS / "by-hand.md").read_text()
    port = str(free_port())
    with stage(tmp_path) as terminals:
        for block in blocks(page):
            commands = block.commands.replace(PORT, port)
            if block.terminal:
                program = terminals.start(block.terminal, commands.strip())
                for phrase in block.phrases:
                    program.wait_for(phrase)
                continue
            code, output = run(commands, tmp_path, timeout_s=200)
            assert code == 0, f"{commands}\n{output}"
            assert [each for each in block.phrases if not says(each, output)] == [], f"{commands}\n{output}"
            with_port_of_configs(tmp_path, port)
        assert sorted(terminals.programs) == ["data", "gateway", "worker-1", "worker-2", "worker-3"]
        codes = {name: program.stop(signal.SIGINT) for name, program in terminals.programs.items()}
        assert codes == dict.fromkeys(codes, 0)
        assert {name: program.errors() for name, program in terminals.programs.items()} == {name: [] for name in codes}
        assert all(any(each["message"] == "Stopped" for each in p.records()) for p in terminals.programs.values())


def with_port_of_configs(directory: Path, port: str) -> None:
    """Put the test's port where `init` has just written the documented one."""
    for path in directory.glob("*.toml"):
        text = path.read_text()
        if f"/tcp/{PORT}" in text:
            path.write_text(text.replace(f"/tcp/{PORT}", f"/tcp/{port}"))


def test_the_first_run_page_names_options_that_exist():
    code, output = run(["hypha", "demo", "--help"], TUTORIALS)
    page = (TUTORIALS / "first-run.md").read_text()
    named = set(re.findall(r"--[a-z]+", page))
    assert (code, {each for each in named if each not in output}) == (0, set())


def test_blocks_are_read_with_what_they_say():
    page = "a\n```sh\nls\n```\nb\n```text\none\ntwo|2\n```\n```sh gateway\nrun\n```\n```toml\nx = 1\n```\n"
    assert blocks(page) == [Block("ls\n", "", ("one", "two|2")), Block("run\n", "gateway")]
    assert (says("two|2", "says 2"), says("two|2", "says 3")) == (True, False)
