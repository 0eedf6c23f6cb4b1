"""rms_norm: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core.ops.arguments import randn
from ds_core.testing.contracts import OpContract


class TestRmsNorm(OpContract):
    op = "rms_norm"


class TestRmsNormBackward(OpContract):
    op = "rms_norm_backward"
    compiled = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added_before_and_returned(dtype: torch.dtype) -> None:
    found = []
    for fused in (True, False):
        x, residual, weight = (
            randn(torch.device("cpu"), dtype, *s) for s in ((6, 40),) * 2 + ((40,),)
        )
        leaves = [x.requires_grad_(), (residual * 0.5).requires_grad_(), weight.requires_grad_()]
        x, residual, weight = leaves
        if fused:
            y, total = ds_ops.rms_norm(x, weight, residual=residual)
        else:
            total = x + residual
            y = F.rms_norm(total, (40,), weight, 1e-6)
        (y.float().square().sum() + (total.float() * torch.arange(40)).sum()).backward()
        found.append([y.detach(), total.detach(), *(t.grad for t in leaves)])
    for ours, plain in zip(*found, strict=True):
        rtol = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol)


def test_the_sum_alone_has_a_gradient() -> None:
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    ds_ops.rms_norm(x, torch.ones(8), residual=residual)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert torch.equal(residual.grad, torch.ones(3, 8))


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x = torch.randn(4, 50)
    x[1, 3], x[2, 49] = float("nan"), float("inf")
    y = ds_ops.rms_norm(x, torch.ones(50))
    assert y[1].isnan().all()
    assert y[2, 49].isnan()
    assert y[[0, 3]].isfinite().all()


def test_a_view_is_read_as_its_values() -> None:
    x, weight = torch.randn(8, 6), torch.rand(8)
    torch.testing.assert_close(
        ds_ops.rms_norm(x.t(), weight), F.rms_norm(x.t(), (8,), weight, 1e-6)
    )
