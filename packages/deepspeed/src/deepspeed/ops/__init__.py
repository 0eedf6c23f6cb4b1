"""Optimizers that step in one pass over memory: `ds_ops.optim` by the original's names."""

from __future__ import annotations

from deepspeed._names import names_of

_FUSED = "use torch.nn.functional.scaled_dot_product_attention and torch.compile"

__getattr__, __dir__ = names_of(
    __name__,
    {},
    submodules=("adagrad", "adam", "lamb", "lion"),
    missing={
        "transformer": _FUSED,
        "DeepSpeedTransformerLayer": _FUSED,
        "DeepSpeedTransformerConfig": _FUSED,
        "fp_quantizer": "use ds_ops.weight_only",
        "op_builder": "operators are built at first use: `ds ops list` shows them",
        "__compatible_ops__": "operators are built at first use: `ds ops list` shows them",
    },
)
