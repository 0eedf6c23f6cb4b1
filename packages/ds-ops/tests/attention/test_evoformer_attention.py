"""evoformer_attention: every implementation against the reference, and that against torch."""

from __future__ import annotations

import functools

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops import evoformer_attention as op
from ds_core.testing.contracts import OpContract
from ds_ops.torch_kernels import evoformer_attention as chunks


class TestEvoformerAttention(OpContract):
    op = "evoformer_attention"


class TestEvoformerAttentionBackward(OpContract):
    op = "evoformer_attention_backward"
    compiled = False


def leaves(
    residues: int, first: bool = True, second: bool = True, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    made: list[torch.Tensor | None] = [
        torch.randn(2, 3, residues, 2, 4, dtype=dtype, requires_grad=True) for _ in range(3)
    ]
    shapes = (2, 3, 1, 1, residues), (2, 1, 2, residues, residues)
    for wanted, shape in zip((first, second), shapes, strict=True):
        made.append(torch.randn(shape, dtype=dtype, requires_grad=True) if wanted else None)
    return made


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
) -> torch.Tensor:
    """Written as AlphaFold's own code is."""
    q, k, v = (t.transpose(2, 3) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    for bias in (bias1, bias2):
        scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(2, 3)


@pytest.mark.parametrize("residues", [1, 5, 16, 21])
@pytest.mark.parametrize(
    ("first", "second"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_it_equals_plain_torch(residues: int, first: bool, second: bool) -> None:
    found = []
    for function in (ds_ops.evoformer_attention, plain):
        inputs = leaves(residues, first, second)
        out = function(*inputs)  # type: ignore[operator]
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        found.append([out.detach(), *(t.grad for t in inputs if t is not None)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_its_gradients_are_those_of_differences(implementation: str) -> None:
    call = functools.partial(ops.run, "evoformer_attention", impl=implementation)
    inputs = [None if t is None else t.detach()[:1].requires_grad_() for t in leaves(3)]
    assert torch.autograd.gradcheck(lambda *args: call(*args, 0.5)[0], inputs)


def test_only_gradients_that_are_wanted_are_made() -> None:
    q, k, v, bias1, bias2 = (t.detach() if t is not None else None for t in leaves(4))
    assert q is not None
    assert bias1 is not None
    found = op.with_gradient((q, k, v, bias1, bias2, 0.5), (False, True))
    *_, first, second = ops.run("evoformer_attention_backward", *found)
    assert first.shape == (0,)
    assert bias2 is not None
    assert second.shape == bias2.shape
    out = ds_ops.evoformer_attention(q, k, v, bias1.requires_grad_(), bias2)  # type: ignore[arg-type]
    out.sum().backward()
    assert bias1.grad is not None


def test_a_query_whose_keys_are_all_masked_gets_zeros_and_gives_no_gradient() -> None:
    inputs = leaves(6)
    bias1 = inputs[3]
    assert bias1 is not None
    bias1.data[0, 1] = -torch.inf
    out = ds_ops.evoformer_attention(*inputs)  # type: ignore[arg-type]
    assert torch.equal(out[0, 1], torch.zeros_like(out[0, 1]))
    out.sum().backward()
    for t in inputs:
        assert t is not None
        assert t.grad is not None
        assert t.grad.isfinite().all()
    assert bias1.grad is not None
    assert not bias1.grad[0, 1].any()


def test_nan_comes_through() -> None:
    q, k, v, bias1, bias2 = leaves(4)
    assert bias1 is not None
    bias1.data[1, 2, 0, 0, 1] = torch.nan
    out = ds_ops.evoformer_attention(q, k, v, bias1, bias2)  # type: ignore[arg-type]
    assert out[1, 2].isnan().all()
    assert out[0].isfinite().all()


def test_how_many_sequences_are_computed_at_once_changes_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def watched(*args: object) -> torch.Tensor:
        scores = plain_scores(*args)  # type: ignore[arg-type]
        seen.append(scores.numel())
        return scores

    plain_scores = chunks._scores
    monkeypatch.setattr(chunks, "_scores", watched)
    found = []
    for most in (1 << 30, 1):
        monkeypatch.setattr(chunks, "_MOST_BYTES", most)
        inputs = leaves(5, dtype=torch.float32)
        ds_ops.evoformer_attention(*inputs).square().sum().backward()  # type: ignore[arg-type]
        found.append([t.grad for t in inputs if t is not None])
    assert max(seen[-1:]) == 2 * 5 * 5  # the scores of one sequence
    assert seen[0] == 3 * 2 * 5 * 5
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts)


def test_without_biases_no_matrix_of_scores_is_in_memory() -> None:
    made = leaves(9, first=False, second=False, dtype=torch.float32)
    with torch.profiler.profile() as profile:
        op.evoformer_attention(*made).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not names & {"aten::softmax", "aten::_softmax", "aten::_safe_softmax", "aten::bmm"}


def test_inputs_may_lie_otherwise_in_memory() -> None:
    q, k, v, bias1, bias2 = (None if t is None else t.detach() for t in leaves(5))
    assert q is not None
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    first = ds_ops.evoformer_attention(turned, k, v, bias1, bias2)  # type: ignore[arg-type]
    assert torch.equal(first, ds_ops.evoformer_attention(q, k, v, bias1, bias2))  # type: ignore[arg-type]


def test_bad_input_is_refused_without_biases_too() -> None:
    x = torch.ones(2, 3, 4, 8)
    with pytest.raises(OpError, match=r"q: got shape \[2, 3, 4, 8\], expected \[batch, N_seq"):
        ds_ops.evoformer_attention(x, x, x)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((None,), "k: got None, expected a tensor"),
        (
            (
                torch.ones(1, 2, 3, 1, 8),
                torch.ones(1, 2, 3, 1, 8),
                [torch.ones(1, 2, 3, 1, 8), torch.ones(1, 2, 3, 1, 8)],
            ),
            r"bias1: got \[tensor",
        ),
        (
            (torch.ones(1, 2, 3, 1, 8), torch.ones(1, 2, 3, 1, 8), None, None, torch.nan),
            "scale: got nan, expected a finite number",
        ),
    ],
)
def test_what_is_of_another_kind_is_refused(args: tuple[object, ...], message: str) -> None:
    """Such as the original's list of biases."""
    given = dict(zip(("k", "v", "bias1", "bias2", "scale"), args, strict=False))
    with pytest.raises(OpError, match=f"evoformer_attention: {message}"):
        ds_ops.evoformer_attention(
            torch.ones(1, 2, 3, 1, 8), **{"v": torch.ones(1, 2, 3, 1, 8), **given}
        )
