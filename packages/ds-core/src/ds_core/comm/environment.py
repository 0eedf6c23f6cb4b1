"""Starting and ending torch's default process group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_core import _env
from ds_core.errors import CommError

DEFAULT_TIMEOUT_S = 600.0


def is_initialized() -> bool:
    """True once torch's default process group exists, whoever started it."""
    return dist.is_available() and dist.is_initialized()


def init(backend: str | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Start torch's default process group unless it is running already.

    Reads torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); with none of them
    set it makes a world of one, without opening a port.

    Args:
        backend: "gloo", "nccl", ...; default: the accelerator's own, gloo on a CPU.
        timeout_s: seconds after which a collective that cannot complete ends with an error.

    Raises:
        CommError: only some of the variables are set, or one has a value that makes no sense.
    """
    if is_initialized():
        return
    world = _env.torchrun_world()
    chosen = backend or _default_backend()
    timeout = timedelta(seconds=timeout_s)
    if world is None:
        dist.init_process_group(
            chosen, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    kwargs: dict[str, Any] = {}
    if chosen != "gloo" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(world.local_rank)
    try:
        dist.init_process_group(
            chosen, rank=world.rank, world_size=world.size, timeout=timeout, **kwargs
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"process group of {world.size} ranks at {world.master} could not start on rank "
            f"{world.rank}: {error}; check that MASTER_ADDR and MASTER_PORT are the same on all "
            f"ranks and reachable"
        ) from error


def shutdown() -> None:
    """Destroy the default process group if there is one."""
    if is_initialized():
        dist.destroy_process_group()


def _default_backend() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "gloo"
    return str(dist.get_default_backend_for_device(device))
