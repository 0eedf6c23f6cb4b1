"""What was decided for a run and why, in words: what observers show at its start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_core.quantities import told_bytes

if TYPE_CHECKING:
    from ds_core import comm
    from ds_core.config import Config
    from ds_core.precision import Precision
    from ds_core.seams import Sharding


def decisions(
    config: Config,
    *,
    mesh: comm.Mesh,
    device: torch.device,
    precision: Precision,
    reason: str,
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    parameters: int,
) -> dict[str, str]:
    """The decisions by name, in the order in which a reader asks for them.

    Args:
        reason: why `precision` was chosen; may be empty.
        optimizer: the one that was built or given.
        scheduler: of the learning rate, or None.
        parameters: elements that are trained, over all ranks that share the model.
    """
    data_ranks = mesh.size("dp")
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.axes.items() if size > 1)
    backend = f" over {dist.get_backend()}" if dist.get_world_size() > 1 else ""
    return {
        "ranks": (axes or "1") + backend,
        "device": _device(device),
        "precision": f"{precision}" + (f" ({reason})" if reason else ""),
        "sharding": str(sharding),
        "batch": f"{config.train_batch_size} = {config.train_micro_batch_size_per_gpu} per "
        f"micro-batch x {config.gradient_accumulation_steps} accumulated x {data_ranks} ranks",
        "trained parameters": f"{parameters:,}",
        "model state per rank": _held(sharding.memory()),
        "optimizer": _optimizer(optimizer),
        "gradient clipping": f"to norm {config.gradient_clipping:g}"
        if config.gradient_clipping
        else "none",
        "learning rate": _rate(optimizer, scheduler),
        "packages": _packages(),
    }


def _held(memory: Mapping[str, int]) -> str:
    told = [f"{kind} {told_bytes(size)}" for kind, size in memory.items() if size]
    if memory.get("optimizer") == 0:
        told.append("optimizer state from the first step on")
    return ", ".join(told)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} of {os.cpu_count()} cores per rank)"
    return str(device)


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Its class, and which implementation updates the parameters."""
    group = optimizer.param_groups[0]
    kernel = next((name for name in ("fused", "foreach") if group.get(name)), None)
    shown = [f"{kernel} kernel"] if kernel else _kernels(optimizer)
    names = ("betas", "momentum", "eps", "weight_decay")
    shown += [f"{name} {_short(group[name])}" for name in names if group.get(name)]
    name = type(optimizer).__name__
    return name + (f" ({', '.join(shown)})" if shown else "")


def _kernels(optimizer: torch.optim.Optimizer) -> list[str]:
    """Which implementations compute the ops of an optimizer that says which it has."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    names = getattr(optimizer, "ops", ())
    if not names or not params:
        return []
    from ds_core import ops

    chosen = {ops.select(name, params[0].device.type).name for name in names}
    return [f"{', '.join(sorted(chosen))} kernel"]


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "/".join(_short(each) for each in value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _rate(optimizer: torch.optim.Optimizer, scheduler: Any) -> str:
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    told = " to ".join(f"{rate:.3g}" for rate in (rates[0], rates[-1])[: len(rates)])
    return told + (f", then {type(scheduler).__name__}" if scheduler is not None else ", constant")


def _packages() -> str:
    """Versions of the suite and of torch."""
    found = {
        dist.name: dist.version
        for dist in distributions()
        if dist.name is not None and dist.name.startswith("ds-")
    }
    told = [f"{name} {version}" for name, version in sorted(found.items())]
    return ", ".join([*told, f"torch {torch.__version__}"])
