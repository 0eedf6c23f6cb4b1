"""moe_gate: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.testing.contracts import OpContract


class TestMoeGate(OpContract):
    op = "moe_gate"


class TestMoeGateBackward(OpContract):
    op = "moe_gate_backward"
    compiled = False


def test_weights_are_of_the_largest_probabilities() -> None:
    logits = torch.randn(50, 24)
    weights, indices, counts, probabilities = ds_ops.moe_gate(logits, 3, normalize=False)
    best = logits.softmax(-1).topk(3)
    torch.testing.assert_close(weights, best.values)
    assert torch.equal(indices.long(), best.indices)
    assert torch.equal(counts.long(), indices.flatten().bincount(minlength=24))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(50))


def test_of_equal_ones_the_lowest_is_chosen() -> None:
    _, indices, counts, _ = ds_ops.moe_gate(torch.zeros(3, 40), 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 3
    assert counts.tolist() == [3] * 4 + [0] * 36


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("groups", [1, 4])
def test_indices_are_valid_whatever_the_logits(scoring: str, value: float, groups: int) -> None:
    logits = torch.randn(6, 20)
    logits[1, 3] = value
    logits[2] = value
    logits[3, ::2] = value
    logits[4, :19] = value
    result = ds_ops.moe_gate(logits, 5, scoring=scoring, groups=groups, top_groups=groups // 2 or 1)
    assert all(
        len(set(row)) == 5 and 0 <= min(row) <= max(row) < 20 for row in result.indices.tolist()
    )
    assert result.counts.sum() == 30
    args = (logits, 5, True, scoring, None, groups, groups // 2 or 1, 1.0)
    reference = ops.get("moe_gate").reference(*args)
    assert torch.equal(result.indices, reference[1])
    torch.testing.assert_close(result.weights, reference[0], equal_nan=True)


def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    bias = torch.tensor([0.0, 0.0, 10.0, 0.0])
    weights, indices, _, p = ds_ops.moe_gate(logits, 2, normalize=False, bias=bias)
    assert indices.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, p[:, [2, 0]])


def test_only_the_best_groups_are_chosen_from() -> None:
    logits = torch.randn(64, 32)
    result = ds_ops.moe_gate(logits, 4, scoring="sigmoid", groups=8, top_groups=2)
    groups = result.indices // 4
    assert all(len(set(row)) <= 2 for row in groups.tolist())
    best = logits.sigmoid().unflatten(1, (8, 4)).topk(2).values.sum(-1).topk(2).indices
    assert all(set(a) <= set(b) for a, b in zip(groups.tolist(), best.tolist(), strict=True))


def test_losses_of_balance_reach_the_logits() -> None:
    logits = torch.randn(30, 8, dtype=torch.float32, requires_grad=True)
    result = ds_ops.moe_gate(logits, 2)
    loss = 8 * (result.probabilities.mean(0) * result.counts / 60).sum()
    (loss + result.weights[:, 0].sum()).backward()
    own = logits.detach().double().requires_grad_()
    p = own.softmax(-1)
    chosen = p.gather(1, result.indices.long())
    expected = 8 * (p.mean(0) * result.counts / 60).sum() + (chosen[:, 0] / chosen.sum(-1)).sum()
    expected.backward()
    torch.testing.assert_close(logits.grad, own.grad.float(), rtol=1e-5, atol=1e-7)
