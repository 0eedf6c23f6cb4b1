"""Starting and ending the process group, by the original's signatures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepspeed.comm import _groups, _log
from ds_core import accelerator, comm
from ds_core.comm.discovery import DEFAULT_PORT, find_world
from ds_core.errors import CommError


def is_available() -> bool:
    """Whether this build of torch has torch.distributed."""
    return dist.is_available()


def is_initialized() -> bool:
    """True once torch's default process group exists, whoever started it."""
    return comm.is_initialized()


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch's default process group unless it is running already.

    Args:
        dist_backend: "gloo", "nccl", ...; default: the accelerator's own.
        auto_mpi_discovery: makes no difference: torchrun's variables come first, then those of
            MPI and Slurm; with none of them this is a world of one.
        distributed_port: where rank 0 listens under MPI or Slurm, unless MASTER_PORT says it.
        verbose: makes no difference.
        timeout: after which a collective that cannot complete is an error; default:
            DEEPSPEED_TIMEOUT minutes, else ten.
        init_method: a URL of torch.distributed where the ranks meet, instead of the environment.
        dist_init_required: False: raise CommError if it is not running already.
        config: a config whose "comms_logger" sets up `log_summary`.
        rank, world_size: with init_method; -1: the environment's.

    Under MPI and Slurm torchrun's variables are set too, for programs that read LOCAL_RANK.
    """
    if config is not None:
        _log.configure(deepspeed_config=config)
    if dist_init_required is False and not is_initialized():
        raise CommError(
            "dist_init_required: got False, but there is no process group yet: call "
            "deepspeed.init_distributed() before, or leave it out"
        )
    if is_initialized():
        return
    port = None if distributed_port == DEFAULT_PORT else distributed_port
    comm.init(
        dist_backend,
        timeout_s=None if timeout is None else timeout.total_seconds(),
        port=port,
        init_method=init_method,
        rank=None if rank < 0 else rank,
        world_size=None if world_size < 0 else world_size,
    )
    _tell_the_program(port)


def _tell_the_program(port: int | None) -> None:
    """torchrun's variables, where somebody else started the ranks."""
    world = find_world(os.environ, port=port)
    if world is None or world.source == "torchrun":
        return
    for name, value in (
        ("RANK", world.rank),
        ("WORLD_SIZE", world.size),
        ("LOCAL_RANK", world.local_rank),
        ("MASTER_ADDR", world.host or ""),
        ("MASTER_PORT", world.port),
    ):
        os.environ.setdefault(name, str(value))


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """End a process group; by default all."""
    ends_all = group is None or group is dist.group.WORLD
    _groups.forget(None if ends_all else group)
    dist.destroy_process_group(group)


def new_group(
    ranks: Sequence[int] | None = None,
    timeout: timedelta | None = None,
    backend: str | None = None,
) -> dist.ProcessGroup:
    """A process group of these global ranks; all ranks must call. None: of all."""
    _groups.require_world()
    chosen = None if ranks is None else list(ranks)
    return dist.new_group(chosen, timeout=timeout, backend=backend)


def get_local_rank() -> int:
    """This process's rank among those of its host."""
    world = find_world(os.environ)
    return 0 if world is None else world.local_rank


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> DeviceMesh:
    """torch's DeviceMesh of this shape and these names over all ranks. Collective."""
    _groups.require_world()
    current = accelerator.current().kind
    kind = "cpu" if dist.get_backend() == "gloo" else current
    return init_device_mesh(kind, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))
