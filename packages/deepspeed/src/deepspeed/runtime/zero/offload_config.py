"""Where states live, in the original's words."""

from __future__ import annotations

from enum import StrEnum

from deepspeed._names import names_of


class OffloadDeviceEnum(StrEnum):
    """Homes of what is offloaded."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(StrEnum):
    """What `offload_states` can park (`ds_zero.ZeroOptimizer.offload_states`)."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


__getattr__, __dir__ = names_of(
    __name__,
    {
        "DeepSpeedZeroOffloadParamConfig": "ds_zero.config:OffloadParamSection",
        "DeepSpeedZeroOffloadOptimizerConfig": "ds_zero.config:OffloadOptimizerSection",
    },
)
