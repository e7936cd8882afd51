"""Sets of samples of one slice, kept canonical: sorted, disjoint, and never touching.

    add [3, 5)      0  1  2 [3  4) 5  6  7
    add [5, 7)      0  1  2 [3  4  5  6) 7      touching spans become one
    remove [4, 5)   0  1  2 [3) 4 [5  6) 7      a span is split where it must be

Every operation costs a binary search plus the spans it touches.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

from hypha.errors import LocalProtocolError
from hypha.protocol.messages import Interval


class Spans:
    """A set of non-negative integers as half-open spans [start, stop)."""

    __slots__ = ("_starts", "_stops", "samples")

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.samples = 0
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"<Spans {' '.join(f'[{start}, {stop})' for start, stop in self)}>"

    def covers(self, start: int, stop: int) -> bool:
        """Whether every sample of [start, stop) is in the set."""
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and stop <= self._stops[at]

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return what of [start, stop) is in the set."""
        at = bisect_right(self._stops, start)
        found = []
        while at < len(self._starts) and self._starts[at] < stop:
            found.append((max(start, self._starts[at]), min(stop, self._stops[at])))
            at += 1
        return found

    def next_from(self, position: int, limit: int) -> tuple[int, int]:
        """Return the first span at or after `position`, else the very first; at most `limit` samples of it."""
        at = bisect_right(self._stops, position)
        if at == len(self._starts):
            at, position = 0, 0
        start = max(position, self._starts[at])
        return start, min(self._stops[at], start + limit)

    def add(self, start: int, stop: int) -> None:
        """Add [start, stop). Raises LocalProtocolError when it is empty or some of it is there already."""
        at = bisect_right(self._starts, start)
        before = at > 0 and self._stops[at - 1] > start
        if start >= stop or before or (at < len(self._starts) and self._starts[at] < stop):
            raise LocalProtocolError(f"[{start}, {stop}) cannot be added to {self!r}")
        joins_left = at > 0 and self._stops[at - 1] == start
        joins_right = at < len(self._starts) and self._starts[at] == stop
        first, last = at - joins_left, at + joins_right
        self._starts[first:last] = [self._starts[first] if joins_left else start]
        self._stops[first:last] = [self._stops[last - 1] if joins_right else stop]
        self.samples += stop - start

    def remove(self, start: int, stop: int) -> None:
        """Take [start, stop) out. Raises LocalProtocolError when it is empty or not wholly in the set."""
        if start >= stop or not self.covers(start, stop):
            raise LocalProtocolError(f"[{start}, {stop}) cannot be removed from {self!r}")
        at = bisect_right(self._starts, start) - 1
        left, right = self._starts[at], self._stops[at]
        rest = [span for span in ((left, start), (stop, right)) if span[0] < span[1]]
        self._starts[at : at + 1] = [span[0] for span in rest]
        self._stops[at : at + 1] = [span[1] for span in rest]
        self.samples -= stop - start


def intervals_of(epoch: int, spans: Iterable[tuple[int, Spans]]) -> tuple[Interval, ...]:
    """Return (slice number, spans) pairs as Intervals of one epoch, in order."""
    return tuple(
        Interval(epoch=epoch, slice=number, start=start, stop=stop)
        for number, ranges in sorted(spans, key=lambda pair: pair[0])
        for start, stop in ranges
    )


def overlap(intervals: Iterable[Interval]) -> tuple[Interval, Interval] | None:
    """Return two of the intervals that share a sample, or None."""
    ordered = sorted(intervals)
    for left, right in pairwise(ordered):
        if (left.epoch, left.slice) == (right.epoch, right.slice) and right.start < left.stop:
            return left, right
    return None
