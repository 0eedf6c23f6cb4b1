"""Training loops that the tests run in every rank: sharded, and plain as the truth."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from zero_models import CASES, Case

import ds_zero
from ds_core import comm, gradients

# Ranks that differ sit out this time once per test: the tests need not.
gradients.PATIENCE_S = 0.2

Step = Callable[[nn.Module, torch.optim.Optimizer, Case, int], float]


def adamw(params: Any) -> torch.optim.Optimizer:
    """The optimizer of most tests; a large rate, so that mistakes show early."""
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def sharded(
    case: Case, stage: int, make_optimizer: Callable[[Any], Any] = adamw, **options: Any
) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    """The model of a case, built with seed 0 and sharded into many small units."""
    torch.manual_seed(0)
    model = case.build()
    options.setdefault("min_unit_numel", 0)
    return model, ds_zero.shard(model, make_optimizer(case.params(model)), stage, **options)


def sharded_steps(
    model: nn.Module,
    optimizer: ds_zero.ZeroOptimizer,
    case: Case,
    steps: int,
    *,
    accumulate: int = 1,
    no_sync: bool = False,
    first: int = 0,
) -> list[float]:
    """Train this rank's share of the batches; returns the losses averaged over ranks."""
    losses = []
    for step in range(first, first + steps):
        total = 0.0
        for micro in range(accumulate):
            number = step * accumulate + micro
            quiet = no_sync and micro < accumulate - 1
            with optimizer.no_sync() if quiet else nullcontext():
                batch = case.inputs(dist.get_rank(), number)
                loss = case.loss(model, batch, dist.get_rank(), number) / accumulate
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(total))
    return losses


def plain_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    case: Case,
    steps: int,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    first: int = 0,
) -> list[float]:
    """Train one process on the batches of all ranks; returns the losses."""
    world, losses = dist.get_world_size(), []
    for step in range(first, first + steps):
        total = 0.0
        for number in range(step * accumulate, (step + 1) * accumulate):
            for rank in range(world):
                loss = case.loss(model, case.inputs(rank, number), rank, number)
                (loss / (world * accumulate)).backward()
                total += loss.item() / (world * accumulate)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def plain(
    case: Case, steps: int, make_optimizer: Callable[[Any], Any] = adamw, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """The truth: model, optimizer and losses of a single process after some steps."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = make_optimizer(case.params(model))
    return model, optimizer, plain_steps(model, optimizer, case, steps, **options)


def compare(
    name: str,
    stage: int,
    *,
    steps: int = 4,
    accumulate: int = 1,
    no_sync: bool = False,
    max_norm: float | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    state_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq"),
    **options: Any,
) -> None:
    """Assert that sharded training equals plain training: losses, parameters, optimizer state."""
    torch.set_default_dtype(dtype)
    case = CASES[name]
    model, optimizer = sharded(case, stage, max_grad_norm=max_norm, **options)
    found = sharded_steps(model, optimizer, case, steps, accumulate=accumulate, no_sync=no_sync)
    truth, reference, expected = plain(case, steps, accumulate=accumulate, max_norm=max_norm)
    assert_close(torch.tensor(found), torch.tensor(expected), tolerance, "losses")
    assert_same_parameters(optimizer, truth, tolerance)
    assert_same_state(optimizer, reference, truth, state_keys, tolerance)


def assert_same_parameters(
    optimizer: ds_zero.ZeroOptimizer, truth: nn.Module, tolerance: float
) -> None:
    """Every parameter of the sharded model equals that of the plain one."""
    whole = optimizer.full_state_dict()
    expected = dict(truth.named_parameters())
    assert whole.keys() == expected.keys()
    for name, param in expected.items():
        assert_close(whole[name], param.detach(), tolerance, name)


def assert_same_state(
    optimizer: ds_zero.ZeroOptimizer,
    reference: torch.optim.Optimizer,
    truth: nn.Module,
    keys: tuple[str, ...],
    tolerance: float,
) -> None:
    """Optimizer state is equal; where the plain optimizer has none, ours is zero."""
    for name, param in truth.named_parameters():
        if not param.requires_grad:
            continue
        for key in keys:
            held = reference.state.get(param, {}).get(key, torch.zeros_like(param))
            found = optimizer.full_optimizer_state(name, key)
            assert_close(found, held, tolerance, f"{key} of {name}")


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Equal within a tolerance, absolute and relative."""
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda text: f"{what}: {text}",
    )


def mean_over_ranks(value: float) -> float:
    """The average of a number over all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def world_group() -> comm.Group:
    """All ranks."""
    return comm.Mesh.world().group("dp")
