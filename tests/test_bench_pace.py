"""What the pace benchmark makes of executors' notes."""

from msgspec.structs import replace

from benchmarks.pace import ROUNDS_BEFORE, Event, out_of_proportion, shares

FIRST = ROUNDS_BEFORE + 1


def notes(computing_s, waits_s, rows):
    """One worker's round of ten seconds: it computes, is pushed at once, waits, and the rest is something else."""
    pushed_at = 100.0 - waits_s
    return [
        Event(round=FIRST, event="loaded", at=91.0),
        *(Event(round=FIRST, event="step", at=92.0, seconds=computing_s / 4, rows=rows) for _ in range(4)),
        Event(round=FIRST, event="pushed", at=pushed_at),
        Event(round=FIRST + 1, event="loaded", at=101.0),
    ]


def test_waiting_is_from_the_own_push_to_the_last_one_and_idle_is_all_but_steps():
    found = shares({1: notes(8.0, 1.0, 16), 2: notes(9.0, 0.5, 8), 4: notes(7.0, 0.0, 4)})
    assert found["waiting_percent"] == 5.0
    assert found["idle_percent"] == 20.0
    assert found["batch"] == {"1x": 16, "2x": 8, "4x": 4}
    assert found["rounds"] == 1


def test_rounds_that_are_not_whole_and_the_first_ones_do_not_count():
    early = [replace(event, round=event.round - ROUNDS_BEFORE) for event in notes(1.0, 9.0, 16)]
    torn = [Event(round=FIRST + 1, event="step", at=102.0, seconds=5.0, rows=1)]
    found = shares({slowness: [*early, *notes(8.0, 0.0, 16 // slowness), *torn] for slowness in (1, 2, 4)})
    assert (found["rounds"], found["waiting_percent"], found["idle_percent"]) == (1, 0.0, 20.0)


def test_out_of_proportion_names_the_furthest():
    assert out_of_proportion({"1x": 16, "2x": 8, "4x": 4}) == 0.0
    assert out_of_proportion({"1x": 16, "2x": 8, "4x": 5}) == 25.0
