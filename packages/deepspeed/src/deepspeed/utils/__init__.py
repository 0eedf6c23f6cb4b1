"""Messages, groups, access to sharded values, and small helpers."""

from __future__ import annotations

from deepspeed._names import names_of

_FRAGMENT, _LEAF = "deepspeed.utils.tensor_fragment", "deepspeed.utils.z3_leaf_module"
_INNER = "it is an inner part of the original; use the safe_get_* and safe_set_* functions"

__getattr__, __dir__ = names_of(
    __name__,
    {
        "is_initialized": "deepspeed.comm:is_initialized",
        "OnDevice": "deepspeed.utils.init_on_device:OnDevice",
        "instrument_w_nvtx": "deepspeed.utils.nvtx:instrument_w_nvtx",
        "RepeatingLoader": "deepspeed.runtime.dataloader:RepeatingLoader",
        "get_caller_func": "deepspeed.utils.comms_logging:get_caller_func",
        "get_numactl_cmd": "deepspeed.utils.numa:get_numactl_cmd",
        "recursive_getattr": "deepspeed.utils.module_utils:recursive_getattr",
        "recursive_setattr": "deepspeed.utils.module_utils:recursive_setattr",
        **{
            name: f"deepspeed.utils.logging:{name}"
            for name in ("logger", "log_dist", "log_dist_once", "set_log_level_from_string")
        },
        **{
            name: f"{_FRAGMENT}:{name}"
            for name in (
                *(
                    "safe_get_full_fp32_param",
                    "safe_get_full_grad",
                    "safe_get_full_optimizer_state",
                ),
                *("safe_set_full_fp32_param", "safe_set_full_optimizer_state"),
                *("safe_set_full_grad", "safe_get_local_fp32_param", "safe_get_local_grad"),
                *("safe_get_local_optimizer_state", "safe_set_local_fp32_param"),
                *("safe_set_local_grad", "safe_set_local_optimizer_state"),
                "safe_update_full_grad_vectorized",
            )
        },
        **{
            name: f"{_LEAF}:{name}"
            for name in (
                *("set_z3_leaf_modules", "unset_z3_leaf_modules", "get_z3_leaf_modules"),
                *("z3_leaf_module", "z3_leaf_parameter", "set_z3_leaf_module"),
                *("set_z3_leaf_modules_by_name", "set_z3_leaf_modules_by_suffix"),
            )
        },
    },
    submodules=(
        *("comms_logging", "groups", "init_on_device", "logging", "module_utils", "numa", "nvtx"),
        *("tensor_fragment", "timer", "z3_leaf_module", "zero_to_fp32", "zero_to_torch"),
    ),
    missing=dict.fromkeys(
        (
            *("get_full_hp_param", "get_hp_fragment_mapping"),
            *("fragment_address", "get_full_hp_grad", "map_to_flat_opt_states"),
            *("set_full_hp_param", "set_full_hp_grad", "link_hp_params"),
            "lazy_init_hp_params_optimizer_state",
        ),
        _INNER,
    ),
)
