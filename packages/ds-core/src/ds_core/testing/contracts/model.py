"""The model, data and plain training loop against which contracts compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

BATCH, FEATURES, WIDTH, CLASSES = 4, 6, 7, 3
LEARNING_RATE = 1e-2


class Block(nn.Module):
    """A repeated block of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class ContractModel(nn.Module):
    """A small network with what makes sharding hard.

    Odd sizes, repeated blocks, a scalar, a frozen parameter, one that is never used, a buffer,
    and (with `only`) blocks that not every rank uses.
    """

    counter: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(FEATURES, WIDTH)
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.head = nn.Linear(WIDTH, CLASSES, bias=False)
            self.scale = nn.Parameter(torch.rand(()) + 0.5)
            self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
            self.unused = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, y: torch.Tensor, only: int | None = None) -> torch.Tensor:
        """x: `[B, FEATURES]`, y: `[B]` int64; returns the mean loss. `only`: use one block."""
        hidden = self.embed(x.to(self.embed.weight.dtype)) + self.frozen
        for number, block in enumerate(self.blocks):
            if only is None or only == number:
                hidden = block(hidden)
        return F.cross_entropy(self.head(hidden * self.scale).float(), y)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups over the trainable parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one rank gets at one (micro-)step: `[BATCH, FEATURES]` and labels `[BATCH]`."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


class PlainTraining:
    """One process that trains on the batches of all ranks, with nothing but torch.

    Args:
        world_size: ranks whose batches are averaged.
        model: default: a fresh `ContractModel`.
    """

    def __init__(self, world_size: int, model: ContractModel | None = None) -> None:
        self.model = model or ContractModel()
        self.optimizer = optimizer_of(self.model)
        self.world_size = world_size

    def backward(
        self, steps: Iterable[int], *, weight: float = 1.0, branches: bool = False
    ) -> None:
        """Gradients of `weight` times the sum over micro-steps of the ranks' mean loss."""
        for step in steps:
            for rank in range(self.world_size):
                loss = self.model(*batch(step, rank), only=rank if branches else None)
                (loss * (weight / self.world_size)).backward()

    def grad_norm(self) -> float:
        """Global L2 norm of the gradients."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def step(self) -> None:
        """Update the parameters and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def assert_same_tensors(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    rtol: float = 1e-5,
    atol: float = 2e-6,
) -> None:
    """Both hold the same names, and each tensor is close to its namesake."""
    if sorted(got) != sorted(expected):
        raise AssertionError(f"names differ: {sorted(set(got) ^ set(expected))}")
    for name, tensor in expected.items():
        try:
            torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
