"""`make sim` itself: the same output however many processes, and kinds that were not seen are named."""

import json
from pathlib import Path

import pytest

from tests.sim.kinds import FAULTS, SAID, SITUATIONS
from tests.sim.main import Summary, Told, main, until


def told(**fields) -> Told:
    given = {"simulated_s": 1.0, "events": 2, "faults": {}, "situations": {}, "transcript": None}
    return Told(**(given | fields))


@pytest.mark.slow
def test_two_processes_say_what_one_says(capsys):
    said = []
    for jobs in ("1", "2"):
        assert main(["--seeds", "3", "--start", "14", "--jobs", jobs]) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert line.pop("wall_s") > 0
        said.append(line)
    assert said[0] == said[1]
    assert said[0]["seeds"] == 3


def test_a_seed_that_broke_is_printed_and_counted(capsys):
    summary = Summary()
    summary.add(told(transcript="BROKEN L1"))
    summary.add(told(faults={"slow disk": 2}, situations={"rebase": 1}))
    assert (summary.seeds, summary.events, summary.violations, summary.simulated_s) == (2, 4, 1, 2.0)
    assert capsys.readouterr().out == "BROKEN L1\n\n"
    assert json.loads(summary.line())["faults"]["slow disk"] == 2


def test_every_kind_is_in_the_line_and_what_was_not_seen_is_named():
    summary = Summary()
    summary.add(told(faults={"slow disk": 2}, situations={"rebase": 1}))
    assert json.loads(summary.line())["situations"]["adopted lease"] == 0
    assert "adopted lease" in summary.unseen()
    assert not {"slow disk", "rebase"} & set(summary.unseen())


def test_seeds_end_with_the_time_that_was_given():
    assert list(until(range(5), 0.0)) == []
    assert list(until(range(5), 1.0)) == [0, 1, 2, 3, 4]


def test_what_situations_are_told_by_is_what_roles_log():
    product = Path(__file__).parent.parent.parent / "hypha"
    text = "".join(
        path.read_text() for folder in ("scheduler", "worker", "network") for path in product.glob(f"{folder}/*.py")
    )
    assert [message for message in SAID if f'"{message}"' not in text] == []
    assert not set(FAULTS) & set(SITUATIONS)
