"""What is trained here: the GPT of the timings, and two small models for special questions.

Every model maps a batch to its loss, and holds its repeated part in `blocks`, so that each
implementation can shard it block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Size of a GPT and of one rank's micro-batch.

    Attributes:
        vocab: number of token ids.
        width: features per token.
        depth: number of blocks.
        heads: attention heads; divides `width`.
        context: longest sequence.
        tokens: length of the sequences trained on.
        micro_batch: sequences per rank and step.
    """

    vocab: int = 8192
    width: int = 512
    depth: int = 8
    heads: int = 8
    context: int = 128
    tokens: int = 128
    micro_batch: int = 2


#: 33.7 M parameters.
STANDARD = Shape()
#: The same model on 32 tokens per rank, where a number format is slow on this machine.
SHORT = Shape(tokens=16)
#: No size is a multiple of anything, so every buffer needs padding.
ODD = Shape(vocab=1009, width=77, depth=3, heads=7, context=33, tokens=33)
#: A few seconds per measurement, for a first look.
QUICK = Shape(vocab=2048, width=256, depth=4, heads=4, context=64, tokens=64)


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a GELU network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x_btd.shape
        split = self.qkv(self.norm1(x_btd)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_btd = x_btd + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x_btd + self.down(F.gelu(self.up(self.norm2(x_btd))))


class Embedding(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocab, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)

    def forward(self, ids_bt: torch.Tensor) -> torch.Tensor:
        return self.token(ids_bt) + self.position(torch.arange(ids_bt.shape[1]))


class Head(nn.Module):
    """Logits of the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.logits = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(x_btd))


class GPT(nn.Module):
    """A GPT-2-like language model; its output is the mean loss."""

    def __init__(self, shape: Shape = STANDARD) -> None:
        super().__init__()
        self.embedding = Embedding(shape)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.head = Head(shape)

    def forward(self, ids_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        x_btd = self.embedding(ids_bt)
        for block in self.blocks:
            x_btd = block(x_btd)
        return F.cross_entropy(self.head(x_btd).float().flatten(0, 1), targets_bt.flatten())


class Tiny(nn.Module):
    """1072 parameters: a step of it is nothing but the overhead of the machinery around it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.blocks[1](F.relu(self.blocks[0](x))), y)


def make_gpt(shape: Shape) -> GPT:
    """The GPT of that shape, with the same initial values in every process."""
    torch.manual_seed(0)
    return GPT(shape)


def num_parameters(shape: Shape) -> int:
    """Elements of all parameters, without allocating them."""
    with torch.device("meta"):
        return sum(param.numel() for param in GPT(shape).parameters())


def batches(shape: Shape, rank: int) -> Iterator[Batch]:
    """Endless micro-batches of one rank, the same for every implementation."""
    generator = torch.Generator().manual_seed(1000 + rank)
    size = (shape.micro_batch, shape.tokens)
    while True:
        ids_bt = torch.randint(0, shape.vocab, size, generator=generator)
        yield ids_bt, ids_bt.roll(-1, 1)
