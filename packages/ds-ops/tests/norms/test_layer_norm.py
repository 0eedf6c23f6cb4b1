"""layer_norm: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestLayerNorm(OpContract):
    op = "layer_norm"
    compiled = False


class TestLayerNormBackward(OpContract):
    op = "layer_norm_backward"
    compiled = False
