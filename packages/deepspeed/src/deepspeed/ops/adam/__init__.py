"""Adam in one pass, on the host and on the device."""

from __future__ import annotations

from deepspeed._names import names_of

_ZENFLOW = 'set "zenflow" in zero_optimization: it updates what matters with the optimizer given'

__getattr__, __dir__ = names_of(
    __name__,
    {
        "DeepSpeedCPUAdam": "deepspeed.ops.adam.cpu_adam:DeepSpeedCPUAdam",
        "FusedAdam": "deepspeed.ops.adam.fused_adam:FusedAdam",
    },
    submodules=("cpu_adam", "fused_adam"),
    missing=dict.fromkeys(
        ("ZenFlowCPUAdam", "ZenFlowSelectiveAdamW", "ZenFlowSelectiveAdamW_stage3"), _ZENFLOW
    ),
)
