"""Starting and ending torch's default process group."""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ds_core import _env
from ds_core.comm.discovery import World, find_world
from ds_core.comm.group import let_go_of_process_groups
from ds_core.errors import CommError

DEFAULT_TIMEOUT_S = 600.0


def is_initialized() -> bool:
    """True once torch's default process group exists, whoever started it."""
    return dist.is_available() and dist.is_initialized()


def init(
    backend: str | None = None,
    *,
    timeout_s: float | None = None,
    port: int | None = None,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> None:
    """Start torch's default process group unless it is running already.

    Reads what torchrun, MPI or Slurm put into the environment (`ds_core.comm.discovery`); with
    none of them it makes a world of one, without opening a port.

    Args:
        backend: "gloo", "nccl", ...; default: the accelerator's own, gloo on a CPU.
        timeout_s: seconds after which a collective that cannot complete ends with an error;
            default: DEEPSPEED_TIMEOUT (in minutes) if that is set, else 600.
        port: where rank 0 listens under MPI or Slurm, unless MASTER_PORT says it; default: one
            that is made of the job's number.
        init_method: where the ranks meet, instead of what the environment says: a URL of
            torch.distributed, such as tcp://HOST:PORT or file:///shared/file.
        rank: of this process, and
        world_size: number of ranks, both with init_method alone; default: the environment's.

    Raises:
        CommError: only some of the variables are set, or one has a value that makes no sense, or
            the other ranks do not come within the timeout.
    """
    if is_initialized():
        return
    if (rank is None) != (world_size is None) or (rank is not None and init_method is None):
        raise CommError(
            f"comm.init: rank: got {rank}, world_size: {world_size}, init_method: {init_method!r}; "
            f"give all three, init_method alone, or none"
        )
    # Its functions take the default group as it is when they are defined: imported later, they
    # would keep the group, and the threads of gloo, beyond `shutdown` to the end of Python, which
    # such a thread may turn into an abort.
    importlib.import_module("torch.distributed.nn.functional")
    atexit.unregister(_shutdown_at_exit)
    atexit.register(_shutdown_at_exit)
    chosen = backend or _default_backend()
    timeout = timedelta(seconds=_timeout_s(timeout_s))
    world = find_world(_env.whole(), port=port)
    if init_method is not None and init_method != "env://":
        _meet(init_method, chosen, timeout, world, rank, world_size)
        return
    if world is None:
        dist.init_process_group(
            chosen, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    if world.host is None:
        world = replace(world, host=_host_by_mpi(world))
    if chosen != "gloo" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(world.local_rank)
    try:
        dist.init_process_group(
            chosen,
            # torchrun's agent holds the store, which only env:// knows of.
            init_method="env://" if world.source == "torchrun" else f"tcp://{world.master}",
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"process group of {world.size} ranks at {world.master} (from the variables of "
            f"{world.source}) could not start on rank {world.rank}: {error}; check that "
            f"MASTER_ADDR and MASTER_PORT are the same on all ranks and reachable, and that all "
            f"{world.size} ranks were started"
        ) from error


def _meet(
    init_method: str,
    backend: str,
    timeout: timedelta,
    world: World | None,
    rank: int | None,
    world_size: int | None,
) -> None:
    """Start the process group at a place that the program names."""
    if rank is None or world_size is None:
        if world is None:
            raise CommError(
                f"comm.init: init_method {init_method!r} does not say which rank of how many this "
                f"process is, nor does the environment: give rank and world_size"
            )
        rank, world_size = world.rank, world.size
    if backend != "gloo" and torch.accelerator.is_available():
        local = world.local_rank if world is not None else rank
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
    try:
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"process group of {world_size} ranks at {init_method} could not start on rank "
            f"{rank}: {error}; check that the place is the same on all ranks and reachable, and "
            f"that all {world_size} ranks were started"
        ) from error


def shutdown() -> None:
    """Destroy the default process group if there is one."""
    if is_initialized():
        dist.destroy_process_group()


def _shutdown_at_exit() -> None:
    """`shutdown` for a program that ends without it: else a thread of gloo may abort its exit.

    Not after an error that nobody caught: a collective that waits for a peer which will not come
    would hold up the end.
    """
    if not hasattr(sys, "last_value"):
        shutdown()
        # An engine that is still there, as a global name, holds groups; a backend's thread that
        # lets go of a tensor while Python finalizes would end the process by SIGABRT.
        let_go_of_process_groups()
        gc.collect()


def wants_check() -> bool:
    """Whether the environment asks for the check of collectives, `DS_COMM_CHECK=1`.

    Raises CommError for a value that is neither 0 nor 1.
    """
    text = _env.whole().get("DS_COMM_CHECK", "0")
    if text not in ("0", "1"):
        raise CommError(f"DS_COMM_CHECK={text!r} in the environment: expected 0 or 1")
    return text == "1"


def _timeout_s(given: float | None) -> float:
    if given is None:
        text = _env.whole().get("DEEPSPEED_TIMEOUT")
        if text is None:
            return DEFAULT_TIMEOUT_S
        try:
            given = float(text) * 60
        except ValueError:
            given = -1.0
        if not 0 < given < float("inf"):
            raise CommError(
                f"DEEPSPEED_TIMEOUT={text!r} in the environment: expected minutes above 0, the "
                f"time after which a collective that cannot complete is an error"
            )
    if not 0 < given < float("inf"):
        raise CommError(f"comm.init: timeout_s: got {given}, expected seconds above 0")
    return given


def _host_by_mpi(world: World) -> str:
    """The host of rank 0, asked of MPI itself where mpi4py is installed."""
    if world.source == "Slurm" or importlib.util.find_spec("mpi4py") is None:
        raise CommError(
            f"{world.source} started rank {world.rank} of {world.size}, and nothing says on which "
            f"host rank 0 runs: set MASTER_ADDR to it on all ranks"
            + ("" if world.source == "Slurm" else " (mpirun -x MASTER_ADDR=...), or install mpi4py")
        )
    import socket

    communicator = importlib.import_module("mpi4py.MPI").COMM_WORLD
    return str(communicator.bcast(socket.gethostname(), root=0))


def _default_backend() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or _env.accelerator() == "cpu":
        return "gloo"
    return str(dist.get_default_backend_for_device(device))
