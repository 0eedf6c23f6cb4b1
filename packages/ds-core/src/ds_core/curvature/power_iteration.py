"""The eigenvalue of a Hessian that is largest in magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_core.curvature.hessian import Hessian


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue and how well it is known.

    Attributes:
        value: signed; negative where the loss curves down most.
        vector: `[n]`, of length 1.
        iterations: products that it took.
        converged: whether the last one changed the value by less than the tolerance.
    """

    value: float
    vector: torch.Tensor
    iterations: int
    converged: bool


def top_eigenvalue(
    hessian: Hessian,
    *,
    max_iter: int = 100,
    tol: float = 1e-2,
    stability: float = 1e-6,
    seed: int = 0,
) -> Eigenpair:
    """The eigenvalue of largest magnitude, by power iteration.

    Args:
        hessian: one product is computed per iteration.
        max_iter: iterations at most, at least 1.
        tol: relative change of the value at which it has converged.
        stability: added to lengths that are divided by.
        seed: of the first vector, which is the same on all ranks.

    Source: Yao et al. 2020, "PyHessian" (1912.07145), algorithm 2.
    """
    vector = hessian.random(torch.Generator().manual_seed(seed))
    vector = vector / (vector.norm() + stability)
    value, converged, iteration = 0.0, False, 0
    for iteration in range(1, max_iter + 1):
        image = hessian.product(vector)
        before, value = value, float(vector @ image)
        length = image.norm()
        if float(length) <= stability:  # flat in every direction that is left
            return Eigenpair(0.0, vector, iteration, True)
        if iteration > 1 and abs(value - before) <= tol * (abs(before) + stability):
            converged = True
            break
        vector = image / (length + stability)
    return Eigenpair(value, vector, iteration, converged)
