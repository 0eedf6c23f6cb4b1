"""write_kv_cache: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestWriteKvCache(OpContract):
    op = "write_kv_cache_"
    compiled = False
