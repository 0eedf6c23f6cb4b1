"""cross_entropy: every implementation against the reference, and torch's own."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestCrossEntropy(OpContract):
    op = "cross_entropy"


class TestCrossEntropyInPlace(OpContract):
    op = "cross_entropy_"
    compiled = False
