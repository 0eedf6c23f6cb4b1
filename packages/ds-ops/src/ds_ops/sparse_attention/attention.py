"""`SparseSelfAttention`: attention over the blocks of a layout, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from ds_core.errors import ConfigError
from ds_core.ops.arguments import expect, expect_tensors
from ds_core.ops.block_layout import BlockLayout
from ds_core.ops.sparse_attention import MODES, block_sparse_attention
from ds_ops.sparse_attention.layouts import SparsityConfig

_NAME = "SparseSelfAttention"


class SparseSelfAttention(nn.Module):
    """`softmax(q k^T / sqrt(d) + rpe + masks) v` over the blocks of a layout; it has no weights.

        attention = SparseSelfAttention(FixedSparsityConfig(num_heads=12), max_seq_length=4096)
        context = attention(query, key, value, key_padding_mask=mask)

    The layout is made once, for the longest sequences; shorter ones have its first rows and
    columns. It is the buffer `master_layout` of the state dict, `[heads, blocks, blocks]`, int64.

    Collective: a layout whose random blocks no seed decides is that of rank 0; where
    torch.distributed is initialized, all ranks must make the first call.

    Args:
        sparsity_config: the layout; for a unidirectional one, see `causal`.
        key_padding_mask_mode, attn_mask_mode: "add": the mask is added to the scores; "mul": what
            is 0 is not seen.
        max_seq_length: of the longest sequences; a multiple of the layout's block.
        causal: no query sees a later key in its own block either. By default it does, as in
            DeepSpeed, unless an `attn_mask` says otherwise.

    Raises ConfigError for lengths that do not fit the layout, OpError for unknown modes.
    """

    master_layout: torch.Tensor

    def __init__(
        self,
        sparsity_config: SparsityConfig,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(sparsity_config, SparsityConfig):
            told = type(sparsity_config).__name__
            raise ConfigError(f"{_NAME}: sparsity_config: got {told}, expected a SparsityConfig")
        modes = {"key_padding_mask_mode": key_padding_mask_mode, "attn_mask_mode": attn_mask_mode}
        for name, mode in modes.items():
            expect(mode in MODES, _NAME, name, mode, " or ".join(MODES))
        self.sparsity_config, self.causal = sparsity_config, causal
        self.key_padding_mask_mode, self.attn_mask_mode = key_padding_mask_mode, attn_mask_mode
        self.register_buffer("master_layout", sparsity_config.make_layout(max_seq_length))
        self._is_everywhere_alike = not sparsity_config.is_random
        self._layouts: dict[int, BlockLayout] = {}
        self.register_load_state_dict_post_hook(_forget_layouts)

    def layout(self, length: int) -> BlockLayout:
        """The layout for sequences of so many tokens, made at the first question.

        Raises ConfigError if blocks do not divide the length, or it is above `max_seq_length`.
        """
        block = self.sparsity_config.block
        longest = self.master_layout.shape[-1] * block
        if length % block or length > longest:
            raise ConfigError(
                f"{_NAME}: sequences of {length} tokens: expected a multiple of {block}, the "
                f"layout's block, up to max_seq_length, {longest}; "
                f"SparseAttentionUtils.pad_to_block_size pads them"
            )
        if not self._is_everywhere_alike:
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast(self.master_layout, src=0)
            self._is_everywhere_alike = True
        if length not in self._layouts:
            count = length // block
            blocks = self.master_layout[:, :count, :count]
            self._layouts[length] = BlockLayout(blocks, block, causal=self.causal)
        return self._layouts[length]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rpe: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query, key, value: `[batch, heads, tokens, d]`, one dtype: fp32, bf16 or fp16; key may
                also be `[batch, heads, d, tokens]`.
            rpe: added to the scaled scores; broadcast to `[batch, heads, tokens, tokens]`. It gets
                no gradient, and must not want one.
            key_padding_mask: `[batch, tokens]`, of keys, with dimensions of 1 anywhere.
            attn_mask: `[tokens, tokens]`, of pairs, with dimensions of 1 anywhere.

        Returns `[batch, heads, tokens, d]`; zeros for a query that sees no key.

        Raises OpError or ConfigError for what does not fit.
        """
        expect_tensors(_NAME, query=query, key=key, value=value)
        shape = f"shape {list(query.shape)}"
        expect(query.dim() == 4, _NAME, "query", shape, "[batch, heads, tokens, d]")
        batch, heads, length, _ = query.shape
        own = self.sparsity_config.num_heads
        expect(heads == own, _NAME, "query", f"{heads} heads", f"the layout's {own}")
        if key.shape != query.shape and key.shape[-1] == length:
            key = key.transpose(2, 3)
        return block_sparse_attention(
            *(query, key, value, self.layout(length)),
            rpe=rpe if rpe is None else _numbers(rpe, query),
            key_padding_mask=_mask(
                key_padding_mask, (batch, length), self.key_padding_mask_mode, query
            ),
            attn_mask=_mask(attn_mask, (length, length), self.attn_mask_mode, query),
            key_padding_mask_mode=self.key_padding_mask_mode,
            attn_mask_mode=self.attn_mask_mode,
        )

    def extra_repr(self) -> str:
        """The layout and its options."""
        return (
            f"{self.sparsity_config}, key_padding_mask_mode={self.key_padding_mask_mode!r}, "
            f"attn_mask_mode={self.attn_mask_mode!r}, causal={self.causal}"
        )


def _forget_layouts(module: nn.Module, incompatible: Any) -> None:
    """What was loaded may be another layout."""
    assert isinstance(module, SparseSelfAttention)
    module._layouts.clear()


def _mask(
    mask: torch.Tensor | None, shape: tuple[int, int], mode: str, query: torch.Tensor
) -> torch.Tensor | None:
    """A mask without its dimensions of 1, in a dtype that the op takes."""
    if mask is None:
        return None
    if mask.numel() == shape[0] * shape[1] and mask.shape != shape:
        mask = mask.reshape(shape)
    return mask if mask.dtype is torch.bool and mode == "add" else _numbers(mask, query)


def _numbers(t: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return t if t.dtype in (query.dtype, torch.float32) else t.to(query.dtype)
