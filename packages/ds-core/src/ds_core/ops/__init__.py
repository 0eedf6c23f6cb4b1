"""Operations: one file each with its contract and plain-torch reference; `run` picks who computes.

    from ds_core import ops

    y = ops.run("rms_norm", x, weight, eps=1e-6)            # the best that can run here
    y = ops.run("rms_norm", x, weight, impl="reference")    # by name: an error if it cannot

Implementations register under the entry-point group `ds_core.ops`; none is ever chosen silently
in place of one that was asked for by name.
"""

from ds_core.ops.registry import available, catalog, run, select

__all__ = ["available", "catalog", "run", "select"]
