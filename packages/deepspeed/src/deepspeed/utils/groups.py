"""Which ranks share what: by the original's functions, over the mpu or DeviceMesh of a program.

Without either all ranks are data-parallel, as in every job of ds-zero alone. `initialize` of this
package sets `mpu` and `mesh_device` when a program passes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from deepspeed._errors import NotProvidedError
from deepspeed._names import names_of
from deepspeed.comm._groups import get_world_group, require_world

#: The object with Megatron's functions that the program passed to `initialize`, if any.
mpu: Any = None
#: The DeviceMesh with dimensions data_parallel and sequence_parallel, if any.
mesh_device: Any = None

_NO_EXPERTS = "ds-moe will bring mixtures of experts"
_NO_TP = "ds-pipe will bring tensor parallelism; pass an mpu to deepspeed.initialize"


def _asked(function: str) -> Any:
    """A function of the mpu, None if there is none of this name."""
    return None if mpu is None else getattr(mpu, function, None)


def _along(dimension: str) -> dist.ProcessGroup | None:
    if mesh_device is None or dimension not in (mesh_device.mesh_dim_names or ()):
        return None
    group: dist.ProcessGroup = mesh_device.get_group(mesh_dim=dimension)
    return group


def _get_data_parallel_group() -> dist.ProcessGroup:
    """The ranks that see different data and hold the same model."""
    require_world()
    ask = _asked("get_data_parallel_group")
    group: dist.ProcessGroup | None = _along("data_parallel") or (ask() if ask else None)
    return get_world_group() if group is None else group


def _get_data_parallel_world_size() -> int:
    """How many they are."""
    return dist.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank() -> int:
    """This process's rank among them."""
    return dist.get_rank(_get_data_parallel_group())


def _get_data_parallel_group_ranks() -> Sequence[int]:
    """Their global ranks."""
    return list(dist.get_process_group_ranks(_get_data_parallel_group()))


def _get_broadcast_src_rank() -> int:
    """The global rank of the first of those who hold the same model."""
    return dist.get_process_group_ranks(_get_sequence_data_parallel_group())[0]


def _get_sequence_parallel_group() -> dist.ProcessGroup:
    """The ranks that share each sequence. Raises NotProvidedError if nobody made such a group."""
    ask = _asked("get_sequence_parallel_group")
    group: dist.ProcessGroup | None = ask() if ask else _along("sequence_parallel")
    if group is None:
        raise NotProvidedError(
            "there is no sequence-parallel group: ds-pipe will bring sequence parallelism; pass "
            "deepspeed.initialize an mpu that has one, or mesh_param=(data, sequence)"
        )
    return group


def _get_sequence_parallel_world_size() -> int:
    """How many share each sequence; 1 without such a group."""
    ask = _asked("get_sequence_parallel_world_size")
    if ask is not None:
        return int(ask())
    group = _along("sequence_parallel")
    return 1 if group is None else dist.get_world_size(group)


def _get_sequence_parallel_rank() -> int:
    """This process's rank among them; 0 without such a group."""
    ask = _asked("get_sequence_parallel_rank")
    if ask is not None:
        return int(ask())
    group = _along("sequence_parallel")
    return 0 if group is None else dist.get_rank(group)


def _get_sequence_data_parallel_group() -> dist.ProcessGroup:
    """The ranks along both dimensions: those over which ZeRO shards."""
    ask = _asked("get_sequence_data_parallel_group")
    group: dist.ProcessGroup | None = ask() if ask else None
    return _get_data_parallel_group() if group is None else group


def _get_sequence_data_parallel_world_size() -> int:
    """How many they are."""
    return dist.get_world_size(_get_sequence_data_parallel_group())


def _get_sequence_data_parallel_rank() -> int:
    """This process's rank among them."""
    return dist.get_rank(_get_sequence_data_parallel_group())


def _get_model_parallel_world_size() -> int:
    """Ranks that hold one copy of the model together; 1 without an mpu."""
    ask = _asked("get_model_parallel_world_size") or _asked("get_tensor_model_parallel_world_size")
    return int(ask()) if ask else 1


def get_model_parallel_world_size() -> int:
    """The same as `_get_model_parallel_world_size`."""
    return _get_model_parallel_world_size()


def get_tensor_model_parallel_world_size() -> int:
    """The same as `_get_model_parallel_world_size`."""
    return _get_model_parallel_world_size()


def get_model_parallel_rank() -> int:
    """This process's rank among those that hold one copy of the model; 0 without an mpu."""
    ask = _asked("get_model_parallel_rank") or _asked("get_tensor_model_parallel_rank")
    return int(ask()) if ask else 0


def get_tensor_model_parallel_rank() -> int:
    """The same as `get_model_parallel_rank`."""
    return get_model_parallel_rank()


def get_model_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold one copy of the model. Raises NotProvidedError without an mpu."""
    ask = _asked("get_model_parallel_group") or _asked("get_tensor_model_parallel_group")
    if ask is None:
        raise NotProvidedError(f"there is no model-parallel group: {_NO_TP}")
    group: dist.ProcessGroup = ask()
    return group


def get_tensor_model_parallel_group() -> dist.ProcessGroup:
    """The same as `get_model_parallel_group`."""
    return get_model_parallel_group()


def get_data_parallel_group() -> dist.ProcessGroup:
    """The same as `_get_data_parallel_group`."""
    return _get_data_parallel_group()


def get_data_parallel_world_size() -> int:
    """The same as `_get_data_parallel_world_size`."""
    return _get_data_parallel_world_size()


def get_data_parallel_rank() -> int:
    """The same as `_get_data_parallel_rank`."""
    return _get_data_parallel_rank()


def _clone_world_group() -> dist.ProcessGroup:
    """The process group of all ranks."""
    return get_world_group()


def _get_expert_model_parallel_world_size() -> int:
    """1: experts are not divided."""
    return 1


def _get_expert_parallel_group_dict() -> dict[str, dist.ProcessGroup]:
    """Empty: there are no experts."""
    return {}


def _get_expert_data_parallel_group_dict() -> dict[str, dist.ProcessGroup]:
    """Empty: there are no experts."""
    return {}


__getattr__, _dir = names_of(
    __name__,
    {},
    missing={
        **dict.fromkeys(
            (
                *("initialize", "_create_expert_and_data_parallel", "_get_max_expert_size"),
                *("_create_expert_data_and_model_parallel", "_get_expert_parallel_ranks"),
                *("_get_max_expert_size_name", "_get_max_expert_parallel_group"),
                *("_get_expert_parallel_group", "_get_expert_parallel_group_ranks"),
                *("_get_expert_data_parallel_group", "_get_expert_data_parallel_group_ranks"),
                *("_get_expert_broadcast_src_rank", "_get_expert_parallel_world_size"),
                *("_get_expert_data_parallel_world_size", "_get_expert_parallel_rank"),
                *("_get_expert_parallel_src_rank", "_get_expert_data_parallel_rank"),
                "_get_local_all_to_all_group",
            ),
            _NO_EXPERTS,
        ),
        **dict.fromkeys(
            (
                *("set_tensor_model_parallel_world_size", "set_tensor_model_parallel_rank"),
                *("get_tensor_model_parallel_src_rank", "_create_model_parallel"),
                *("_init_tp_groups_with_new_group", "_init_tp_mesh_device"),
            ),
            _NO_TP,
        ),
        **dict.fromkeys(
            (
                *("_create_zero_param_parallel_group", "_get_zero_param_intra_parallel_group"),
                *("_zero_param_parallel_is_initialized",),
                "_get_zero_param_intra_parallel_rank_in_mygroup",
                "_get_zero_param_intra_parallel_group_world_size",
                "_get_zero_param_intra_parallel_group_ranks",
            ),
            'set "zero_hpz_partition_size" in zero_optimization, where ds-zero has it',
        ),
    },
)
