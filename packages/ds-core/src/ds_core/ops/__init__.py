"""Operations: one file each with its contract and plain-torch reference; `run` picks who computes.

    from ds_core import ops

    y = ops.run("rms_norm", x, weight, 1e-6)                     # the best that can run here
    y = ops.run("rms_norm", x, weight, 1e-6, impl="reference")   # by name: an error if it cannot

Each op is an operator of torch, `torch.ops.ds_ops.rms_norm`, from its first use on; each file also
has it as a typed function. Implementations register under the entry-point group `ds_core.ops`.
"""

from ds_core.ops.registry import (
    available,
    catalog,
    choose,
    define,
    get,
    implementations,
    names,
    run,
    select,
    use,
)

__all__ = [
    "available",
    "catalog",
    "choose",
    "define",
    "get",
    "implementations",
    "names",
    "run",
    "select",
    "use",
]
