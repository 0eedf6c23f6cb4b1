"""Attention of queries over keys and values, for batches and for sequences packed together.

Source: Vaswani et al. 2017, equation 1; Dao et al. 2022, algorithms 1 and 4 (no matrix of scores in
memory, forward and backward); Ainslie et al. 2023 (shared key-value heads); Beltagy et al. 2020,
section 3.1 (window).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_like,
    expect_shape,
    expect_together,
    randn,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "attention"
#: Least and largest head size that kernels take; 8 divides it.
HEAD_SIZES = (16, 256)
#: Of a window: no bound on that side.
UNBOUNDED = -1


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    max_queries: int | None = None,
    max_keys: int | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    max_queries: int | None = None,
    max_keys: int | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    max_queries: int | None = None,
    max_keys: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`softmax(scale * q k^T) v` of each sequence and head, over the keys that a query sees.

    The last query is at the position of the last key: of `n` queries and `m` keys, query `i` is at
    `i + m - n`. A query that sees no key results in 0. Computed in fp32, without a matrix of scores
    in memory. Differentiable in q, k and v, through both results.

    Args:
        q: `[batch, queries, heads, d]`, fp32, bf16 or fp16; d from 16 to 256, a multiple of 8.
        k, v: `[batch, keys, kv_heads, d]`, q's dtype; heads is a multiple of kv_heads. All three
            may be views, such as thirds of `[batch, tokens, 3, heads, d]`: they are not copied as
            long as their last dimension is contiguous.
        causal: a query sees the keys up to its own position only.
        scale: of the scores, 0 or more; None: `1 / sqrt(d)`.
        window: `(left, right)`: a query sees that many keys before and behind its position, and the
            one there; -1: all of them. With `causal` a number: it sees this many keys, its own
            included, as in `paged_attention`.
        query_starts, key_starts: `[sequences + 1]`, int32: sequences packed one behind the other, q
            `[tokens, heads, d]`, k and v `[key tokens, kv_heads, d]`; where each begins, the first
            0, the last the number of tokens. A sequence may be empty. Without `key_starts` the keys
            begin where the queries do. None: a batch.
        max_queries, max_keys: of packed sequences: the longest one's tokens, or more; torch's own
            kernels for GPUs, which are used where they are faster, need to know; None: unknown.
        return_lse: also return the logarithm of the sum of each row's exponentiated scores, which
            results over parts of the keys are put together with.

    Returns q's shape and dtype; with `return_lse` also `[batch, heads, queries]`, or `[heads,
    tokens]` of packed sequences, fp32, -inf for a query that sees no key. Our kernels' results are
    the same bits in every run; torch's own gradients on GPUs are so under
    `torch.use_deterministic_algorithms`.

    Raises OpError for shapes, dtypes, starts or numbers that do not fit; starts on a GPU are not
    looked at.
    """
    if query_starts is not None and key_starts is None:
        key_starts = query_starts
    left, right = _bounds(causal, window)
    out, lse = run(
        NAME,
        *(_rows(t) for t in (q, k, v)),
        *(query_starts, key_starts),
        *(1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale, left, right),
        *(UNBOUNDED if most is None else most for most in (max_queries, max_keys)),
    )
    return (out, lse) if return_lse else out


def _bounds(causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    """How many keys are seen before and behind a query's position; `UNBOUNDED`: all."""
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    if isinstance(window, int):
        wanted = "a pair (left, right), or with causal=True a number of 1 or more"
        expect(causal and window >= 1, NAME, "window", window, wanted)
        return window - 1, 0
    left, right = window
    expect(min(left, right) >= UNBOUNDED, NAME, "window", window, "numbers of -1 (all) or more")
    return left, 0 if causal else right


def _rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return t if t.dim() and t.stride(-1) == 1 else t.contiguous()


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, by the matrix of scores of each sequence; both results.

    left, right: how many keys a query sees before and behind its position; -1: all.
    """
    check(q, k, v, query_starts, key_starts, scale, left, right, max_queries, max_keys)
    check_starts(q, k, query_starts, key_starts, max_queries, max_keys)
    outs, lses = [], []
    for rows, columns in sequences(q, k, query_starts, key_starts):
        own, keys = q[rows], k[columns]
        seen = visible(own.shape[-3], keys.shape[-3], left, right, q.device)
        out, lse = masked(own, keys, v[columns], scale, seen)
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses, -1))


def sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
) -> Iterator[tuple[slice, slice]]:
    """The rows of q, and those of k and v, of each packed sequence.

    Once all of a batch; once none if there is no sequence.
    """
    if query_starts is None or key_starts is None or len(query_starts) == 1:
        yield slice(None), slice(None)
        return
    rows, columns = query_starts.tolist(), key_starts.tolist()
    for i in range(len(rows) - 1):
        yield slice(rows[i], rows[i + 1]), slice(columns[i], columns[i + 1])


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both results of `[..., tokens, heads, d]`; seen: `[queries, keys]`, which each query sees."""
    queries, keys = (_by_head(t, q.shape[-2]) for t in (q, k))
    values = _by_head(v, q.shape[-2])
    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    lowest = scores.new_full((*scores.shape[:-1], 1), -torch.inf)  # there may be no key
    top = torch.cat([lowest, scores.detach()], -1).amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    none = ~seen.any(-1)
    total = torch.where(none[:, None], 1.0, total)
    out = (weights / total @ values).transpose(-2, -3)
    lse = (top + total.log()).squeeze(-1)
    return out.to(q.dtype).contiguous(), lse.masked_fill(none, -torch.inf)


def _by_head(t: torch.Tensor, heads: int) -> torch.Tensor:
    """`[..., heads, tokens, d]`, each head of keys or values as often as queries share it."""
    return wide(t).repeat_interleave(heads // t.shape[-2], -2).transpose(-2, -3)


def visible(
    queries: int, keys: int, left: int, right: int, device: torch.device | None = None
) -> torch.Tensor:
    """Which keys each query sees, `[queries, keys]`."""
    ahead = torch.arange(keys, device=device) - (
        torch.arange(queries, device=device)[:, None] + keys - queries
    )
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left != UNBOUNDED:
        seen &= ahead >= -left
    if right != UNBOUNDED:
        seen &= ahead <= right
    return seen


def backward_reference(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v: with `p = exp(scale * q k^T - lse)` of the keys that are seen,

    `dv = p^T grad`, `ds = p * (grad v^T - sum(grad * out) + grad_lse)`, `dq = scale * ds k`,
    `dk = scale * ds^T q`; k's and v's summed over the heads that share them.
    """
    check(q, k, v, query_starts, key_starts, scale, left, right, max_queries, max_keys)
    check_backward(grad, grad_lse, q, out, lse)
    check_starts(q, k, query_starts, key_starts, max_queries, max_keys)
    dq, dk, dv = backward_results(q, k, v)
    for rows, columns in sequences(q, k, query_starts, key_starts):
        own = slice(None) if query_starts is None else rows
        seen = visible(q[rows].shape[-3], k[columns].shape[-3], left, right, q.device)
        found = masked_backward(
            *(grad[rows], None if grad_lse is None else grad_lse[..., own]),
            *(q[rows], k[columns], v[columns], out[rows], lse[..., own], scale, seen),
        )
        for result, at, part in zip((dq, dk, dv), (rows, columns, columns), found, strict=True):
            result[at] = part.to(result.dtype)
    return dq, dk, dv


def masked_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients, not rounded, of what `masked` computes."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    g, queries, keys, values, results = (_by_head(t, heads) for t in (grad, q, k, v, out))
    scores = queries @ keys.transpose(-1, -2) * scale
    p = torch.where(seen, (scores - lse.unsqueeze(-1)).exp(), 0.0)
    inner = (g * results).sum(-1, keepdim=True)
    if grad_lse is not None:
        inner = inner - wide(grad_lse).unsqueeze(-1)
    ds = p * (g @ values.transpose(-1, -2) - inner) * scale
    dk, dv = (
        t.transpose(-2, -3).unflatten(-2, (kv_heads, heads // kv_heads)).sum(-2)
        for t in (ds.transpose(-1, -2) @ queries, p.transpose(-1, -2) @ g)
    )
    return (ds @ keys).transpose(-2, -3), dk, dv


def fake_results(
    q: torch.Tensor, query_starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for both results of checked arguments."""
    lead = q.shape[:-3] if query_starts is None else ()
    lse = q.new_empty((*lead, q.shape[-2], q.shape[-3]), dtype=wide_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def backward_results(*like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Room for gradients, contiguous whatever the tensors are."""
    return tuple(t.new_empty(t.shape) for t in like)


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    check(q, k, v, query_starts, key_starts, scale, left, right, max_queries, max_keys)
    return fake_results(q, query_starts)


def backward_fake(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    check(q, k, v, *rest)
    check_backward(grad, grad_lse, q, out, lse)
    return backward_results(q, k, v)


# --- Checks ---------------------------------------------------------------------------------------


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> None:
    """Raise OpError for what does not fit, as far as shapes, dtypes and numbers tell."""
    expect_float(NAME, "q", q)
    expect((query_starts is None) == (key_starts is None), NAME, "key_starts",
           "one of query_starts and key_starts", "both or none")  # fmt: skip
    if query_starts is None:
        dims, wanted = 4, "[batch, queries, heads, d], or query_starts"
    else:
        dims, wanted = 3, "[tokens, heads, d] with query_starts"
    expect(q.dim() == dims, NAME, "q", f"shape {list(q.shape)}", wanted)
    low, high = HEAD_SIZES
    d = q.shape[-1]
    allowed = low <= d <= high and d % 8 == 0
    expect(allowed, NAME, "q", f"heads of {d}", f"{low} to {high}, a multiple of 8")
    for name, t in (("k", k), ("v", v)):
        expect(t.dtype == q.dtype, NAME, name, t.dtype, q.dtype)
        fits = t.dim() == dims and t.shape[-1] == d and t.shape[:-3] == q.shape[:-3]
        lead = "".join(f"{size}, " for size in q.shape[:-3])
        expect(fits, NAME, name, f"shape {list(t.shape)}", f"[{lead}keys, kv_heads, {d}]")
        fits = t.shape[-2] > 0 and q.shape[-2] % t.shape[-2] == 0
        wanted = f"a divisor of q's {q.shape[-2]} heads"
        expect(fits, NAME, name, f"{t.shape[-2]} heads", wanted)
    expect_shape(NAME, "v", v, k.shape)
    expect_together(NAME, q, k=k, v=v, query_starts=query_starts, key_starts=key_starts)
    if query_starts is not None and key_starts is not None:
        fits = query_starts.dim() == 1 and len(query_starts) > 0
        told = f"shape {list(query_starts.shape)}"
        expect(fits, NAME, "query_starts", told, "[sequences + 1]")
        expect_shape(NAME, "key_starts", key_starts, query_starts.shape)
        for name, t in (("query_starts", query_starts), ("key_starts", key_starts)):
            expect(t.dtype is torch.int32, NAME, name, t.dtype, torch.int32)
    expect(math.isfinite(scale) and scale >= 0, NAME, "scale", scale, "a number of 0 or more")
    numbers = {"left": left, "right": right, "max_queries": max_queries, "max_keys": max_keys}
    for name, number in numbers.items():
        expect(number >= UNBOUNDED, NAME, name, number, "-1 or more")


def check_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Raise OpError for gradients that do not fit."""
    for name, t in (("grad", grad), ("out", out)):
        expect_like(f"{NAME}_backward", name, t, q)
    if grad_lse is not None:
        expect_like(f"{NAME}_backward", "grad_lse", grad_lse, lse)
    expect_together(f"{NAME}_backward", q, grad=grad, grad_lse=grad_lse, out=out, lse=lse)


def check_starts(
    q: torch.Tensor,
    k: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> None:
    """Raise OpError for starts with values that do not fit; waits for a GPU that they are on."""
    if query_starts is None or key_starts is None:
        return
    for name, starts, tokens, most in (
        ("query_starts", query_starts, len(q), max_queries),
        ("key_starts", key_starts, len(k), max_keys),
    ):
        values = starts.tolist()
        fits = values[0] == 0 and values[-1] == tokens
        told = f"from {values[0]} to {values[-1]}"
        expect(fits, NAME, name, told, f"from 0 to the {tokens} tokens")
        lengths = [after - before for before, after in itertools.pairwise(values)]
        expect(min(lengths, default=0) >= 0, NAME, name, "falling values", "rising values")
        longest = max(lengths, default=0)
        argument = name.replace("_starts", "").replace("query", "queries").replace("key", "keys")
        argument = f"max_{argument}"
        fits = most == UNBOUNDED or most >= longest
        expect(fits, NAME, argument, most, f"{longest}, the longest sequence, or more")


# --- Gradient -------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, query_starts, key_starts, *numbers = inputs
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, query_starts, key_starts)


def _backward(
    call: Callable[..., Any],
    ctx: Any,
    grad: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
) -> Any:
    q, k, v, out, lse, query_starts, key_starts = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * (5 + len(ctx.numbers))
    grad = torch.zeros_like(out) if grad is None else _rows(grad)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    tensors = (grad, grad_lse, q, k, v, out, lse, query_starts, key_starts)
    found = call("attention_backward", *tensors, *ctx.numbers)
    return (*found, None, None, *(None for _ in ctx.numbers))


# --- Tests and measures ---------------------------------------------------------------------------


def example(
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, int, int] | list[tuple[int, int]],
    heads: tuple[int, int] = (2, 1),
    d: int = 32,
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    bounded: bool = False,
) -> tuple[Any, ...]:
    """Arguments of a call.

    Args:
        lengths: of a batch: (batch, queries, keys); of packed sequences: (queries, keys) of each.
        bounded: packed sequences come with the length of the longest.
    """
    starts: list[torch.Tensor | None] = [None, None]
    most = [UNBOUNDED, UNBOUNDED]
    if isinstance(lengths, tuple):
        batch, *tokens = lengths
        shapes = [(batch, count) for count in tokens]
    else:
        each = [[0, *side] for side in zip(*lengths, strict=True)] or [[0], [0]]
        shapes = [(sum(side),) for side in each]
        starts = [torch.tensor(s).cumsum(0).to(device, torch.int32) for s in each]
        most = [max(side) if bounded else UNBOUNDED for side in each]
    q = randn(device, dtype, *shapes[0], heads[0], d)
    k, v = (randn(device, dtype, *shapes[1], heads[1], d, seed=seed) for seed in (1, 2))
    return (q, k, v, *starts, 1 / math.sqrt(d), *window, *most)


#: Packed: empty sequences, a single query, more queries than keys, none of either.
RAGGED = [(37, 37), (0, 5), (1, 90), (64, 64), (10, 0), (5, 2), (0, 0), (3, 70)]


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Batches and packed sequences; shared heads, odd sizes, windows, views, empty ones.

    All in fp32; of 16 bits only those that show what rounding does.
    """

    def made(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return example(device, dtype, *args, **kwargs)

    qkv = randn(device, dtype, 1, 70, 3, 2, 32)
    causal = (UNBOUNDED, 0)
    found = [
        made((2, 37, 37), (2, 1), 40, causal),
        made((1, 300, 300), (1, 1), 32, (200, 3)),
        made(RAGGED, (2, 1), 32, causal),
        made([(70, 70), (5, 5)], (1, 1), 256, causal),
    ]
    if dtype is not torch.float32:
        return found
    return [
        *found,
        (*qkv.unbind(2), None, None, 0.2, UNBOUNDED, UNBOUNDED),
        made((1, 21, 150), (3, 1), 80, causal),
        made((1, 150, 70), (2, 1), 16, causal),
        made((1, 90, 200), (1, 1), 24, (20, 0)),
        made((2, 1, 130), (4, 2), 64, causal),
        made(RAGGED[2:6], (1, 1), 16, (UNBOUNDED, 4), bounded=True),
        made((0, 4, 4)),
        made((2, 0, 3)),
        made((1, 3, 0)),
        made([]),
    ]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for index, args in enumerate(cases(device, dtype)):
        out, lse = reference(*args)
        grad = randn(device, dtype, *out.shape, seed=3)
        grad_lse = randn(device, lse.dtype, *lse.shape, seed=4) if index % 2 else None
        found.append((grad, grad_lse, *args[:3], out, lse, *args[3:]))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    q, k, v, *_ = example(device, torch.float32, (2, 6, 8), (4, 2))
    starts = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    packed: dict[str, Any] = {"q": q[0], "k": k[0, :6], "v": v[0, :6]}
    packed |= {"query_starts": starts, "key_starts": starts}

    def call(*numbers: Any, **changed: Any) -> tuple[Any, ...]:
        named = {"q": q, "k": k, "v": v, "query_starts": None, "key_starts": None} | changed
        return (*named.values(), *(numbers or (0.1, UNBOUNDED, 0)))

    found = [
        ("q: got torch.int64", call(q=q.long())),
        (r"q: got shape \[6, 4, 32\]", call(q=q[0])),
        (r"q: got shape .*with query_starts", call(**(packed | {"q": q}))),
        ("q: got heads of 8, expected 16 to 256", call(q=q[..., :8])),
        ("q: got heads of 20, expected .* multiple of 8", call(q=q[..., :20])),
        ("k: got torch.float16, expected torch.float32", call(k=k.half())),
        (r"k: got shape .*expected \[2, keys, kv_heads, 32\]", call(k=k[:1])),
        (r"v: got shape .*expected \[2, keys, kv_heads, 32\]", call(v=v[..., :16])),
        ("k: got 3 heads, expected a divisor of q's 4", call(k=k[:, :, :1].expand(-1, -1, 3, -1))),
        (r"v: got shape \[2, 7", call(v=v[:, :7])),
        ("key_starts: got .*both or none", call(**(packed | {"key_starts": None}))),
        ("query_starts: got torch.int64", call(**(packed | {"query_starts": starts.long()}))),
        ("key_starts: got shape", call(**(packed | {"key_starts": starts[:2]}))),
        ("query_starts: got shape", call(**(packed | {"query_starts": starts[:0]}))),
        ("scale: got nan", call(float("nan"), 1, 1)),
        ("scale: got -1.0, expected a number of 0 or more", call(-1.0, 1, 1)),
        ("left: got -2", call(0.1, -2, 1)),
        ("right: got -3", call(0.1, 2, -3)),
        ("max_keys: got -2", call(0.1, 2, 2, -1, -2)),
    ]
    if device.type != "cpu":
        return found
    return [
        *found,
        ("query_starts: got from 1 to 7, .*6 tokens",
         call(**(packed | {"query_starts": starts + 1}))),
        ("key_starts: got from 0 to 6, .*8 tokens", call(**(packed | {"k": k[0], "v": v[0]}))),
        ("query_starts: got falling values",
         call(**(packed | {"query_starts": starts * torch.tensor([1, 4, 1]).int()}))),
        ("max_queries: got 3, expected 4", call(0.1, -1, 0, 3, 9, **packed)),
        ("max_keys: got 1, expected 4", call(0.1, -1, 0, 4, 1, **packed)),
    ]  # fmt: skip


def pairs(*args: Any) -> int:
    """How many keys all queries of a call see together, of one head."""
    q, k, _, query_starts, key_starts, _, left, right, *_ = args
    if query_starts is None:
        lengths = [(q.shape[1], k.shape[1])] * len(q)
    else:
        sides = (starts.diff().tolist() for starts in (query_starts, key_starts))
        lengths = list(zip(*sides, strict=True))
    return sum(_seen(*each, left, right) for each in lengths)


def _seen(queries: int, keys: int, left: int, right: int) -> int:
    position = torch.arange(queries) + keys - queries
    low = (position - left).clamp(0) if left != UNBOUNDED else torch.zeros_like(position)
    last = torch.full_like(position, keys)
    high = (position + right + 1).clamp(max=keys) if right != UNBOUNDED else last
    return int((high - low).clamp(0).sum())


def floor(*args: Any) -> Floor:
    q, k, v, *_ = args
    read = q.nbytes + k.nbytes + v.nbytes
    written = q.nbytes + q[..., 0].numel() * 4
    return Floor(read, written, 4 * pairs(*args) * q.shape[-2] * q.shape[-1])


def backward_floor(*args: Any) -> Floor:
    grad, _, q, k, v, out, lse, *rest = args
    kv_bytes = k.nbytes + v.nbytes
    read = grad.nbytes + q.nbytes + kv_bytes + out.nbytes + lse.nbytes
    flops = 10 * pairs(q, k, v, *rest) * q.shape[-2] * q.shape[-1]
    return Floor(read, q.nbytes + kv_bytes, flops)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """Layers with heads of 64 and 128, a window, and sequences packed together."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    causal = (UNBOUNDED, 0)
    for label, lengths, heads, d, window, dtype in (
        ("causal 1x1024, heads 32/8 of 128", (1, 1024, 1024), (32, 8), 128, causal, torch.bfloat16),
        ("causal 1x1024, heads 32/8 of 128", (1, 1024, 1024), (32, 8), 128, causal, torch.float32),
        ("full 2x512, heads 12/12 of 64", (2, 512, 512), (12, 12), 64, (-1, -1), torch.bfloat16),
        ("window 256 of 1x4096, heads 8/8 of 64", (1, 4096, 4096), (8, 8), 64, (255, 0),
         torch.bfloat16),
        ("packed 512+256+256, heads 32/8 of 128", [(n, n) for n in (512, 256, 256)], (32, 8), 128,
         causal, torch.bfloat16),
    ):  # fmt: skip
        args = example(device, dtype, lengths, heads, d, window, bounded=True)
        found.append((f"{label} {str(dtype)[6:]}", args))
    return found


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found = []
    for label, args in benchmarks(device)[2:]:
        out, lse = reference(*args)
        found.append((label, (out.flip(0).contiguous(), None, *args[:3], out, lse, *args[3:])))
    return found


_NUMBERS = "float scale, int left, int right, int max_queries=-1, int max_keys=-1"
_STARTS = "Tensor? query_starts, Tensor? key_starts"

OPS = (
    Op(
        name=NAME,
        schema=f"(Tensor q, Tensor k, Tensor v, {_STARTS}, {_NUMBERS}) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        autograd=Autograd(_setup, _backward),
    ),
    Op(
        name="attention_backward",
        schema="(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
        f"Tensor lse, {_STARTS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=lambda device: [],
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
)
