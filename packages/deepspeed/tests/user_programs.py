"""A model, its data and the plain loop that is the truth for programs written for DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

RATE = 1e-2


def make_model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(number: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of one rank."""
    generator = torch.Generator().manual_seed(number * 10 + rank)
    return torch.randn(2, 6, generator=generator), torch.randn(2, 3, generator=generator)


def loss_of(model: Any, number: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The loss of one rank's micro-batch."""
    inputs, targets = batch(number, rank)
    return nn.functional.mse_loss(model(inputs.to(dtype)).float(), targets)


def config(stage: int, **changes: Any) -> dict[str, Any]:
    """A configuration such as programs have."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        **changes,
    }


def plain_losses(
    steps: int,
    *,
    world: int,
    accumulate: int = 1,
    max_norm: float = 1.0,
    optimizer: Any = None,
    model: nn.Module | None = None,
    first: int = 0,
) -> list[list[float]]:
    """Losses of every micro-batch by rank, of one process that trains on the batches of all."""
    model = make_model() if model is None else model
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    losses: list[list[float]] = [[] for _ in range(world)]
    for step in range(first, first + steps):
        for number in range(step * accumulate, (step + 1) * accumulate):
            for rank in range(world):
                loss = loss_of(model, number, rank)
                losses[rank].append(loss.item())
                (loss / world / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train(engine: Any, steps: int, *, first: int = 0) -> list[float]:
    """The loop of every tutorial; returns the losses of this rank."""
    losses = []
    for number in range(first, first + steps):
        loss = loss_of(engine, number, dist.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def assert_same(found: list[float], expected: list[float], tolerance: float = 1e-6) -> None:
    """Losses are equal but for the order of sums."""
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )
