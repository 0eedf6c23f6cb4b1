"""The function that shards a model, for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ds_core import comm
from ds_core.precision import Precision
from ds_core.seams import Dense, Transport
from ds_zero.choices import Choices
from ds_zero.host_steps.zenflow import ZenFlow
from ds_zero.offload import Offload
from ds_zero.optimizer import ZeroOptimizer
from ds_zero.owners import own
from ds_zero.plan import Selector


def shard(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int,
    *,
    mesh: comm.Mesh | None = None,
    units: Iterable[Selector] | None = None,
    leaf_modules: Iterable[Selector] = (),
    precision: Precision | None = None,
    max_grad_norm: float | None = None,
    min_unit_numel: int = 1 << 18,
    prefetch: int = 1,
    broadcast: bool = True,
    transport: Transport | None = None,
    offload: Offload | None = None,
    update_in_backward: bool = False,
    check_memory: bool = True,
    zenflow: ZenFlow | None = None,
    accumulation: int = 1,
    scales_gradients: bool = False,
) -> ZeroOptimizer:
    """Shard `model` and `optimizer` over the data-parallel ranks; returns the optimizer to use.

        optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=1e-3), stage=2)
        for batch in batches:
            loss = model(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    With P parameters of b bytes, fp32 Adam and N ranks, a rank holds between steps: stage 1,
    2 b P + 8 P/N; stage 2, b P + (b + 8) P/N; stage 3, (2 b + 8) P/N; and 4 P/N for a master copy
    if b < 4 and `precision.master` asks for it; each plus padding to 64 bytes. A step sends
    (N-1)/N x 2 b P bytes per rank at stages 1 and 2, (N-1)/N x 3 b P at stage 3: the optimum.

    Args:
        model: on its device; may have been built under `ds_zero.Init`.
        optimizer: any elementwise `torch.optim.Optimizer` on the model's parameters, before its
            first step. It is driven by the returned one from now on.
        stage: what is sharded: 1, optimizer state; 2, gradients too; 3, parameters too.
        mesh: ranks to shard over along "dp"; default: all ranks.
        units: modules (or classes, or patterns on names) that travel as one; default: found from
            repeated blocks.
        leaf_modules: modules that must not be divided into units, as mixtures of experts.
        precision: `compute` casts the parameters, `master` keeps an fp32 copy of what is cast,
            `grad` accumulates gradients in another dtype. Default: as the model is.
        max_grad_norm: clip the global L2 norm of the gradients to this at each step.
        min_unit_numel: neighbouring blocks are merged into units of at least this many elements.
        prefetch: at stage 3, how many units are gathered ahead of use.
        transport: how parameters and gradients travel; default: as they are.
        offload: what lives in host memory or on disk between uses; default: nothing.
        update_in_backward: update each unit as soon as its averaged gradient is complete, while
            backward goes on, so that no gradient outlives its unit's turn: 4 P/N bytes less at
            fp32. `step()` then only ends the step. Without clipping, which needs all gradients
            first; micro-batches before the last one belong under `no_sync`.
        check_memory: refuse, before anything is allocated, what this machine cannot hold: the
            error is the whole memory plan (see `memory_plan`), which is logged otherwise.
        zenflow: update the most important part of every shard at each step, and the rest now and
            then; needs `offload` of the optimizer to "cpu". Default: all at each step.
        accumulation: micro-batches per step that are to come, for the check of memory alone.
        scales_gradients: whether the caller multiplies gradients before the step, as for a loss
            scale: advice for a model that does not fit then keeps off what rules that out.
        broadcast: make all ranks start from rank 0's values (not for a model from `Init`).

    Raises ShardError for a stage, model or optimizer that cannot be sharded or does not fit,
    ModelMismatchError if the ranks' models differ. Collective.
    """
    choices = Choices(
        stage=stage,
        units=units,
        leaf_modules=leaf_modules,
        precision=precision or Precision(),
        max_grad_norm=max_grad_norm,
        min_unit_numel=min_unit_numel,
        prefetch=prefetch,
        broadcast=broadcast,
        transport=transport or Dense(),
        offload=offload or Offload(),
        update_in_backward=update_in_backward,
        check_memory=check_memory,
        zenflow=zenflow,
        accumulation=accumulation,
        scales_gradients=scales_gradients,
    )
    mesh = comm.Mesh.world() if mesh is None else mesh
    sharded = ZeroOptimizer(model, optimizer, mesh, choices)
    own(sharded)
    return sharded
