"""ZeRO: models built sharded, full parameters for a while, tiles, estimates."""

from __future__ import annotations

from deepspeed._names import names_of

_PARTITION = "deepspeed.runtime.zero.partition_parameters"

__getattr__, __dir__ = names_of(
    __name__,
    {
        **{
            name: f"{_PARTITION}:{name}"
            for name in (
                *("DeepSpeedTensorOverride", "GatheredParameters", "Init", "ZeroParamStatus"),
                *("ZeroParamType", "register_external_parameter", "unregister_external_parameter"),
            )
        },
        "DeepSpeedZeRoOffload": "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload",
        "TiledLinear": "deepspeed.runtime.zero.tiling:TiledLinear",
        "TiledLinearReturnBias": "deepspeed.runtime.zero.tiling:TiledLinearReturnBias",
        "unwrap_model_for_generation": (
            "deepspeed.runtime.zero.stage3:unwrap_model_for_generation"
        ),
    },
    submodules=(
        *("config", "muon", "offload_config", "offload_states", "parameter_offload"),
        *("partition_parameters", "stage3", "stage_1_and_2", "tiling", "utils"),
    ),
    missing={
        "MiCS_Init": "parameters are sharded over all data-parallel ranks; use Init with "
        "data_parallel_group",
    },
)
