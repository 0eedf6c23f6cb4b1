"""swiglu and geglu: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestGatedActivation(OpContract):
    op = "gated_activation"
    compiled = False


class TestGatedActivationBackward(OpContract):
    op = "gated_activation_backward"
    compiled = False


class TestPacked(OpContract):
    op = "gated_activation_packed"
    compiled = False


class TestPackedBackward(OpContract):
    op = "gated_activation_packed_backward"
    compiled = False
