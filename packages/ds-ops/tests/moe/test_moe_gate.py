"""moe_gate: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestMoeGate(OpContract):
    op = "moe_gate"


class TestMoeGateBackward(OpContract):
    op = "moe_gate_backward"
    compiled = False
