"""cross_entropy: every implementation against the reference, and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core.errors import DsError, OpError
from ds_core.ops import cross_entropy as module
from ds_core.testing.contracts import OpContract


class TestCrossEntropy(OpContract):
    op = "cross_entropy"


class TestCrossEntropyInPlace(OpContract):
    op = "cross_entropy_"
    compiled = False


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_torch(reduction: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 9, 300) * 3).to(dtype).requires_grad_()
    plain = logits.detach().float().requires_grad_()
    targets = torch.randint(0, 300, (2, 9))
    targets[1, 2:5] = -100
    ours = ds_ops.cross_entropy(logits, targets, label_smoothing=0.1, reduction=reduction)
    torchs = F.cross_entropy(
        plain.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction=reduction
    ).view(ours.shape)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    for loss in (ours, torchs):
        (loss * torch.linspace(0.5, 2, loss.numel()).view(loss.shape)).sum().backward()
    rtol = 1e-4 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(logits.grad.float(), plain.grad, rtol=rtol, atol=1e-5)


def test_a_mean_over_no_row_is_nan_and_its_gradient_zero() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = ds_ops.cross_entropy(logits, torch.full((3,), -100))
    loss.backward()
    assert loss.isnan()
    assert not logits.grad.any()
    assert ds_ops.cross_entropy(logits, torch.full((3,), -100), reduction="sum") == 0


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0])
def test_a_second_backward_gets_the_same_gradient(factor: float) -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = ds_ops.cross_entropy(logits, torch.arange(3)) * factor
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(first, second)
    expected = F.cross_entropy(logits, torch.arange(3)) * factor
    torch.testing.assert_close(first, torch.autograd.grad(expected, logits)[0])


def test_without_grad_there_is_no_gradient_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = module.run
    monkeypatch.setattr(module, "run", lambda *a: asked.append(a[-1]) or real(*a))
    logits = torch.randn(3, 5, requires_grad=True)
    with torch.no_grad():
        ds_ops.cross_entropy(logits, torch.arange(3))
    ds_ops.cross_entropy(logits, torch.arange(3))
    assert asked == [False, True]


def test_nan_and_infinity() -> None:
    logits = torch.randn(5, 4000)
    logits[0, 3999] = float("nan")
    logits[1, 5] = float("inf")
    logits[2, :3000] = float("-inf")  # more than a block of masked classes
    targets = torch.full((5,), 3500)
    targets[4] = 7
    logits[4, 7] = float("-inf")
    losses = ds_ops.cross_entropy(logits, targets, reduction="none")
    assert losses[:2].isnan().all()
    torch.testing.assert_close(losses[2:4], F.cross_entropy(logits, targets, reduction="none")[2:4])
    assert losses[4] == float("inf")


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]])
    losses = ds_ops.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    assert torch.equal(losses, torch.zeros(2))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows(reduction: str) -> None:
    logits = torch.empty(0, 7, requires_grad=True)
    loss = ds_ops.cross_entropy(logits, torch.empty(0, dtype=torch.int64), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.shape == (0,)
    loss.sum().backward()
    assert logits.grad.shape == (0, 7)


def test_bad_calls_say_what_is_wrong() -> None:
    logits = torch.randn(3, 5)
    with pytest.raises(DsError, match="reduction: got avg, expected mean or sum or none"):
        ds_ops.cross_entropy(logits, torch.arange(3), reduction="avg")
    with pytest.raises(DsError, match="targets"):
        ds_ops.cross_entropy(logits, torch.arange(2))
    with pytest.raises(RuntimeError, match="targets: got 5 at index 2, expected 0 to 4"):
        ds_ops.cross_entropy(logits, torch.tensor([0, -100, 5]))


def test_a_scalar_is_refused():
    with pytest.raises(OpError, match="cross_entropy: logits: got a scalar"):
        ds_ops.cross_entropy(torch.tensor(1.0), torch.tensor(0))
