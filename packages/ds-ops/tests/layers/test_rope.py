"""rope: every implementation against the reference, and what it is for."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestRope(OpContract):
    op = "rope"


class TestRopeInPlace(OpContract):
    op = "rope_"
    compiled = False
