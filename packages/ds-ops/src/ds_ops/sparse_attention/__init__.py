"""Block-sparse attention: layouts, and modules that attend by them.

    from ds_ops.sparse_attention import BigBirdSparsityConfig, SparseSelfAttention

    attention = SparseSelfAttention(BigBirdSparsityConfig(num_heads=12, block=64, seed=0))

DeepSpeed had these up to 0.18, under the same names.
"""

from __future__ import annotations

from ds_core.ops.block_layout import BlockLayout
from ds_core.ops.sparse_attention import block_sparse_attention
from ds_ops.sparse_attention.adapting import SparseAttentionUtils
from ds_ops.sparse_attention.attention import SparseSelfAttention
from ds_ops.sparse_attention.bert import BertSparseSelfAttention
from ds_ops.sparse_attention.layouts import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)
from ds_ops.sparse_attention.section import sparsity_config

__all__ = [
    "BSLongformerSparsityConfig",
    "BertSparseSelfAttention",
    "BigBirdSparsityConfig",
    "BlockLayout",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SparseAttentionUtils",
    "SparseSelfAttention",
    "SparsityConfig",
    "VariableSparsityConfig",
    "block_sparse_attention",
    "sparsity_config",
]
