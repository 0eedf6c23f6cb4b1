"""Which points to run, and for how long: few short runs, then the best again, longer.

Successive halving on a shortlist. The first rung is chosen one by one, by the cost model that each
run corrects; each next rung runs the better half of the last with twice the steps. Source: Jamieson
and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization",
algorithm 1; the shortlist's rule is a lower confidence bound (Srinivas et al. 2010).

Integers and callables only: it does not know what a run is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ds_core.tuning.surrogate import Array, Surrogate

#: Part of the runs that the first rung may take; the rest is for the finalists.
_FIRST_RUNG = 0.6
#: How much uncertainty makes a point attractive.
_CURIOSITY = 0.7


@dataclass(frozen=True)
class Run:
    """One run of one point.

    Attributes:
        point: its index.
        steps: measured steps.
        cost: what is to be small, such as seconds per sample; None: it failed.
        rung: 0 for the first look, 1 and up for finalists.
    """

    point: int
    steps: int
    cost: float | None
    rung: int


@dataclass(frozen=True)
class Search:
    """What to spend.

    Attributes:
        budget: runs in all.
        steps: measured steps of a first run.
        strategy: "model_based" as described above; "gridsearch" or "random": every point in
            order, or at random, until the budget is spent.
        patience: runs without improvement after which no new point is tried; 0: no limit.
        seed: of the random strategy.
    """

    budget: int
    steps: int
    strategy: Literal["model_based", "gridsearch", "random"] = "model_based"
    patience: int = 5
    seed: int = 0

    def run(
        self, surrogate: Surrogate, count: int, measure: Callable[[int, int], float | None]
    ) -> list[Run]:
        """Measure until the budget is spent; returns every run, in order.

        Args:
            surrogate: predicts the cost of each of `count` points.
            count: number of points.
            measure: runs a point for some steps and returns its cost, None if it fails.
        """
        if self.strategy == "model_based":
            return self._halve(surrogate, count, measure)
        order = list(range(count))
        if self.strategy == "random":
            random.Random(self.seed).shuffle(order)
        runs: list[Run] = []
        for point in order[: self.budget]:
            runs.append(Run(point, self.steps, measure(point, self.steps), 0))
            if self._has_stalled(runs):
                break
        return runs

    def _halve(
        self, surrogate: Surrogate, count: int, measure: Callable[[int, int], float | None]
    ) -> list[Run]:
        first = min(count, max(1, math.ceil(self.budget * _FIRST_RUNG)))
        runs: list[Run] = []
        while len(runs) < first and not self._has_stalled(runs):
            point = _most_promising(surrogate, {run.point for run in runs})
            runs.append(Run(point, self.steps, measure(point, self.steps), 0))
            good = [run for run in runs if run.cost is not None]
            surrogate.fit([r.point for r in good], [r.cost for r in good if r.cost is not None])
            if first < count and len(good) < min(2, len(runs)):
                first = min(count, self.budget, first + 1)  # a failure tells little
        steps, rung = self.steps, 0
        finalists = _ranked(runs)
        while len(finalists) > 1 and len(runs) < self.budget:
            steps, rung = steps * 2, rung + 1
            finalists = finalists[: max(2, math.ceil(len(finalists) / 2))]
            for point in finalists[: self.budget - len(runs)]:
                runs.append(Run(point, steps, measure(point, steps), rung))
            finalists = _ranked(runs)[: len(finalists) - 1]
        return runs

    def _has_stalled(self, runs: Sequence[Run]) -> bool:
        costs = [math.inf if run.cost is None else run.cost for run in runs]
        if self.patience == 0 or len(costs) <= self.patience:
            return False
        return min(costs[-self.patience :]) >= min(costs[: -self.patience])


def best_point(runs: Sequence[Run]) -> int | None:
    """The point with the lowest cost, its runs weighted by their steps; None if all failed."""
    ranked = _ranked(runs)
    return ranked[0] if ranked else None


def _ranked(runs: Sequence[Run]) -> list[int]:
    """Points that ran, best first. One that failed in any run is left out."""
    failed = {run.point for run in runs if run.cost is None}
    totals: dict[int, tuple[float, int]] = {}
    for run in runs:
        if run.cost is not None and run.point not in failed:
            weighted, steps = totals.get(run.point, (0.0, 0))
            totals[run.point] = (weighted + run.cost * run.steps, steps + run.steps)
    # Those seen longer come before those that an early look left behind.
    last = {run.point: run.rung for run in runs}
    return sorted(totals, key=lambda point: (-last[point], totals[point][0] / totals[point][1]))


def _most_promising(surrogate: Surrogate, tried: set[int]) -> int:
    mean, deviation = surrogate.predict()
    bound: Array = mean - _CURIOSITY * deviation if tried else mean
    order = sorted(range(len(bound)), key=lambda index: float(bound[index]))
    return next(index for index in order if index not in tried)
