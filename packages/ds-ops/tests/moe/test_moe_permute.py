"""moe_permute and moe_unpermute: every implementation against the reference, and a whole layer."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.testing.contracts import OpContract


class TestMoePermute(OpContract):
    op = "moe_permute"
    compiled = False


class TestMoeUnpermute(OpContract):
    op = "moe_unpermute"
    compiled = False


class TestMoeUnpermuteBackward(OpContract):
    op = "moe_unpermute_backward"
    compiled = False


def layer(x: torch.Tensor, gate: torch.Tensor, experts: torch.Tensor, k: int) -> torch.Tensor:
    """Experts as one matrix each, on the rows of their tokens."""
    routing = ds_ops.moe_gate(x @ gate, k)
    rows, offsets, row_map = ds_ops.moe_permute(x, routing.indices, experts.shape[0])
    ends = offsets.tolist()
    results = [
        rows[begin:end] @ expert
        for begin, end, expert in zip(ends, ends[1:], experts, strict=False)
    ]
    return ds_ops.moe_unpermute(torch.cat(results), row_map, routing.weights)


def dense_layer(x: torch.Tensor, gate: torch.Tensor, experts: torch.Tensor, k: int) -> torch.Tensor:
    """Every expert on every token, weighted by a mask."""
    p = (x @ gate).softmax(-1)
    best = p.topk(k)
    weights = torch.zeros_like(p).scatter(1, best.indices, best.values)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("te,th,ehf->tf", weights, x, experts)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_a_layer_equals_the_dense_computation(k: int) -> None:
    shapes = ((40, 16), (16, 6), (6, 16, 12))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = layer(*leaves, k), dense_layer(*truth, k)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(out)
    out.backward(seed)
    expected.backward(seed.double())
    for leaf, true in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad, true.grad.float(), rtol=1e-3, atol=1e-3)


def test_rows_of_an_expert_keep_the_order_of_tokens() -> None:
    x = torch.arange(5.0)[:, None]
    indices = torch.tensor([[2, 0], [0, 2], [2, 1], [0, 2], [2, 0]], dtype=torch.int32)
    rows, offsets, row_map = ds_ops.moe_permute(x, indices, 4)
    assert offsets.tolist() == [0, 4, 5, 10, 10]
    assert rows.flatten().tolist() == [0, 1, 3, 4, 2, 0, 1, 2, 3, 4]
    assert row_map.tolist() == [[5, 0], [1, 6], [7, 4], [2, 8], [9, 3]]


def test_first_choices_take_the_room_before_second_ones() -> None:
    x = torch.arange(3.0)[:, None] + 1
    indices = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32)
    rows, offsets, row_map = ds_ops.moe_permute(x, indices, 2, capacity=2)
    assert row_map.tolist() == [[0, 2], [3, -1], [1, -1]]
    assert offsets.tolist() == [0, 2, 4]
    assert rows.flatten().tolist() == [1, 3, 1, 2, 0, 0]


def test_what_is_dropped_has_no_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    indices = torch.tensor([[0], [0], [0]], dtype=torch.int32)
    rows, _, row_map = ds_ops.moe_permute(x, indices, 1, capacity=2)
    weights = torch.ones(3, 1, requires_grad=True)
    ds_ops.moe_unpermute(rows, row_map, weights).sum().backward()
    assert x.grad.sum(1).tolist() == [4, 4, 0]
    assert weights.grad[2] == 0


def test_rows_that_two_tokens_share_have_no_gradient() -> None:
    y = torch.randn(2, 4, requires_grad=True)
    shared = torch.tensor([[1], [1]], dtype=torch.int32)
    out = ds_ops.moe_unpermute(y, shared)
    assert torch.equal(out[0], y[1])
    with pytest.raises(RuntimeError, match="row_map: got row 1 twice"):
        out.sum().backward()


def test_gradients_with_wrong_sizes_are_refused() -> None:
    grad, y, weights = torch.ones(3, 4), torch.ones(6, 4), torch.ones(3, 2)
    row_map = torch.arange(6, dtype=torch.int32).view(3, 2)

    def call(*args: object) -> object:
        return ops.run("moe_unpermute_backward", *args, impl="cpp")

    for message, args in (
        ("grad: got shape", (grad[:2], y, row_map, weights, 6)),
        ("y: got shape", (grad, y[:5], row_map, weights, 6)),
        ("y: got None", (grad, None, row_map, weights, 6)),
        ("row_map: got 5", (grad, y[:5], row_map, weights, 5)),
        ("rows: got -1", (grad, y, row_map, weights, -1)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)


def test_a_layer_is_compiled_in_one_graph() -> None:
    x, gate = torch.randn(9, 8), torch.randn(8, 4)

    def routed(x: torch.Tensor) -> torch.Tensor:
        routing = ds_ops.moe_gate(x @ gate, 2)
        rows, _, row_map = ds_ops.moe_permute(x, routing.indices, 4)
        return ds_ops.moe_unpermute(rows * 2, row_map, routing.weights)

    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf), 2 * x)
    compiled(leaf).sum().backward()
    assert leaf.grad.isfinite().all()
