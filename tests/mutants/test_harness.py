"""Planted defects fit the tree as it is, and the harness tells what is caught from what is not."""

import ast
import random

import pytest

from tests.mutants.main import MUTATED, PLANTED, Bench, draw, main, try_planted, try_random
from tests.mutants.mutations import Mutation, mutate
from tests.mutants.planted import Planted
from tests.mutants.scratch import ROOT, Scratch

TALLY = "hypha/protocol/tally.py"
FENCE = "hypha/protocol/fence.py"


@pytest.fixture
def scratch(tmp_path) -> Scratch:
    return Scratch(tmp_path)


@pytest.mark.parametrize("defect", PLANTED, ids=lambda defect: defect.name)
def test_every_planted_defect_fits_the_tree_as_it_is(defect):
    text = (ROOT / defect.file).read_text()
    planted = defect.applied(text)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))
    assert [path for path in defect.tests if not (ROOT / path).exists()] == []


def test_planted_defects_have_names_of_their_own_and_are_enough():
    assert len({defect.name for defect in PLANTED}) == len(PLANTED) >= 20


def test_a_defect_that_does_not_fit_any_more_is_refused():
    defect = Planted(name="gone", file=FENCE, old="no such text", new="", breaks="", tests=())
    with pytest.raises(ValueError, match=r"gone: its text stands 0 times in hypha/protocol/fence\.py"):
        defect.applied("something else")


@pytest.mark.slow
def test_a_copy_that_cannot_even_be_imported_is_caught_by_both(scratch):
    broken = Planted(
        name="broken",
        file=FENCE,
        old="class Fences:",
        new="raise RuntimeError\nclass Fences:",
        breaks="everything",
        tests=("tests/protocol/test_fence.py",),
    )
    fate = try_planted(scratch, broken, seeds=1)
    assert fate.tests == "tests/protocol/test_fence.py"
    assert fate.simulation is not None


@pytest.mark.slow
def test_a_defect_is_caught_in_the_copy_and_the_copy_is_whole_again(scratch):
    defect = next(each for each in PLANTED if each.name == "fences restart in the last block")
    with scratch.planted(FENCE, defect.applied(scratch.read(FENCE))):
        found = scratch.tests(defect.tests)
    assert found is not None
    assert found.startswith("tests/protocol/test_fence.py::")
    assert scratch.tests(defect.tests) is None
    assert scratch.read(FENCE) == (ROOT / FENCE).read_text()


@pytest.mark.slow
def test_what_changes_nothing_survives(scratch):
    text = scratch.read(FENCE) + "\n# A comment more.\n"
    with scratch.planted(FENCE, text):
        assert scratch.tests(("tests/protocol/test_fence.py",)) is None


@pytest.mark.slow
def test_a_seed_without_a_violation_catches_nothing(scratch):
    assert scratch.simulation(seeds=1) is None


@pytest.mark.parametrize("file", sorted(MUTATED))
def test_a_mutation_is_one_change_of_a_module_that_still_parses(file):
    text = (ROOT / file).read_text()
    plain = ast.unparse(ast.parse(text)) + "\n"
    for number in range(20):
        mutation = mutate(file, text, random.Random(number))
        ast.parse(mutation.text)
        assert mutation.text != plain, f"mutation {number} ({mutation.kind}) changes nothing"
        assert mutation.diff


def test_random_mutations_are_the_same_for_the_same_number(scratch):
    assert draw(scratch, 3) == draw(scratch, 3)
    assert len({draw(scratch, number).text for number in range(10)}) > 5


@pytest.mark.slow
def test_a_random_mutation_is_judged_by_the_tests_of_its_module(scratch):
    emptied = Mutation(file=TALLY, line=1, kind="emptied", text='"""Nothing."""\n', diff="")
    assert try_random(scratch, emptied) is not None


@pytest.mark.slow
def test_several_are_tried_at_once_each_in_a_copy_of_its_own_and_told_in_order(tmp_path):
    bench = Bench(tmp_path, 2)

    def spoil(scratch: Scratch, number: int) -> tuple[int, str]:
        with scratch.planted(FENCE, f"# {number}\n"):
            return number, scratch.read(FENCE)

    assert list(bench.over(spoil, range(6))) == [(number, f"# {number}\n") for number in range(6)]
    whole = (ROOT / FENCE).read_text()
    assert [(tmp_path / name / FENCE).read_text() for name in ("0", "1")] == [whole, whole]


@pytest.mark.slow
def test_after_its_time_nothing_more_is_begun(tmp_path):
    bench = Bench(tmp_path, 1, limit_s=-1.0)
    assert list(bench.over(lambda _scratch, number: number + 1, range(3))) == []


@pytest.mark.slow
def test_a_tree_that_is_broken_as_it_is_is_said_to_be(tmp_path, capsys):
    bench = Bench(tmp_path, 1)
    (tmp_path / "0" / FENCE).write_text("raise RuntimeError\n")
    assert not bench.is_sound(0, [("tests/protocol/test_fence.py",)])
    assert "the tree is broken as it is: tests/protocol/test_fence.py" in capsys.readouterr().out


def test_a_name_that_nobody_planted_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nothing of that name"])
    assert "nothing of that name is not planted" in capsys.readouterr().err
