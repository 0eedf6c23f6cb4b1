"""Weights that a function of the program puts into the model: `custom_load_fn`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import ds_zero
from ds_core import comm
from ds_core.buffers import persistent_buffers
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from ds_core.engine import Engine


def placing(
    engine: Engine, custom_load_fn: Callable[..., Any]
) -> Callable[[Mapping[str, torch.Tensor]], None]:
    """What lets `custom_load_fn(src=weights, dst=model)` fill the model of an engine.

    The model is whole meanwhile; what the function made of it on the first rank counts, in the most
    precise copy too. A weight that is then the saved one, rounded, is taken as it was saved.
    Collective. Raises CheckpointError on every rank if the function fails on one.
    """

    def place(weights: Mapping[str, torch.Tensor]) -> None:
        module, group = engine.module, engine.mesh.group("dp")
        engine.wait_for_checkpoint()
        values = OrderedDict(weights)
        told = None
        with ds_zero.GatheredParameters(module.parameters(), modifier_rank=0):
            try:
                custom_load_fn(src=OrderedDict(values), dst=module)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            _raise_anywhere(comm.all_gather_object(told, group, caller="custom_load_fn"))
            precise = comm.broadcast_object(_taken(module, values), group, caller="custom_load_fn")
        is_sharded = isinstance(engine.sharding, ds_zero.ZeroOptimizer)
        edited = {} if is_sharded else dict(module.named_parameters())
        kept = {name: values[name] for name in precise}
        engine.load_state_dict({**edited, **kept}, strict=False)

    return place


def _taken(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The parameters that are a saved weight of the same name, rounded to their dtype."""
    return [
        name
        for name, param in module.named_parameters()
        if name in weights
        and weights[name].shape == param.shape
        and torch.equal(weights[name].to(param.device, param.dtype), param.detach())
    ]


def _raise_anywhere(by_rank: list[str | None]) -> None:
    for rank, told in enumerate(by_rank):
        if told is not None:
            raise CheckpointError(f"custom_load_fn failed on rank {rank}: {told}")


def check_names(module: nn.Module, weights: Mapping[str, Any], may_lack: set[str]) -> None:
    """Raise CheckpointError unless model and weights have the same names but for those allowed."""
    own = {name for name, _ in module.named_parameters()}
    own |= {name for name, _ in persistent_buffers(module)}
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    missing, unknown = own - weights.keys() - may_lack, weights.keys() - own - aliases
    if missing or unknown:
        raise CheckpointError(
            f"load_module_state_dict: weights of another model: the model alone has "
            f"{sorted(missing)[:4]}, the weights alone {sorted(unknown)[:4]}"
        )
