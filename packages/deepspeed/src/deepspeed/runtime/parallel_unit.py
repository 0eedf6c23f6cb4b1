"""The objects by which a program describes its parallelism: Megatron's `mpu`, and device meshes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepspeed._errors import NotProvidedError

#: What an `mpu` may be asked for, under the names that Megatron has had, and who will bring it.
_SIZES = {
    "get_model_parallel_world_size": ("tensor parallelism", "ds-pipe"),
    "get_tensor_model_parallel_world_size": ("tensor parallelism", "ds-pipe"),
    "get_pipe_parallel_world_size": ("pipelines", "ds-pipe"),
    "get_pipeline_model_parallel_world_size": ("pipelines", "ds-pipe"),
    "get_sequence_parallel_world_size": ("sequence parallelism", "ds-pipe"),
    "get_expert_model_parallel_world_size": ("expert parallelism", "ds-moe"),
}


def check_unit(mpu: Any) -> None:
    """Raise NotProvidedError unless an `mpu` describes data parallelism over all ranks alone."""
    if mpu is None:
        return
    for method, (feature, package) in _SIZES.items():
        ask = getattr(mpu, method, None)
        size = 1 if ask is None else int(ask())
        if size > 1:
            raise NotProvidedError(
                f"mpu: {method}() is {size}, and {feature} is not provided yet ({package} will "
                f"bring it); shard over all ranks with ZeRO stage 3 and leave mpu out"
            )
    ask = getattr(mpu, "get_data_parallel_world_size", None)
    if ask is not None and int(ask()) != dist.get_world_size():
        raise NotProvidedError(
            f"mpu: get_data_parallel_world_size() is {int(ask())} of {dist.get_world_size()} "
            f"ranks; data parallelism over a part of the ranks is not provided: leave mpu out"
        )


def check_mesh(mesh_param: Any) -> None:
    """Raise NotProvidedError if a (data parallel, sequence parallel) mesh asks for the second."""
    if mesh_param and len(mesh_param) > 1 and int(mesh_param[1]) > 1:
        raise NotProvidedError(
            f"mesh_param: got {tuple(mesh_param)}, and sequence parallelism is not provided yet "
            f"(ds-pipe will bring it); leave mesh_param out"
        )


def data_ranks(mpu: Any, mesh_device: Any = None) -> int:
    """Ranks that have a batch of their own: all of them, once what is passed has been checked."""
    check_unit(mpu)
    if mesh_device is not None and mesh_device.ndim > 1:
        check_mesh(tuple(mesh_device.shape))
    return dist.get_world_size()
