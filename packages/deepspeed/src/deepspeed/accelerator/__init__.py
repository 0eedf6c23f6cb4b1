"""The device of this process, by the original's methods: `get_accelerator()`."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "get_accelerator": "deepspeed.accelerator.real_accelerator:get_accelerator",
        "set_accelerator": "deepspeed.accelerator.real_accelerator:set_accelerator",
        "is_current_accelerator_supported": (
            "deepspeed.accelerator.real_accelerator:is_current_accelerator_supported"
        ),
        "DeepSpeedAccelerator": ("deepspeed.accelerator.abstract_accelerator:DeepSpeedAccelerator"),
    },
    submodules=("abstract_accelerator", "real_accelerator"),
)
