"""rms_norm: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestRmsNorm(OpContract):
    op = "rms_norm"


class TestRmsNormBackward(OpContract):
    op = "rms_norm_backward"
    compiled = False
