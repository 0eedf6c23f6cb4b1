"""bias_activation: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops.bias_activation import ACTIVATIONS
from ds_core.testing.contracts import OpContract

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
}


class TestBiasActivation(OpContract):
    op = "bias_activation"
    compiled = False


class TestBiasActivationBackward(OpContract):
    op = "bias_activation_backward"
    compiled = False


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_torch(activation: str, implementation: str) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
        y = (
            ops.run("bias_activation", x, bias, activation, impl=implementation)
            if ours
            else PLAIN[activation](x + bias)
        )
        (y * torch.linspace(-1, 1, 12, dtype=y.dtype)).sum().backward()
        found.append([y.detach(), x.grad, bias.grad])
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_comes_through_and_large_numbers_do_not_overflow(activation: str) -> None:
    x = torch.tensor([[float("nan"), -1e4, 1e4]])
    y = ds_ops.bias_activation(x, torch.zeros(3), activation)
    assert y[0, 0].isnan()
    assert y[0, 1].abs() <= 1e-30
    assert y[0, 2] == 1e4


def test_inputs_may_lie_otherwise_in_memory() -> None:
    x, bias = torch.randn(6, 4), torch.randn(8)[::2]
    found = ds_ops.bias_activation(x.t().contiguous().t(), bias, "relu")
    assert torch.equal(found, (x + bias).relu())


def test_no_bias_is_refused() -> None:
    with pytest.raises(OpError, match="bias_activation: bias: got None, expected a tensor"):
        ds_ops.bias_activation(torch.ones(2, 4), None)
