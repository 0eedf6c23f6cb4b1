"""A GPT as it is built today: RMSNorm, rotary positions, SwiGLU, causal attention by SDPA.

Plain PyTorch: nothing in this file knows about ZeRO or how many processes there are.

Shapes in names: b samples, t tokens, d model width, h heads, k width of a head, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

#: Targets with this value do not count towards the loss.
IGNORED = -100


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of a model."""

    width: int
    num_layers: int
    num_heads: int


#: Parameters with a vocabulary of 4096 are what the name says, within a few per cent.
SIZES = {
    "tiny": Size(64, 2, 2),
    "10m": Size(384, 5, 6),
    "30m": Size(512, 9, 8),
    "125m": Size(768, 17, 12),
    "350m": Size(1024, 27, 16),
    "760m": Size(1536, 27, 12),
    "1.3b": Size(2048, 26, 16),
}


class GPT(nn.Module):
    """Predicts each next token of a sequence.

    Args:
        size: width, depth and heads.
        vocab_size: number of token ids.
        max_tokens: longest sequence.
        is_tied: whether the output layer is the embedding, transposed.
        recomputes: whether a block's activations are computed again in backward, not kept.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        size: Size,
        vocab_size: int,
        max_tokens: int,
        *,
        is_tied: bool = True,
        recomputes: bool = False,
    ) -> None:
        super().__init__()
        self.max_tokens, self.recomputes = max_tokens, recomputes
        self.embedding = nn.Embedding(vocab_size, size.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = linear(size.width, vocab_size)
        if is_tied:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_table(max_tokens, size.width // size.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, tokens_bt: torch.Tensor, targets_bt: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits `[b, t, v]`; with targets `[b, t]`, the mean loss in nats per token instead."""
        num_tokens = tokens_bt.shape[1]
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        x_btd = self.embedding(tokens_bt)
        for block in self.blocks:
            if self.recomputes and self.training:
                x_btd = checkpoint(block, x_btd, cos, sin, use_reentrant=False)
            else:
                x_btd = block(x_btd, cos, sin)
        logits_btv = self.head(self.norm(x_btd))
        if targets_bt is None:
            return logits_btv
        return F.cross_entropy(
            logits_btv.flatten(0, 1).float(), targets_bt.flatten(), ignore_index=IGNORED
        )


class Block(nn.Module):
    """Attention, then SwiGLU, each added to what came in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        # Both branches end in a sum over all layers: start smaller, so that it does not grow.
        std = 0.02 / math.sqrt(2 * size.num_layers)
        self.attention_norm = nn.RMSNorm(size.width)
        self.attention = Attention(size, std)
        self.feed_forward_norm = nn.RMSNorm(size.width)
        self.feed_forward = SwiGLU(size.width, std)

    def forward(self, x_btd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), cos, sin)
        return x_btd + self.feed_forward(self.feed_forward_norm(x_btd))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, size: Size, std: float) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.qkv = linear(size.width, 3 * size.width)
        self.out = linear(size.width, size.width, std)

    def forward(self, x_btd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, d = x_btd.shape
        qkv = self.qkv(x_btd).view(b, t, 3, self.num_heads, d // self.num_heads)
        q_bhtk, k_bhtk, v_bhtk = qkv.permute(2, 0, 3, 1, 4)
        q_bhtk, k_bhtk = rotate(q_bhtk, cos, sin), rotate(k_bhtk, cos, sin)
        y_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        return self.out(y_bhtk.transpose(1, 2).reshape(b, t, d))


class SwiGLU(nn.Module):
    """`(silu(x G) * (x U)) D`, as wide inside as has the parameters of a plain 4 d layer.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        inner = round(width * 8 / 3 / 64) * 64
        self.gate_and_up = linear(width, 2 * inner)
        self.down = linear(inner, width, std)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_and_up(x_btd).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def linear(num_inputs: int, num_outputs: int, std: float = 0.02) -> nn.Linear:
    """A linear layer without bias, its weights normal."""
    layer = nn.Linear(num_inputs, num_outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def rotary_table(max_tokens: int, head_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angle of each position and pair of components, `[t, k / 2]`.

    Source: Su et al. 2021, "RoFormer", section 3.2.
    """
    frequency = 10_000.0 ** -(torch.arange(0, head_width, 2) / head_width)
    angle = torch.outer(torch.arange(max_tokens).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x_bhtk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of components by its position's angle, in fp32; the dtype stays."""
    first, second = x_bhtk.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x_bhtk)
