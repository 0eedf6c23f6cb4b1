"""Models and inputs made ready for sparse attention: `ds_ops.sparse_attention`."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "SparseAttentionUtils": "ds_ops.sparse_attention:SparseAttentionUtils",
    },
)
