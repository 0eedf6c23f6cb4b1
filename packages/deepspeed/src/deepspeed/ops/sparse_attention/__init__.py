"""Block-sparse attention, as the original had it up to 0.18: `ds_ops.sparse_attention`."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "SparsityConfig": "ds_ops.sparse_attention:SparsityConfig",
        "DenseSparsityConfig": "ds_ops.sparse_attention:DenseSparsityConfig",
        "FixedSparsityConfig": "ds_ops.sparse_attention:FixedSparsityConfig",
        "VariableSparsityConfig": "ds_ops.sparse_attention:VariableSparsityConfig",
        "BigBirdSparsityConfig": "ds_ops.sparse_attention:BigBirdSparsityConfig",
        "BSLongformerSparsityConfig": "ds_ops.sparse_attention:BSLongformerSparsityConfig",
        "LocalSlidingWindowSparsityConfig": (
            "ds_ops.sparse_attention:LocalSlidingWindowSparsityConfig"
        ),
        "SparseSelfAttention": "ds_ops.sparse_attention:SparseSelfAttention",
        "BertSparseSelfAttention": "ds_ops.sparse_attention:BertSparseSelfAttention",
        "SparseAttentionUtils": "ds_ops.sparse_attention:SparseAttentionUtils",
    },
    submodules=(
        *("bert_sparse_self_attention", "matmul", "softmax", "sparse_attention_utils"),
        *("sparse_self_attention", "sparsity_config"),
    ),
)
