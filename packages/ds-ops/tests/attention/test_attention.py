"""attention: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

import itertools

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops.attention import RAGGED, cases, example
from ds_core.ops.checking import relative
from ds_core.testing.contracts import OpContract

CPU = torch.device("cpu")


class TestAttention(OpContract):
    op = "attention"


class TestAttentionBackward(OpContract):
    op = "attention_backward"
    compiled = False


def dense(q, k, v, mask=None, causal=False):
    """By torch's SDPA in float64, of `[batch, tokens, heads, d]`."""
    turned = (t.double().transpose(1, 2) for t in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(
        *turned, attn_mask=mask, is_causal=causal, enable_gqa=True
    )
    return found.transpose(1, 2)


def tensors(queries, keys, heads=(4, 2), d=32, dtype=torch.float32):
    return example(CPU, dtype, (2, queries, keys), heads, d)[:3]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_both_results_are_exact_in_fp32(impl):
    for args in cases(CPU, torch.float32):
        got = ops.run("attention", *args, impl=impl)
        wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        truth = ops.get("attention").reference(*wide)
        assert max(relative(a, b) for a, b in zip(got, truth, strict=True)) <= 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_torchs_attention(causal):
    q, k, v = tensors(70, 70)
    found = ds_ops.attention(q, k, v, causal=causal)
    torch.testing.assert_close(found, dense(q, k, v, causal=causal).float())


@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (20, 50), (300, 310)])
def test_the_last_query_sees_the_last_key(queries, keys):
    q, k, v = tensors(queries, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    found = ds_ops.attention(q, k, v, causal=True)
    torch.testing.assert_close(found, dense(q, k, v, mask).float())
    whole = ds_ops.attention(torch.cat([q, q], 1)[:, :queries], k, v, causal=True)
    torch.testing.assert_close(found, whole)


def test_queries_that_see_no_key_result_in_zero():
    q, k, v = (t.requires_grad_() for t in tensors(9, 4))
    out, lse = ds_ops.attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert (lse[..., :5] == -torch.inf).all()
    assert lse[..., 5:].isfinite().all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert torch.equal(q.grad[:, :5], torch.zeros_like(q[:, :5]))


@pytest.mark.parametrize("tokens", [40, 700])
def test_a_window_of_keys_is_that_of_paged_attention(tokens):
    q, k, v = tensors(tokens, tokens)
    found = ds_ops.attention(q, k, v, causal=True, window=7)
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    torch.testing.assert_close(found, dense(q, k, v, (ahead <= 0) & (ahead > -7)).float())
    assert torch.equal(found, ds_ops.attention(q, k, v, window=(6, 0)))
    assert torch.equal(found, ds_ops.attention(q, k, v, causal=True, window=(6, 99)))
    both = ds_ops.attention(q, k, v, window=(3, 2))
    torch.testing.assert_close(both, dense(q, k, v, (ahead <= 2) & (ahead >= -3)).float())


@pytest.mark.parametrize("window", [0, -1, (-2, 3), (1, -2)])
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(OpError, match="window: got"):
        ds_ops.attention(*tensors(4, 4), causal=True, window=window)
    with pytest.raises(OpError, match="with causal=True a number"):
        ds_ops.attention(*tensors(4, 4), window=3)


def test_packed_sequences_equal_each_alone():
    q, k, v, query_starts, key_starts, *_ = example(CPU, torch.float32, RAGGED, (4, 2))
    found, lse = ds_ops.attention(
        *(q, k, v), causal=True, query_starts=query_starts, key_starts=key_starts, return_lse=True
    )
    for (a, b), (c, d) in zip(
        *(itertools.pairwise(s.tolist()) for s in (query_starts, key_starts)), strict=True
    ):
        alone, logs = ds_ops.attention(
            q[None, a:b], k[None, c:d], v[None, c:d], causal=True, return_lse=True
        )
        torch.testing.assert_close(found[a:b], alone[0])
        torch.testing.assert_close(lse[:, a:b], logs[0])


def test_keys_begin_where_queries_do_unless_said():
    q, k, v, starts, *_ = example(CPU, torch.float32, [(5, 5), (0, 0), (9, 9)])
    found = ds_ops.attention(q, k, v, query_starts=starts)
    given = ds_ops.attention(q, k, v, query_starts=starts, key_starts=starts, max_queries=9)
    assert torch.equal(found, given)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_takes_both_results_into_account(impl, packed):
    lengths = [(5, 7), (3, 2), (0, 4)] if packed else (1, 6, 9)
    q, k, v, *rest = example(CPU, torch.float64, lengths, (2, 1), 16, (4, 0))
    scale = [rest[2], *rest[3:]]

    def call(q, k, v):
        out, lse = ops.run("attention", q, k, v, *rest[:2], *scale, impl=impl)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(call, leaves)


def test_parts_of_the_keys_are_put_together_by_lse():
    q, k, v = tensors(12, 30)
    whole = ds_ops.attention(q, k, v)
    parts = [
        ds_ops.attention(q, k[:, part], v[:, part], return_lse=True)
        for part in (slice(0, 11), slice(11, 30))
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
    together = sum(out * weight for (out, _), weight in zip(parts, weights, strict=True))
    torch.testing.assert_close(together, whole)


def test_a_packed_projection_is_not_copied(monkeypatch):
    qkv = torch.randn(2, 20, 3, 4, 16, requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    with ops.use(attention="reference"), torch.no_grad(), pytest.raises(TypeError):
        ds_ops.attention(*qkv.transpose(-1, -2).unbind(2))
    monkeypatch.undo()
    found = ds_ops.attention(*qkv.unbind(2), causal=True)
    found.square().sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in qkv.unbind(2)]
    own = ds_ops.attention(*copies, causal=True)
    own.square().sum().backward()
    assert torch.equal(found, own)
    assert torch.equal(qkv.grad, torch.stack([t.grad for t in copies], 2))


def test_a_gradient_that_is_expanded_is_taken():
    leaves = [t.requires_grad_() for t in tensors(20, 20)]
    ds_ops.attention(*leaves).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


def test_scores_far_apart_neither_overflow_nor_vanish():
    q, k, v = tensors(40, 40)
    assert ds_ops.attention(q, k, v, scale=1e4).isfinite().all()
    even = ds_ops.attention(q, k, v, scale=0.0)
    mean = v.mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(even)
    torch.testing.assert_close(even, mean)


def test_a_nan_is_not_hidden():
    q, k, v = tensors(20, 20)
    q[0, 3, 1, 5] = torch.nan
    out = ds_ops.attention(q, k, v)
    assert out[0, 3, 1].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q: got None, expected a tensor"),
        ({"v": [1.0]}, r"v: got \[1.0\], expected a tensor"),
        ({"q": torch.tensor(1.0)}, "q: got a scalar"),
        ({"window": "all"}, "window: got all, expected a pair"),
        ({"window": (1, 2, 3)}, r"window: got \(1, 2, 3\), expected a pair"),
    ],
)
def test_what_is_of_another_kind_is_refused(change: dict[str, object], message: str) -> None:
    given = {name: torch.ones(1, 4, 2, 16) for name in "qkv"} | change
    with pytest.raises(OpError, match=f"attention: {message}"):
        ds_ops.attention(**given)
