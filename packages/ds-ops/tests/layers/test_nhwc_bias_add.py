"""nhwc_bias_add: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.testing.contracts import OpContract


class TestNhwcBiasAdd(OpContract):
    op = "nhwc_bias_add"


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("given", [2, 3, 4])
def test_it_equals_torch(given: int, implementation: str) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        shapes = ((2, 6, 3, 5), (6,), (2, 6, 3, 5), (6,))
        inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes[:given]]
        if ours:
            with ops.use(nhwc_bias_add=implementation):
                y = ds_ops.nhwc_bias_add(*inputs)
            assert y.is_contiguous(memory_format=torch.channels_last)
        else:
            y = sum(t if t.dim() == 4 else t[:, None, None] for t in inputs)  # type: ignore[assignment]
        (y * torch.linspace(-1, 1, 5, dtype=y.dtype)).sum().backward()
        found.append([y.detach(), *(t.grad for t in inputs)])
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_a_bias_of_nothing_is_refused() -> None:
    x = torch.ones(1, 4, 2, 2)
    with pytest.raises(OpError, match="other_bias: got a tensor, expected None"):
        ds_ops.nhwc_bias_add(x, torch.ones(4), None, torch.ones(4))


def test_no_bias_is_refused() -> None:
    with pytest.raises(OpError, match="nhwc_bias_add: bias: got None, expected a tensor"):
        ds_ops.nhwc_bias_add(torch.ones(1, 4, 2, 2), None)
