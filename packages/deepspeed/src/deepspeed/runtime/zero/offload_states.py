"""Parking of states, which `ds_zero` does behind `offload_states` and `reload_states`."""

from __future__ import annotations

from deepspeed._names import names_of

_INSTEAD = "use offload_states() and reload_states() of the engine"

__getattr__, __dir__ = names_of(
    __name__,
    {"OffloadStateTypeEnum": "deepspeed.runtime.zero.offload_config:OffloadStateTypeEnum"},
    missing=dict.fromkeys(
        (
            *("get_state_devices", "offload_optimizer_states", "reload_optimizer_states"),
            *("offload_adam_states", "reload_adam_states"),
        ),
        _INSTEAD,
    ),
)
