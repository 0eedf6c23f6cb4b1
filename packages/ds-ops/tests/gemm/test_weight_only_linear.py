"""weight_only_linear: every implementation against the reference."""

from __future__ import annotations

import torch

from ds_core.testing.contracts import OpContract
from ds_ops import quantize_weight, weight_only_linear


class TestWeightOnlyLinear(OpContract):
    op = "weight_only_linear"


class TestWeightOnlyLinearBackward(OpContract):
    op = "weight_only_linear_backward"
    compiled = False


def test_threads_know_nothing_of_inference_mode() -> None:
    x, weight = torch.randn(64, 1024), quantize_weight(torch.randn(2048, 1024), "int4")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = weight_only_linear(x, weight)
        with torch.inference_mode():
            again = weight_only_linear(x.clone(), weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, again)
