"""How much of the communication is hidden under compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_core.tracing.intervals import (
    Interval,
    difference,
    intersection,
    length,
    union,
)
from ds_core.tracing.lanes import COMMUNICATION, RankTrace, Slice


@dataclass(frozen=True)
class Overlap:
    """One rank in one step; times in microseconds.

    Attributes:
        rank: global rank.
        step: name of the step.
        step_us: how long it took.
        compute_us: computing; where operations were not recorded, phases less waits.
        gather_us, reduce_us, other_us: with at least one such message under way.
        gather_hidden_us, reduce_hidden_us, other_hidden_us: of these, while computing.
        communication_us: with any message under way.
        hidden_us: of that, while computing.
        wait_us: blocked until a message arrived (on a device: messages and no compute).
        idle_us: neither computing nor communicating: Python, data, the optimizer's bookkeeping.
    """

    rank: int
    step: str
    step_us: float
    compute_us: float
    gather_us: float
    gather_hidden_us: float
    reduce_us: float
    reduce_hidden_us: float
    other_us: float
    other_hidden_us: float
    communication_us: float
    hidden_us: float
    wait_us: float
    idle_us: float

    @property
    def hidden_share(self) -> float:
        """Part of the communication that is hidden; 1 if there is none."""
        return self.hidden_us / self.communication_us if self.communication_us else 1.0


@dataclass(frozen=True)
class Wait:
    """What one rank waited for, in total."""

    rank: int
    name: str
    count: int
    wait_us: float


def steps_of(trace: RankTrace) -> list[Slice]:
    """The steps of a rank in order; all that it recorded, as one, if no step was marked."""
    steps = sorted(trace.on("step"), key=lambda each: each.begin_us)
    if steps or not trace.slices:
        return steps
    begin = min(each.begin_us for each in trace.slices)
    end = max(each.end_us for each in trace.slices)
    return [Slice("step", "whole recording", begin, end)]


def covered(slices: Iterable[Slice], *, gap: float = 0.0) -> list[Interval]:
    """The times that slices cover."""
    return union(((each.begin_us, each.end_us) for each in slices), gap=gap)


def computing(trace: RankTrace) -> list[Interval]:
    """When the rank computed, as `Overlap` means it."""
    phases = (each for each in trace.on("phase") if each.name != "data")
    busy = covered(trace.on("compute") if trace.has_ops else phases)
    return difference(busy, covered(trace.on("wait")))


def overlap_of(trace: RankTrace) -> list[Overlap]:
    """Figures of each step of one rank."""
    compute = computing(trace)
    lanes = {lane: covered(trace.on(lane)) for lane in COMMUNICATION}
    on_device = any(True for _ in trace.on("host"))
    waits = covered(trace.on("wait"))
    found = []
    for step in steps_of(trace):
        window: list[Interval] = [(step.begin_us, step.end_us)]
        busy = intersection(compute, window)
        within = {lane: intersection(times, window) for lane, times in lanes.items()}
        messages = union(times for lane in within.values() for times in lane)
        exposed = difference(messages, busy)
        times = {f"{lane}_us": length(each) for lane, each in within.items()}
        hidden = {
            f"{lane}_hidden_us": length(intersection(each, busy)) for lane, each in within.items()
        }
        found.append(
            Overlap(
                rank=trace.rank,
                step=step.name,
                step_us=length(window),
                compute_us=length(busy),
                communication_us=length(messages),
                hidden_us=length(messages) - length(exposed),
                wait_us=length(exposed if on_device else intersection(waits, window)),
                idle_us=length(difference(difference(window, busy), messages)),
                **times,
                **hidden,
            )
        )
    return found


def longest_waits(traces: Iterable[RankTrace], number: int = 8) -> list[Wait]:
    """What ranks waited for most, in total over what was recorded."""
    totals: dict[tuple[int, str], list[float]] = {}
    for trace in traces:
        for each in trace.on("wait"):
            totals.setdefault((trace.rank, each.name), []).append(each.end_us - each.begin_us)
    found = [Wait(rank, name, len(us), sum(us)) for (rank, name), us in totals.items()]
    return sorted(found, key=lambda wait: -wait.wait_us)[:number]
