"""The range of a Hessian's eigenvalues, and how they are spread in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_core.curvature.hessian import Hessian
from ds_core.errors import DsError


@dataclass(frozen=True)
class Spectrum:
    """A small tridiagonal matrix's eigenvalues, which stand for those of the Hessian.

    Attributes:
        values: in rising order; the first and last approach the Hessian's extremes from inside.
        weights: the share of the Hessian's eigenvalues near each; they sum to 1.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def lowest(self) -> float:
        """Upper bound on the smallest eigenvalue, tight after a few tens of steps."""
        return self.values[0]

    @property
    def highest(self) -> float:
        """Lower bound on the largest eigenvalue, tight after a few tens of steps."""
        return self.values[-1]


def spectrum(hessian: Hessian, *, steps: int = 30, seed: int = 0) -> Spectrum:
    """Both ends of the spectrum and its shape, by Lanczos' method with full orthogonalisation.

    Keeps one `[n]` vector per step.

    Args:
        hessian: one product is computed per step.
        steps: at least 1; all n find every distinct eigenvalue.
        seed: of the first vector, which is the same on all ranks.

    Source: Ghorbani, Krishnan & Xiao 2019, "An Investigation into Neural Net Optimization via
    Hessian Eigenvalue Density" (1901.10159), section 2.
    """
    if steps < 1:
        raise DsError(f"spectrum: steps: got {steps}, expected at least 1")
    vector = hessian.random(torch.Generator().manual_seed(seed))
    basis = [vector / vector.norm()]
    diagonals: list[float] = []
    couplings: list[float] = []
    for _ in range(min(steps, hessian.size)):
        image = hessian.product(basis[-1])
        diagonals.append(float(basis[-1] @ image))
        scale = float(image.norm())
        # Twice is enough: once leaves rounding errors that grow into copies of found eigenvalues.
        for _ in range(2):
            for earlier in basis:
                image = image - (earlier @ image) * earlier
        length = float(image.norm())
        if length <= 1e-6 * max(scale, 1e-30):  # everything that the first vector reaches is found
            break
        couplings.append(length)
        basis.append(image / length)
    size = len(diagonals)
    tridiagonal = torch.diag(torch.tensor(diagonals, dtype=torch.float64))
    for place, coupling in enumerate(couplings[: size - 1]):
        tridiagonal[place, place + 1] = tridiagonal[place + 1, place] = coupling
    values, vectors = torch.linalg.eigh(tridiagonal)
    return Spectrum(tuple(values.tolist()), tuple((vectors[0] ** 2).tolist()))
