from __future__ import annotations

import pytest
from zero_loops import compare
from zero_models import CASES

from ds_core.testing import run_ranks


@pytest.mark.parametrize("name", sorted(CASES))
def test_sharded_training_equals_one_process(name: str, stage: int):
    run_ranks(2, compare, name, stage, timeout_s=12)
