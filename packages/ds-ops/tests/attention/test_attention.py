"""attention: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestAttention(OpContract):
    op = "attention"


class TestAttentionBackward(OpContract):
    op = "attention_backward"
    compiled = False
