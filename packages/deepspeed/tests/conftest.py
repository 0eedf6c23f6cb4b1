"""Lets the tests, and the ranks that they start, import the programs beside them."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(params=[0, 1, 2, 3], ids=["stage0", "stage1", "stage2", "stage3"])
def stage(request: pytest.FixtureRequest) -> int:
    """Every stage in turn."""
    return int(request.param)
