"""Small models, each with a difficulty that sharding must get right, and their batches.

A `Case` is a model, the batch of one rank at one step, and the loss of that batch. The loss may
depend on rank and step: a single process that averages the losses of all ranks is the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WIDTH, VOCAB = 12, 20


@dataclass(frozen=True)
class Case:
    """How to build a model and what each rank computes with it at each step.

    Attributes:
        build: makes the model; called with the same seed everywhere.
        loss: (model, batch, rank, step) -> scalar.
        batch: (rank, step) -> input.
        groups: (model) -> what the optimizer gets; default: its trainable parameters.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Tensor, int, int], torch.Tensor]
    batch: Callable[[int, int], torch.Tensor] | None = None
    groups: Callable[[nn.Module], list[Any]] | None = None

    def inputs(self, rank: int, step: int) -> torch.Tensor:
        """The batch of `rank` at `step`."""
        return (self.batch or vectors)(rank, step)

    def params(self, model: nn.Module) -> list[Any]:
        """What an optimizer is built on."""
        if self.groups is not None:
            return self.groups(model)
        return [param for param in model.parameters() if param.requires_grad]


def vectors(rank: int, step: int, rows: int = 3) -> torch.Tensor:
    """`rows` vectors that differ by rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(rows, WIDTH, generator=generator).to(torch.get_default_dtype())


def tokens(rank: int, step: int, rows: int = 2) -> torch.Tensor:
    """`rows` sequences of 6 token numbers that differ by rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCAB, (rows, 6), generator=generator)


def uneven_tokens(rank: int, step: int) -> torch.Tensor:
    """Batches whose size differs between ranks, as the last ones of an epoch."""
    return tokens(rank, step, rows=1 + (rank + step) % 3)


def same_tokens(rank: int, step: int) -> torch.Tensor:
    """The same batch at every step, so that the loss falls."""
    return tokens(rank, 0)


def square(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """A loss of the output alone."""
    return model(x).square().mean()


def next_token(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """Language-model loss."""
    logits = model(x)[:, :-1].flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), x[:, 1:].flatten())


def autocast(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """Language-model loss of a forward in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return next_token(model, x, rank, step)


# ---------------------------------------------------------------------- blocks and language models


class Block(nn.Module):
    """Residual block with a norm, a bias and odd sizes."""

    def __init__(self, width: int = WIDTH, hidden: int = 17) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks one after the other between an entry and an exit."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.exit = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.exit(x)


class Language(nn.Module):
    """A language model: causal mixing of positions, then blocks; head tied, own or functional.

    Args:
        head: "tied" shares the embedding's parameter, "own" has one, "functional" uses the
            embedding's weight outside its module.
        remat: None, "reentrant" or "non-reentrant" activation checkpointing of each block.
    """

    def __init__(self, head: str = "tied", depth: int = 3, remat: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.kind, self.remat = head, remat
        if head != "functional":
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if head == "tied":
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, dtype=x.dtype)[None, :, None]
        for block in self.blocks:
            if self.remat is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.remat == "reentrant")
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.kind == "functional" else self.head(x)


# ---------------------------------------------------------------------- frozen parts


class Lora(nn.Module):
    """A frozen block with a small trainable bypass."""

    def __init__(self, rank: int = 3) -> None:
        super().__init__()
        self.base = Block().requires_grad_(False)
        self.a = nn.Parameter(torch.randn(WIDTH, rank) * 0.1)
        self.b = nn.Parameter(torch.randn(rank, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a @ self.b


class Adapted(nn.Module):
    """Frozen entry and exit, adapted blocks between."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Lora() for _ in range(4))
        self.exit = nn.Linear(WIDTH, 5).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.exit(x)


def half_frozen() -> nn.Module:
    """Every other block is frozen."""
    model = Stack()
    for block in model.blocks[::2]:
        block.requires_grad_(False)
    return model


# ---------------------------------------------------------------------- use of parameters


class Shared(nn.Module):
    """One block used at two depths, with others between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in (0, 1, 0, 2, 1, 0):
            x = self.blocks[index](x)
        return x


class TiedBlocks(nn.Module):
    """Two blocks that share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].up.weight = self.blocks[0].up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Unused(nn.Module):
    """A block, and half of another, that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        x = x + self.blocks[1].norm(x)
        return self.blocks[3](x)


class Odd(nn.Module):
    """Parameters of 1, 7, 0 and 3 x 0 elements, and a scalar, in blocks of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_OddPart() for _ in range(3))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x * self.scalar + self.nothing.sum()


class _OddPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))
        self.seven = nn.Parameter(torch.randn(7))
        self.none = nn.Parameter(torch.empty(3, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.one + F.pad(self.seven, (0, WIDTH - 7)) + self.none.sum()


# ---------------------------------------------------------------------- branches


class Branches(nn.Module):
    """Runs the blocks that it is told to, in that order."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor, route: tuple[int, ...]) -> torch.Tensor:
        x = self.entry(x)
        for index in route:
            x = self.blocks[index](x)
        return x


def _routed(*routes: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    def loss(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        return model(x, routes[(rank + step) % len(routes)]).square().mean()

    return loss


def _by_rank(*routes: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    def loss(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        return model(x, routes[rank % len(routes)]).square().mean()

    return loss


def _random_route(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77 * step + rank)
    length = int(torch.randint(1, 7, (), generator=generator))
    route = torch.randperm(6, generator=generator)[:length].tolist()
    return model(x, tuple(route)).square().mean()


class InnerBranch(nn.Module):
    """A block that uses one of two halves of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, which: str) -> torch.Tensor:
        if which == "both":
            return x + self.scale * (self.halves["a"](x) + self.halves["b"](x))
        return x + self.scale * self.halves[which](x)


class InnerBranches(nn.Module):
    """Blocks in which ranks use different parameters."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InnerBranch() for _ in range(depth))

    def forward(self, x: torch.Tensor, which: str) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, which)
        return x


def _inner_alternating(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return model(x, "ab"[(rank + step) % 2]).square().mean()


def _inner_asymmetric(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return model(x, ("both", "a")[(rank + step // 2) % 2]).square().mean()


class EarlyExits(nn.Module):
    """Every rank runs all blocks; the loss takes the output of one of them."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


def _early_exit(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return model(x)[5 - 3 * (rank % 2)].square().mean()


# ---------------------------------------------------------------------- what modules do


@dataclass
class Output:
    """What some models return."""

    hidden: torch.Tensor
    extra: dict[str, torch.Tensor]


class Structured(nn.Module):
    """Keyword-only forward that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, *, hidden: torch.Tensor, scale: float = 1.0) -> Output:
        for block in self.blocks:
            hidden = block(hidden)
        return Output(hidden * scale, {"mean": hidden.mean()})


def _structured(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    output = model(hidden=x, scale=0.5)
    return output.hidden.square().mean() + output.extra["mean"]


def _two_losses(model: nn.Module, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return model(x).square().mean() + model(2 * x).abs().mean()


class Attention(nn.Module):
    """nn.MultiheadAttention reads `out_proj.weight` outside that module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 3, 17, dropout=0.0, batch_first=True)
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(1, -1, WIDTH)
        for layer in self.layers:
            x = layer(x)
        return x


class Normed(nn.Module):
    """Weight norm, a ParameterList, an LSTM and a BatchNorm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(3)
        )
        self.offsets = nn.ParameterList(torch.randn(WIDTH) for _ in range(3))
        self.recurrent = nn.LSTM(WIDTH, WIDTH, num_layers=2)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, offset in zip(self.layers, self.offsets, strict=True):
            x = layer(x) + offset
        return self.norm(self.recurrent(x)[0])


def _two_groups(model: nn.Module) -> list[Any]:
    weights = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
    rest = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    return [
        {"params": weights, "weight_decay": 0.3, "lr": 2e-2},
        {"params": rest, "weight_decay": 0.0},
    ]


def _compiled() -> nn.Module:
    model = Stack(3)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


CASES: dict[str, Case] = {
    "stack": Case(Stack, square),
    "groups": Case(Stack, square, groups=_two_groups),
    "tied": Case(lambda: Language("tied"), next_token, tokens),
    "untied": Case(lambda: Language("own"), next_token, tokens),
    "outside": Case(lambda: Language("functional"), next_token, tokens),
    "overfit": Case(lambda: Language("own"), next_token, same_tokens),
    "autocast": Case(lambda: Language("own"), autocast, tokens),
    "uneven": Case(lambda: Language("own"), next_token, uneven_tokens),
    "reentrant": Case(lambda: Language("own", remat="reentrant"), next_token, tokens),
    "non-reentrant": Case(lambda: Language("own", remat="non-reentrant"), next_token, tokens),
    "lora": Case(Adapted, square),
    "frozen": Case(half_frozen, square),
    "shared": Case(Shared, square),
    "tied-blocks": Case(TiedBlocks, square),
    "unused": Case(Unused, square),
    "odd-sizes": Case(Odd, square),
    "branches": Case(Branches, _routed((0, 1, 3), (0, 2, 4, 5), (5, 1))),
    "branches-disjoint": Case(Branches, _by_rank((5, 4, 3), (2, 1, 0))),
    "branches-random": Case(Branches, _random_route),
    "branches-subset": Case(Branches, _by_rank((0, 1, 2, 3, 4, 5), (0, 3))),
    "inner-branches": Case(InnerBranches, _inner_alternating),
    "inner-asymmetric": Case(InnerBranches, _inner_asymmetric),
    "early-exits": Case(EarlyExits, _early_exit),
    "structured": Case(Structured, _structured),
    "two-losses": Case(Stack, _two_losses),
    "attention": Case(Attention, square),
    "modules": Case(Normed, square),
    "compiled": Case(_compiled, square),
}

#: Those that are compared with one process. A test module may add cases, which it alone has.
COMPARED = tuple(sorted(CASES.keys() - {"autocast", "overfit"}))
