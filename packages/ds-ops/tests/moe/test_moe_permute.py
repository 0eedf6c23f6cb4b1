"""moe_permute and moe_unpermute: every implementation against the reference, and a whole layer."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestMoePermute(OpContract):
    op = "moe_permute"
    compiled = False


class TestMoeUnpermute(OpContract):
    op = "moe_unpermute"
    compiled = False


class TestMoeUnpermuteBackward(OpContract):
    op = "moe_unpermute_backward"
    compiled = False
