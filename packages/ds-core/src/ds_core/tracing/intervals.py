"""Sets of times: disjoint intervals in ascending order."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval], *, gap: float = 0.0) -> list[Interval]:
    """What any of them covers; those that are at most `gap` apart become one."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        elif end > begin:
            joined.append((begin, end))
    return joined


def intersection(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """What both cover; each is a result of this module."""
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if end > begin:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """What `one` covers and `other` does not; each is a result of this module."""
    found: list[Interval] = []
    start = 0
    for begin, end in one:
        while start < len(other) and other[start][1] <= begin:
            start += 1
        position = start
        while position < len(other) and other[position][0] < end:
            if other[position][0] > begin:
                found.append((begin, other[position][0]))
            begin = max(begin, other[position][1])
            position += 1
        if end > begin:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Time covered by disjoint intervals."""
    return sum(end - begin for begin, end in intervals)
