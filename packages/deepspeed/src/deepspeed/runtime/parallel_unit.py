"""The objects by which a program describes its parallelism: Megatron's `mpu`, and device meshes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from deepspeed._errors import NotProvidedError
from deepspeed.comm._world import initialize_mesh_device
from deepspeed.utils import groups

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


def check_mesh(shape: Sequence[int], name: str = "mesh_param") -> None:
    """Raise NotProvidedError unless a mesh is of data parallelism alone, over all ranks.

    Args:
        shape: data-parallel and sequence-parallel ranks.
        name: of the argument, or of the keys, that ask for it.
    """
    given, world = tuple(int(size) for size in shape), dist.get_world_size()
    if len(given) == 2 and given[1] > 1:
        raise NotProvidedError(
            f"{name}: got {given}, and sequence parallelism is not provided yet (ds-pipe will "
            f"bring it); leave it out"
        )
    if given != (world, 1):
        raise NotProvidedError(
            f"{name}: got {given}, expected (data-parallel ranks, sequence-parallel ranks), and "
            f"all {world} ranks are data-parallel; give ({world}, 1) or leave it out"
        )


def mesh_of(mesh_param: Sequence[int] | None, config: Mapping[str, Any]) -> DeviceMesh | None:
    """The DeviceMesh that a program asks for, by an argument or by keys of its configuration.

    Its dimensions are data_parallel and sequence_parallel. Collective if it is asked for.
    """
    keys = ("data_parallel_size", "sequence_parallel_size")
    if not mesh_param and not all(key in config for key in keys):
        return None
    shape = tuple(mesh_param or (config[key] for key in keys))
    check_mesh(shape, "mesh_param" if mesh_param else ", ".join(keys))
    return initialize_mesh_device(shape, ("data_parallel", "sequence_parallel"))


def name_groups(mpu: Any, mesh_device: DeviceMesh | None) -> None:
    """Let `deepspeed.utils.groups` answer for the unit or mesh of the engine that is made."""
    if mpu is not None:
        groups.mpu = mpu
    if mesh_device is not None:
        groups.mesh_device = mesh_device


def data_ranks(mpu: Any, mesh_device: Any = None) -> int:
    """Ranks that have a batch of their own: all of them, once what is passed has been checked."""
    check_unit(mpu)
    if mesh_device is not None and mesh_device.ndim > 1:
        check_mesh(tuple(mesh_device.shape))
    return dist.get_world_size()
