"""The `zero_optimization` section, in the original's words."""

from __future__ import annotations

from enum import IntEnum

from deepspeed._names import names_of

ZERO_OPTIMIZATION = "zero_optimization"


class ZeroStageEnum(IntEnum):
    """What is sharded, each stage with what the ones before it shard."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


__getattr__, __dir__ = names_of(
    __name__,
    {
        "DeepSpeedZeroConfig": "ds_zero.config:ZeroSection",
        "DeepSpeedZeroLeafModuleConfig": "ds_zero.config:LeafModuleSection",
        **{
            name: f"deepspeed.runtime.zero.offload_config:{name}"
            for name in (
                *("DeepSpeedZeroOffloadOptimizerConfig", "DeepSpeedZeroOffloadParamConfig"),
                "OffloadDeviceEnum",
            )
        },
    },
    missing={"get_zero_config": "use deepspeed.runtime.config.DeepSpeedConfig(...).zero_config"},
)
