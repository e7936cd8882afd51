"""How much may wait before a connection: little where it is slow, as much as ever where it is fast."""

import pytest

from hypha.network.drain import FRAME_BYTES_FIRST, FRAME_BYTES_MAX, FRAME_BYTES_MIN, WAIT_S, Drain


class Link:
    """A connection that takes so many bytes a second, and `room` more at once when nothing waits."""

    def __init__(self, bytes_per_s: float, room: int = 0) -> None:
        self.bytes_per_s = bytes_per_s
        self.drain = Drain()
        self.now = 0.0
        self._room = room

    def move(self, total: int) -> list[int]:
        """Write so much, frame by frame; returns the sizes of the frames."""
        sizes = []
        while total > 0:
            count = self.drain.frame_bytes
            began, waits = self.now, max(0, count - self._room)
            self._room = max(0, self._room - count)
            self.now += waits / self.bytes_per_s
            self.drain.took(count, began, self.now)
            sizes.append(count)
            total -= count
        return sizes


def test_a_fast_connection_soon_writes_large_frames():
    link = Link(1e9)
    link.move(2 << 20)
    assert set(link.move(8 << 20)) == {FRAME_BYTES_MAX}


def test_a_connection_that_takes_no_measurable_time_is_a_fast_one():
    drain = Drain()
    for _ in range(100):
        drain.took(drain.frame_bytes, 5.0, 5.0)
    assert drain.frame_bytes == FRAME_BYTES_MAX


@pytest.mark.parametrize("room", [0, 64 << 10, 256 << 10])
def test_a_slow_connection_writes_small_ones_however_much_its_kernel_takes_at_first(room):
    link = Link(80e3, room)
    link.move(1 << 20)
    assert set(link.move(1 << 20)) == {FRAME_BYTES_MIN}


def test_a_frame_passes_in_a_moment_at_any_rate_between():
    link = Link(1e6)
    link.move(1 << 20)
    assert max(link.move(1 << 20)) <= 1e6 * WAIT_S * 1.01


def test_a_connection_that_becomes_slow_writes_smaller_ones_after_one_write_and_recovers():
    link = Link(1e9)
    link.move(4 << 20)
    link.bytes_per_s = 100e3
    assert link.move(1 << 20)[:2] == [FRAME_BYTES_MAX, FRAME_BYTES_MIN]
    link.bytes_per_s = 1e9
    assert link.move(4 << 20)[-1] == FRAME_BYTES_MAX


def test_small_messages_say_nothing_about_the_rate():
    drain = Drain()
    assert not any(drain.took(200, now, now + 5.0) for now in range(100))
    assert drain.frame_bytes == FRAME_BYTES_FIRST
