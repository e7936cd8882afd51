"""Samples: exact intervals, batches that span grants, questions asked ahead, and slices that are wrong by name."""

import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hypha.errors import JobFailed
from hypha.protocol.bridge import NoSamples, SamplesFetched
from hypha.protocol.messages import INTERVALS_PER_CONTRIBUTION_MAX, Interval
from hypha.training.batches import Feed, Rows, taker

SCHEMA = {"input_ids": "U8[4]"}
ROWS = 100


@pytest.fixture
def slice_path(tmp_path):
    rows = np.repeat(np.arange(ROWS, dtype=np.uint8)[:, None], 4, axis=1)
    save_file({"input_ids": rows}, str(tmp_path / "s.safetensors"))
    return tmp_path / "s.safetensors"


def at(start, stop, number=0):
    return Interval(epoch=0, slice=number, start=start, stop=stop)


class Scheduler:
    """Answers FetchSamples with scripted intervals, then NoSamples."""

    def __init__(self, *intervals, gate=None):
        self.intervals, self.asked, self.gate = list(intervals), [], gate
        self.heard = threading.Semaphore(0)

    def __call__(self, wanted, _abandoned):
        self.asked.append(wanted)
        self.heard.release()
        if self.gate is not None:
            self.gate.wait(10)
        if not self.intervals:
            return NoSamples(round=1)
        return SamplesFetched(interval=self.intervals.pop(0), path="s.safetensors")


def feed(path, scheduler, *, grant_samples=16, leave=lambda: False):
    take = taker(path.parent, SCHEMA)
    return Feed(scheduler, take=take, grant_samples=grant_samples, leave=leave)


def numbers(batch):
    return batch["input_ids"][:, 0].tolist()


def test_batches_span_grants_and_touching_intervals_merge(slice_path):
    with feed(slice_path, Scheduler(at(10, 15), at(15, 18), at(50, 60, number=1))) as samples:
        assert numbers(samples.take(4, then=100)) == [10, 11, 12, 13]
        assert numbers(samples.take(6, then=100)) == [14, 15, 16, 17, 50, 51]
        assert samples.used == [at(10, 18), at(50, 52, number=1)]


def test_what_is_left_of_a_grant_is_not_named(slice_path):
    with feed(slice_path, Scheduler(at(0, 16))) as samples:
        samples.take(5, then=0)
        assert samples.used == [at(0, 5)]


def test_the_last_batch_is_smaller_and_then_there_is_none(slice_path):
    with feed(slice_path, Scheduler(at(0, 3))) as samples:
        assert numbers(samples.take(2, then=100)) == [0, 1]
        assert numbers(samples.take(2, then=100)) == [2]
        assert samples.exhausted
        assert samples.take(2, then=100) is None
        assert samples.used == [at(0, 3)]


def test_the_next_grant_is_asked_for_while_half_of_this_one_is_left(slice_path):
    scheduler = Scheduler(at(0, 16), at(16, 32))
    with feed(slice_path, scheduler) as samples:
        samples.take(4, then=96)
        assert scheduler.heard.acquire(timeout=5)
        assert scheduler.asked == [16]
        samples.take(4, then=92)
        assert scheduler.heard.acquire(timeout=5)
        assert scheduler.asked == [16, 16]


def test_no_more_is_asked_for_than_the_round_may_take(slice_path):
    scheduler = Scheduler(at(0, 8))
    with feed(slice_path, scheduler) as samples:
        samples.take(4, then=4)
        samples.take(4, then=0)
        assert scheduler.asked == [8]


def test_a_wait_for_samples_ends_when_they_are_no_longer_wanted(slice_path):
    gate, calls = threading.Event(), []

    def leave():
        calls.append(1)
        return len(calls) > 2

    with feed(slice_path, Scheduler(at(0, 8), gate=gate), leave=leave) as samples:
        assert samples.take(4, then=4) is None
        assert not samples.exhausted
        gate.set()


def test_a_contribution_names_a_bounded_number_of_intervals(slice_path):
    scattered = [at(2 * (n % 40), 2 * (n % 40) + 1, number=n) for n in range(INTERVALS_PER_CONTRIBUTION_MAX + 5)]
    with feed(slice_path, Scheduler(*scattered)) as samples:
        taken = samples.take(10_000, then=0)
        assert samples.full
        assert len(samples.used) == len(numbers(taken)) == INTERVALS_PER_CONTRIBUTION_MAX


def test_rows_beyond_the_slice_are_refused(slice_path):
    with (
        feed(slice_path, Scheduler(at(90, 101))) as samples,
        pytest.raises(JobFailed, match=r"s\.safetensors: rows \[90, 101\) of 100"),
    ):
        samples.take(4, then=4)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"input_ids": "I64[4]"}, r"tensor 'input_ids' is U8\[4\] per sample, expected I64\[4\]"),
        ({"input_ids": "U8[5]"}, r"tensor 'input_ids' is U8\[4\] per sample, expected U8\[5\]"),
        ({"pixels": "U8[4]"}, r"its tensors are \['input_ids'\], the dataset has \['pixels'\]"),
    ],
)
def test_a_slice_with_the_wrong_tensors_is_named(slice_path, schema, fault):
    with pytest.raises(JobFailed, match=r"slice s\.safetensors: " + fault):
        Rows(slice_path, schema)


def test_tensors_of_one_slice_have_equally_many_rows(tmp_path):
    save_file({"a": np.zeros((3, 1), np.uint8), "b": np.zeros((4, 1), np.uint8)}, str(tmp_path / "s"))
    with pytest.raises(JobFailed, match=r"different numbers of rows: \[3, 4\]"):
        Rows(tmp_path / "s", {"a": "U8[1]", "b": "U8[1]"})


def test_small_integers_become_int64_and_halves_fp32(tmp_path):
    save_file({"ids": np.ones((2, 1), np.uint16), "x": np.ones((2, 1), np.float16)}, str(tmp_path / "s"))
    read = Rows(tmp_path / "s", {"ids": "U16[1]", "x": "F16[1]"}).read(0, 2)
    assert (read["ids"].dtype, read["x"].dtype) == (torch.int64, torch.float32)
