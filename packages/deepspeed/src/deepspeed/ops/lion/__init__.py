"""Lion in one pass, on the host and on the device."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "DeepSpeedCPULion": "deepspeed.ops.lion.cpu_lion:DeepSpeedCPULion",
        "FusedLion": "deepspeed.ops.lion.fused_lion:FusedLion",
    },
    submodules=("cpu_lion", "fused_lion"),
)
