"""ds-zero behind the engine: what `zero_optimization` in a config asks for."""

from __future__ import annotations

import torch
from torch import nn

from ds_core import comm
from ds_core.precision import Precision
from ds_core.seams import Transport
from ds_zero.api import shard
from ds_zero.config import ZeroSection
from ds_zero.optimizer import ZeroOptimizer
from ds_zero.plan import Selector


def from_config(
    *,
    section: ZeroSection,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: comm.Mesh,
    precision: Precision,
    transport: Transport,
    accumulation: int = 1,
    scales_gradients: bool = False,
) -> ZeroOptimizer | None:
    """Shard as the section says; None at stage 0. Entry point of `ds_core.sharding`."""
    if section.stage == 0:
        return None
    return shard(
        model,
        optimizer,
        section.stage,
        mesh=mesh,
        leaf_modules=leaf_selectors(section, model),
        precision=precision,
        transport=transport,
        prefetch=1 if section.stage3_prefetch_bucket_size else 0,
        offload=section.offload(),
        update_in_backward=section.update_in_backward,
        check_memory=section.check_memory,
        zenflow=None if section.zenflow is None else section.zenflow.choice(),
        accumulation=accumulation,
        scales_gradients=scales_gradients,
    )


def leaf_selectors(section: ZeroSection, model: nn.Module) -> list[Selector]:
    """The modules of `model` that the section wants to travel as one."""
    leaf = section.leaf_module
    patterns = [*leaf.names, *(f"*{suffix}" for suffix in leaf.name_suffixes)]
    names = {name.rpartition(".")[2] for name in leaf.classes}
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    return [*patterns, *classes]
