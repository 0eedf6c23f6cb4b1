"""sparse_attention: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestSparseAttention(OpContract):
    op = "sparse_attention"


class TestSparseAttentionBackward(OpContract):
    op = "sparse_attention_backward"
    compiled = False
