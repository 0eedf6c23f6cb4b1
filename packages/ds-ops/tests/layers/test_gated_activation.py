"""swiglu and geglu: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core.testing.contracts import OpContract


class TestGatedActivation(OpContract):
    op = "gated_activation"
    compiled = False


class TestGatedActivationBackward(OpContract):
    op = "gated_activation_backward"
    compiled = False


class TestPacked(OpContract):
    op = "gated_activation_packed"
    compiled = False


class TestPackedBackward(OpContract):
    op = "gated_activation_packed_backward"
    compiled = False


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_both_forms_equal_torch_and_keep_only_inputs(name: str) -> None:
    x = torch.randn(5, 30, requires_grad=True)
    gate, up = (t.detach().requires_grad_() for t in x.chunk(2, -1))
    found = [_gated(name, x), _gated(name, gate, up)]
    plain = x.detach().clone().requires_grad_()
    a, b = plain.chunk(2, -1)
    act = F.silu(a) if name == "silu" else F.gelu(a, approximate="tanh" if "t" in name else "none")
    torch.testing.assert_close(found[0], act * b)
    for y in (*found, act * b):
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(torch.cat((gate.grad, up.grad), -1), plain.grad)


def _gated(name: str, *args: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        return ds_ops.swiglu(*args)
    return ds_ops.geglu(*args, approximate="tanh" if "t" in name else "none")


def test_tails_are_exact_where_the_definition_by_erf_cancels() -> None:
    v = torch.linspace(-12, -1, 1000)
    expected = 0.5 * v.double() * torch.erfc(v.double() * -(0.5**0.5))
    found = ds_ops.geglu(v, torch.ones_like(v)).double()
    # v^2 / 2 is rounded before its exponential: 36 ulp of it at v = -12, 3e-6
    assert float(((found - expected) / expected).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_come_through(dtype: torch.dtype) -> None:
    gate = torch.tensor([float("nan"), float("inf"), -1e4, 1e4, 1.0], dtype=dtype)
    up = torch.ones_like(gate)
    for y in (ds_ops.swiglu(gate, up), ds_ops.geglu(gate, up), ds_ops.geglu(gate, up, "tanh")):
        assert y[0].isnan()
        assert y[1] == float("inf")
        assert y[2].abs() <= 1e-30
        assert y[3] == gate[3]
    up[4] = float("nan")
    assert ds_ops.swiglu(gate, up)[4].isnan()
