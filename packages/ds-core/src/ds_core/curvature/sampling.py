"""Trace and diagonal of a Hessian, from products with random signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_core.curvature.hessian import Hessian
from ds_core.errors import DsError


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        value: the mean.
        standard_error: of that mean; nan for a single sample.
    """

    value: float
    standard_error: float


def trace(hessian: Hessian, *, samples: int = 32, seed: int = 0) -> Estimate:
    """The sum of all eigenvalues, estimated; exact where the Hessian is diagonal.

    Args:
        hessian: one product is computed per sample.
        samples: at least 1.
        seed: of the vectors, which are the same on all ranks.

    Source: Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix".
    """
    generator = _seeded(samples, seed)
    values = []
    for _ in range(samples):
        signs = hessian.random(generator, signs=True)
        values.append(float(signs @ hessian.product(signs)))
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std() / samples**0.5) if samples > 1 else float("nan")
    return Estimate(float(found.mean()), error)


def diagonal(hessian: Hessian, *, samples: int = 32, seed: int = 0) -> torch.Tensor:
    """The diagonal `[n]`, estimated; exact where the Hessian is diagonal.

    Args: as of `trace`.

    Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix", section 2.
    """
    generator = _seeded(samples, seed)
    total = torch.zeros(hessian.size, dtype=hessian.dtype, device=hessian.device)
    for _ in range(samples):
        signs = hessian.random(generator, signs=True)
        total += signs * hessian.product(signs)
    return total / samples


def _seeded(samples: int, seed: int) -> torch.Generator:
    if samples < 1:
        raise DsError(f"samples: got {samples}, expected at least 1")
    return torch.Generator().manual_seed(seed)
