"""Optimizers that step in one pass over memory, and kernels: `ds_ops` by the original's names."""

from __future__ import annotations

from deepspeed._names import names_of

_LAYER = "deepspeed.ops.transformer.transformer"

__getattr__, __dir__ = names_of(
    __name__,
    {
        "DeepSpeedTransformerConfig": f"{_LAYER}:DeepSpeedTransformerConfig",
        "DeepSpeedTransformerLayer": f"{_LAYER}:DeepSpeedTransformerLayer",
    },
    submodules=(
        *("adagrad", "adam", "deepspeed4science", "fp_quantizer", "lamb", "lion", "op_builder"),
        "sparse_attention",
        "transformer",
    ),
    missing={
        "__compatible_ops__": "operators are built at first use: `ds ops report` lists them",
    },
)
