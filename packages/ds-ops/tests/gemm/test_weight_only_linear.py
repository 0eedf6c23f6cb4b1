"""weight_only_linear: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestWeightOnlyLinear(OpContract):
    op = "weight_only_linear"


class TestWeightOnlyLinearBackward(OpContract):
    op = "weight_only_linear_backward"
    compiled = False
