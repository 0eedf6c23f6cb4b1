"""layer_norm: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core.testing.contracts import OpContract


class TestLayerNorm(OpContract):
    op = "layer_norm"
    compiled = False


class TestLayerNormBackward(OpContract):
    op = "layer_norm_backward"
    compiled = False


@pytest.mark.parametrize("biased", [False, True])
def test_it_equals_torch(biased: bool) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        x = (torch.randn(2, 5, 36) + 100).requires_grad_()  # far from 0: a variance of differences
        weight = torch.rand(36, requires_grad=True)
        bias = torch.rand(36, requires_grad=True) if biased else None
        y = ds_ops.layer_norm(x, weight, bias) if ours else F.layer_norm(x, (36,), weight, bias)
        y.square().sum().backward()
        leaves = [x, weight, bias] if biased else [x, weight]
        found.append([y.detach(), *(t.grad for t in leaves)])
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-3)


def test_a_residual_is_added_before_and_returned() -> None:
    x, residual = torch.randn(3, 20), torch.randn(3, 20)
    y, total = ds_ops.layer_norm(x, torch.ones(20), residual=residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, F.layer_norm(x + residual, (20,)))


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 20)
    x[1, 4] = float("nan")
    y = ds_ops.layer_norm(x, torch.ones(20), torch.zeros(20))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
