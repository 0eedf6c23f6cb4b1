from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_zero.order import GatherOrder, merge

PATIENCE_S = 10.0
Schedule = list[list[list[int]]]  # passes x ranks x units in the order of need


class World:
    """Ranks as threads: exchanges and gathers block until every rank takes part."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.issued: list[list[int]] = [[] for _ in range(size)]
        self.said: list[list[object]] = [[] for _ in range(size)]
        self.num_rounds = [0] * size

    def issue(self, rank: int, unit: int) -> None:
        with self.changed:
            self.issued[rank].append(unit)
            self.changed.notify_all()

    def wait_for_gather(self, number: int) -> None:
        self._wait(lambda: all(len(log) > number for log in self.issued))

    def exchange(self, rank: int, value: object) -> list:
        with self.changed:
            number = self.num_rounds[rank]
            self.num_rounds[rank] += 1
            self.said[rank].append(value)
            self.changed.notify_all()
        self._wait(lambda: all(len(words) > number for words in self.said))
        return [words[number] for words in self.said]

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            if not self.changed.wait_for(condition, PATIENCE_S):
                raise TimeoutError("deadlock")


class Rank:
    """What the gather runtime does with a `GatherOrder`, on integers."""

    def __init__(self, world: World, rank: int, prefetch: int) -> None:
        self.world, self.rank, self.prefetch = world, rank, prefetch
        self.pending: dict[int, int] = {}
        self.order = GatherOrder(
            self.issue,
            lambda value: world.exchange(rank, value),
            lambda values: world.exchange(rank, values),
        )

    def issue(self, unit: int) -> None:
        if unit in self.pending:
            self.world.wait_for_gather(self.pending.pop(unit))
        self.pending[unit] = len(self.world.issued[self.rank])
        self.world.issue(self.rank, unit)

    def run(self, needs: list[int], key: object) -> None:
        self.order.begin(key)
        for unit in needs:
            if unit in self.pending:
                self.order.note(unit)
            else:
                self.order.need(unit)
            earlier = list(self.pending)
            self.world.wait_for_gather(self.pending.pop(unit))
            for passed in earlier[: earlier.index(unit)]:
                self.world.wait_for_gather(self.pending.pop(passed))
            while len(self.pending) < self.prefetch and self.order.ahead() is not None:
                pass
        self.order.end()
        for number in self.pending.values():
            self.world.wait_for_gather(number)
        self.pending.clear()


def simulate(schedule: Schedule, prefetch: int = 1) -> list[list[int]]:
    """Run a schedule in threads; the gathers of each pass. Fails on deadlock or disagreement."""
    world = World(len(schedule[0]))
    starts: list[list[int]] = [[] for _ in range(world.size)]
    failures: list[BaseException] = []

    def live(rank: int) -> None:
        runtime = Rank(world, rank, prefetch)
        try:
            for needs in schedule:
                starts[rank].append(len(world.issued[rank]))
                runtime.run(needs[rank], "forward")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(world.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert all(log == world.issued[0] for log in world.issued)
    edges = [*starts[0], len(world.issued[0])]
    return [world.issued[0][a:b] for a, b in itertools.pairwise(edges)]


def test_equal_passes_gather_each_unit_once():
    same = [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert simulate([same] * 4) == [[0, 1, 2, 3]] * 4


def test_changed_order_is_replayed_from_the_next_pass_on():
    old, new = [[0, 1, 2]] * 2, [[2, 0, 1]] * 2
    passes = simulate([old, old, new, new, new])
    assert passes[:2] == [[0, 1, 2]] * 2
    assert passes[-1] == [2, 0, 1]


def test_unused_units_leave_the_plan():
    passes = simulate([[[0, 1, 2, 3]] * 2, [[0, 3]] * 2, [[0, 3]] * 2])
    assert passes == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 3]]


def test_branches_are_gathered_by_all_ranks():
    passes = simulate([[[0, 1], [0, 2]]] * 3)
    assert sorted(passes[-1]) == [0, 1, 2]


def test_rank_without_any_need_serves_the_others():
    passes = simulate([[[0, 1, 2], []]] * 2)
    assert passes == [[0, 1, 2]] * 2


def test_alternating_branches_settle_on_one_plan():
    schedule = [[[0, 1 + step % 2], [0, 2 - step % 2]] for step in range(8)]
    assert all(sorted(gathers) == [0, 1, 2] for gathers in simulate(schedule)[2:])


def test_unit_needed_twice_is_gathered_twice():
    assert simulate([[[0, 1, 0]] * 2] * 2) == [[0, 1, 0]] * 2


def test_kinds_of_passes_have_plans_of_their_own():
    log: list[int] = []
    order = GatherOrder(log.append, lambda value: [value], lambda values: [values])
    for _ in range(2):
        for key, needs in (("train", [0, 1]), ("eval", [1, 0])):
            order.begin(key)
            for unit in needs:
                order.need(unit)
            order.end()
    assert log == [0, 1, 1, 0] * 2


def test_abandoned_pass_keeps_its_plan():
    log: list[int] = []
    order = GatherOrder(log.append, lambda value: [value], lambda values: [values])
    for needs in ([0, 1, 2], [0], [0, 1, 2]):
        order.begin("forward")
        for unit in needs:
            order.need(unit)
        order.abandon() if needs == [0] else order.end()
    assert log == [0, 1, 2, 0, 0, 1, 2]


needs = st.lists(st.integers(0, 5), max_size=7)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    size = draw(st.integers(1, 4))
    return draw(st.lists(st.lists(needs, min_size=size, max_size=size), min_size=1, max_size=5))


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), prefetch=st.integers(0, 3))
def test_no_schedule_of_divergent_needs_deadlocks(schedule: Schedule, prefetch: int):
    gathers = simulate(schedule, prefetch)
    for wanted, done in zip(schedule, gathers, strict=True):
        assert {unit for rank in wanted for unit in rank} <= set(done)


@pytest.mark.parametrize(
    ("traces", "merged"),
    [
        ([[0, 1, 2]] * 2, [0, 1, 2]),
        ([[0, 2], [0, 1, 2]], [0, 1, 2]),
        ([[], [3, 4]], [3, 4]),
        ([[0, 1], []], [0, 1]),
        ([[0, 1, 0], [0, 0]], [0, 1, 0]),
    ],
    ids=["equal", "insert", "from-empty", "to-empty", "twice"],
)
def test_merge_keeps_every_trace(traces: list[list[int]], merged: list[int]):
    assert merge(traces) == merged


@given(st.lists(needs, min_size=1, max_size=4))
def test_merge_contains_each_trace_in_order(traces: list[list[int]]):
    merged = merge(traces)
    for trace in traces:
        rest = iter(merged)
        assert all(unit in rest for unit in trace)
