"""Optimizers that step in one pass over memory, and sparse attention: ds_ops by original names."""

from __future__ import annotations

from deepspeed._absent import FUSED_LAYERS
from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {},
    submodules=(
        *("adagrad", "adam", "fp_quantizer", "lamb", "lion", "op_builder", "sparse_attention"),
        "transformer",
    ),
    missing={
        "DeepSpeedTransformerLayer": FUSED_LAYERS,
        "DeepSpeedTransformerConfig": FUSED_LAYERS,
        "__compatible_ops__": "operators are built at first use: `ds ops report` lists them",
    },
)
