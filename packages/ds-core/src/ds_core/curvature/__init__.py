"""Curvature of a loss: products with its Hessian, and what they tell, without ever forming it.

from ds_core import curvature

with curvature.twice_differentiable():
    loss = loss_of(model(batch))
hessian = curvature.Hessian(loss, block.parameters())
print(curvature.top_eigenvalue(hessian).value, curvature.trace(hessian).value)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._lazy import lazy_names

if TYPE_CHECKING:
    from ds_core.curvature.hessian import Hessian, twice_differentiable
    from ds_core.curvature.lanczos import Spectrum, spectrum
    from ds_core.curvature.power_iteration import Eigenpair, top_eigenvalue
    from ds_core.curvature.sampling import Estimate, diagonal, trace

__all__ = [
    "Eigenpair",
    "Estimate",
    "Hessian",
    "Spectrum",
    "diagonal",
    "spectrum",
    "top_eigenvalue",
    "trace",
    "twice_differentiable",
]

# Reading a config imports the section beside these, and must stay light.
_LAZY = {
    "Eigenpair": "power_iteration",
    "Estimate": "sampling",
    "Hessian": "hessian",
    "Spectrum": "lanczos",
    "diagonal": "sampling",
    "spectrum": "lanczos",
    "top_eigenvalue": "power_iteration",
    "trace": "sampling",
    "twice_differentiable": "hessian",
}

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
