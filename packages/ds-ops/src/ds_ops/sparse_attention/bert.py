"""Self attention of BERT by blocks, and models of transformers that are given it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_core.errors import ConfigError
from ds_ops.sparse_attention.attention import SparseSelfAttention
from ds_ops.sparse_attention.layouts import FixedSparsityConfig, SparsityConfig


class BertSparseSelfAttention(nn.Module):
    """BERT's self attention with `SparseSelfAttention` inside; there is no dropout of weights.

    Its parameters are those of BERT's: `query`, `key` and `value`.

    Args:
        config: of the model: `hidden_size` and `num_attention_heads` are read.
        sparsity_config: the layout; None: `FixedSparsityConfig` for the model's heads.
        max_seq_length: of the longest sequences.

    Raises ConfigError if the heads do not divide the hidden size, or are not those of the layout.
    """

    def __init__(
        self,
        config: Any,
        sparsity_config: SparsityConfig | None = None,
        max_seq_length: int = 2048,
    ) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ConfigError(
                f"BertSparseSelfAttention: hidden_size: got {width}, expected a multiple of the "
                f"{heads} attention heads"
            )
        sparsity_config = sparsity_config or FixedSparsityConfig(num_heads=heads)
        if sparsity_config.num_heads != heads:
            raise ConfigError(
                f"BertSparseSelfAttention: sparsity_config: got a layout for "
                f"{sparsity_config.num_heads} heads, the model has {heads}"
            )
        self.num_attention_heads = heads
        self.attention_head_size = width // heads
        self.all_head_size = width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.sparse_self_attention = SparseSelfAttention(
            sparsity_config, max_seq_length=max_seq_length
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states: `[batch, tokens, hidden]`.
            attention_mask: added to the scores of keys: `[batch, tokens]`, with dimensions of 1
                anywhere.

        Returns `[batch, tokens, hidden]`.
        """
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        context = self.sparse_self_attention(q, k, v, key_padding_mask=attention_mask)
        return context.transpose(1, 2).flatten(2)


class TransformersSelfAttention(BertSparseSelfAttention):
    """In the place of BERT's and RoBERTa's self attention in transformers: their call and result.

    Args:
        config, sparsity_config, max_seq_length: as of `BertSparseSelfAttention`.
        original: the module that it replaces, whose projections it takes over.
    """

    def __init__(
        self,
        config: Any,
        sparsity_config: SparsityConfig | None,
        max_seq_length: int,
        original: nn.Module,
    ) -> None:
        super().__init__(config, sparsity_config, max_seq_length)
        projections = dict(original.named_children())
        for name in ("query", "key", "value"):
            setattr(self, name, projections[name])

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """The context, and None in place of the weights, which are never all there.

        attention_mask: of keys, as transformers makes it for any of its attentions: `[batch,
        tokens]`, or `[batch, 1, tokens or 1, tokens]` with equal rows; bool or integers: what is
        seen; floats: added. Raises ConfigError for a cache of keys or another sequence's states.
        """
        for name in ("past_key_values", "encoder_hidden_states"):
            if others.get(name) is not None:
                raise ConfigError(f"sparse self attention: {name}: got one, expected None")
        return super().forward(hidden_states, _of_keys(attention_mask, hidden_states.dtype)), None


def _of_keys(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of transformers as numbers to be added, `[batch, tokens]`."""
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[:, 0, 0]
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, -torch.inf)
