"""grouped_mm: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestGroupedMm(OpContract):
    op = "grouped_mm"


class TestGroupedMmBackward(OpContract):
    op = "grouped_mm_backward"
    compiled = False
