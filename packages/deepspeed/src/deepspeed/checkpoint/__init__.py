"""Checkpoints: they are ds-core's, which load at any number of ranks as they are."""

from __future__ import annotations

from deepspeed._names import names_of

_OURS = (
    "checkpoints load at any number of ranks; ds_core.checkpoint.inspect tells what one holds, and "
    "`ds checkpoint import` reads those of the original"
)

__getattr__, __dir__ = names_of(
    __name__,
    {
        name: f"deepspeed.checkpoint.utils:{name}"
        for name in (
            *("get_layer_ckpt_name_for_rank", "get_model_ckpt_name_for_rank"),
            "get_zero_ckpt_name_for_rank",
        )
    },
    submodules=("ds_to_universal", "utils"),
    missing=dict.fromkeys(
        (
            *("DeepSpeedCheckpoint", "ZeROCheckpoint", "reshape_meg_2d_parallel"),
            *("get_model_3d_descriptor", "model_3d_desc", "merge_state"),
            *("enable_universal_checkpoint", "SubparamShape"),
        ),
        _OURS,
    ),
)
