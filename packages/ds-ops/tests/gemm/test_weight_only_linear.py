"""weight_only_linear: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch

from ds_core import ops
from ds_core.testing.contracts import OpContract
from ds_ops import quantize_weight, weight_only_linear


class TestWeightOnlyLinear(OpContract):
    op = "weight_only_linear"


class TestWeightOnlyLinearBackward(OpContract):
    op = "weight_only_linear_backward"
    compiled = False


@pytest.mark.parametrize("rows", [1, 40])
def test_every_byte_of_fp8_is_multiplied_as_what_it_is(rows: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 127) == 127, 1, codes).view(1, 256, 1).repeat(1, 1, 16)
    x = torch.eye(256)[:: 256 // rows].contiguous() if rows > 1 else torch.ones(1, 256)
    scales = torch.ones(1, 1, 16)
    for implementation in ("reference", "cpp"):
        if ops.available("weight_only_linear", "cpu").get(implementation) is None:
            found = ops.run(
                "weight_only_linear", x, codes, scales, None, None, 16, 8, impl=implementation
            )
            weight = codes[0].view(torch.float8_e4m3fn).float()
            assert torch.equal(found, x @ weight)


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
