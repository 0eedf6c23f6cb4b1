"""A cost model of a machine that corrects itself with every run.

    t(point) = (sum over resources j of exp(w_j) f_j(point)) * exp(sum over knobs of e_k x_k(point))

f_j are seconds per sample by the planner's figures (arithmetic, wire, messages, update, ...), w_j
how wrong these are on this machine, e_k what a knob does beside them. Both have Gaussian priors
around 0; the most probable values are found by Gauss-Newton, and the curvature there says how sure
they are (Laplace's approximation). Source: Bishop 2006, "Pattern recognition and machine
learning", sections 3.3 and 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Standard deviations: of a resource's log error, of a knob's own effect, of a run's log time.
_RESOURCE_SD, _KNOB_SD, _NOISE_SD = 1.5, 0.12, 0.03
_ITERATIONS = 30


class Surrogate:
    """Predicts the cost of every point of a space.

    Args:
        resources: `[points, resources]`, seconds per sample that each resource takes.
        knobs: `[points, features]`, what distinguishes points beside them.
    """

    def __init__(self, resources: Array, knobs: Array) -> None:
        self._resources = np.maximum(resources, 1e-15)
        self._knobs = knobs
        count = resources.shape[1] + knobs.shape[1]
        deviations = [_RESOURCE_SD] * resources.shape[1] + [_KNOB_SD] * knobs.shape[1]
        self._precision = np.diag(1.0 / np.square(np.array(deviations)))
        self._weights = np.zeros(count)
        self._covariance = np.linalg.inv(self._precision)

    def fit(self, points: Sequence[int], costs: Sequence[float]) -> None:
        """Correct the model by measured costs (seconds per sample) of some points."""
        chosen = list(points)
        if not chosen:
            return
        target = np.log(np.array(costs))
        weights = np.zeros_like(self._weights)
        # One factor for all: how fast this machine is at anything.
        level = target - np.log(self._resources[chosen].sum(axis=1))
        weights[: self._resources.shape[1]] = np.median(level)
        center = weights.copy()
        hessian = self._precision
        for _ in range(_ITERATIONS):
            predicted, jacobian = self._log_cost(chosen, weights)
            hessian = jacobian.T @ jacobian / _NOISE_SD**2 + self._precision
            gradient = jacobian.T @ (target - predicted) / _NOISE_SD**2
            gradient -= self._precision @ (weights - center)
            step = np.clip(np.linalg.solve(hessian, gradient), -1.0, 1.0)
            weights = weights + step
            if float(np.abs(step).max()) < 1e-6:
                break
        self._weights = weights
        self._covariance = np.linalg.inv(hessian)

    def predict(self) -> tuple[Array, Array]:
        """The log cost of every point, and its standard deviation."""
        everything = list(range(len(self._resources)))
        mean, jacobian = self._log_cost(everything, self._weights)
        variance = np.einsum("pi,ij,pj->p", jacobian, self._covariance, jacobian)
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def _log_cost(self, points: list[int], weights: Array) -> tuple[Array, Array]:
        split = self._resources.shape[1]
        parts = self._resources[points] * np.exp(weights[:split])
        total = parts.sum(axis=1)
        mean = np.log(total) + self._knobs[points] @ weights[split:]
        return mean, np.concatenate([parts / total[:, None], self._knobs[points]], axis=1)


def knob_features(values: Sequence[Sequence[object]]) -> Array:
    """One column per value of each knob that has several: 1 where a point has it.

    Args:
        values: per point, its values in the order of the knobs.
    """
    columns = []
    for knob in zip(*values, strict=True):
        levels = list(dict.fromkeys(knob))
        if len(levels) > 1:
            columns += [[float(value == level) for value in knob] for level in levels]
    return np.array(columns).T if columns else np.zeros((len(values), 0))
