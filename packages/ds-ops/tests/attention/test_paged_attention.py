"""paged_attention: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestPagedAttention(OpContract):
    op = "paged_attention"
