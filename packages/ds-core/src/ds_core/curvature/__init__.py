"""Curvature of a loss: products with its Hessian, and what they tell, without ever forming it.

from ds_core import curvature

with curvature.twice_differentiable():
    loss = loss_of(model(batch))
hessian = curvature.Hessian(loss, block.parameters())
print(curvature.top_eigenvalue(hessian).value, curvature.trace(hessian).value)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "Eigenpair": "ds_core.curvature.power_iteration",
    "Estimate": "ds_core.curvature.sampling",
    "Hessian": "ds_core.curvature.hessian",
    "Spectrum": "ds_core.curvature.lanczos",
    "diagonal": "ds_core.curvature.sampling",
    "spectrum": "ds_core.curvature.lanczos",
    "top_eigenvalue": "ds_core.curvature.power_iteration",
    "trace": "ds_core.curvature.sampling",
    "twice_differentiable": "ds_core.curvature.hessian",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
