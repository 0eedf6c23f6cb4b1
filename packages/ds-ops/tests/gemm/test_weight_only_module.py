"""WeightOnlyLinear: a module in place of nn.Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_ops
from ds_core.errors import OpError
from ds_ops import WeightOnlyLinear, weight_only_linear


def _linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 40, bias=bias)


@pytest.mark.parametrize(
    ("format", "error"),
    [("int8", 0.01), ("fp8_e4m3", 0.03), ("fp6_e3m2", 0.05), ("int4", 0.13)],
)
def test_it_stands_in_for_a_linear_layer(format: str, error: float) -> None:
    linear = _linear()
    layer = WeightOnlyLinear.from_linear(linear, format, group=64)
    x = torch.randn(2, 5, 128)
    y = layer(x)
    exact = nn.functional.linear(x, layer.weight.dequantize(), linear.bias)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    assert (y - linear(x)).norm() <= error * linear(x).norm()
    assert f"format='{format}', group=64" in repr(layer)


def test_its_state_dict_loads_into_another_layer() -> None:
    layer = WeightOnlyLinear.from_linear(_linear(), "int4", group=32, symmetric=False)
    other = WeightOnlyLinear.from_linear(nn.Linear(128, 40), "int4", group=32, symmetric=False)
    assert set(layer.state_dict()) == {"codes", "scales", "zeros", "bias"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), other(x))


def test_gradients_pass_through_it() -> None:
    layer = WeightOnlyLinear.from_linear(_linear(), "int4", group=32)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).square().sum().backward()
    dense = layer.weight.dequantize()
    grad = 2 * nn.functional.linear(x.detach(), dense, layer.bias.detach())
    torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-4, atol=1e-4)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_bytes_of_fp8_survive_a_change_of_dtype() -> None:
    layer = WeightOnlyLinear.from_linear(_linear(), "fp8_e4m3", group=64)
    x, codes = torch.randn(3, 128), layer.codes.clone()
    before = layer(x)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, codes)
    error = layer(x.bfloat16()).float() - before
    assert error.norm() < 0.01 * before.norm()


def test_x_of_another_width_is_refused() -> None:
    layer = WeightOnlyLinear.from_linear(_linear(bias=False), "int8", group=32)
    with pytest.raises(OpError, match=r"x: got shape \[2, 127\]"):
        weight_only_linear(torch.ones(2, 127), layer.weight)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_it_compiles_without_breaks() -> None:
    layer = WeightOnlyLinear.from_linear(_linear(), "int8", group=64)
    x = torch.randn(3, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_is_of_another_kind_is_refused():
    w = ds_ops.quantize_weight(torch.ones(16, 128))
    made = "WeightOnlyLinear"
    for call, message in (
        (lambda: ds_ops.WeightOnlyLinear(torch.ones(16, 128)), f"{made}: weight: got Tensor"),
        (lambda: ds_ops.WeightOnlyLinear(w, torch.ones(3)), f"{made}: bias: got shape \\[3\\]"),
        (
            lambda: ds_ops.WeightOnlyLinear.from_linear(nn.ReLU()),
            "linear: got ReLU, expected a torch",
        ),
        (
            lambda: ds_ops.weight_only_linear(torch.ones(128), torch.ones(16, 128)),
            "weight: got Tensor",
        ),
        (
            lambda: ds_ops.quantize_weight(torch.ones(16, 128, device="meta")),
            "w: got .* data .meta.",
        ),
        (lambda: ds_ops.quantize_weight([1.0]), "w: got \\[1.0\\], expected a tensor"),
    ):
        with pytest.raises(OpError, match=message):
            call()
