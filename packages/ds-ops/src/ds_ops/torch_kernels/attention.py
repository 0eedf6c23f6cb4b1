"""attention by torch's own kernels: flash attention on CPUs, and on GPUs what is faster than ours.

On a GPU 16-bit calls go to cuDNN (sm_90 and newer) or flash attention (sm_80 and its kin), fp32 is
computed by matrix products of some queries at a time; what torch computes no better is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ds_core.ops.attention import (
    UNBOUNDED,
    backward_fake,
    check_starts,
    fake,
    masked,
    masked_backward,
    sequences,
)
from ds_ops.torch_kernels import attention_gpu as gpu

aten = torch.ops.aten

#: Queries that are masked together, and scores that are in memory at a time.
_ROWS, _SCORES = 256, 1 << 24
#: Rows, keys that they see, mask to add to scores or None, whether they are masked as causal.
_Piece = tuple[slice, slice, torch.Tensor | None, bool]


def attention(
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
    """As `ds_core.ops.attention.reference`."""
    rest = (query_starts, key_starts, scale, left, right, max_queries, max_keys)
    out, lse = fake(q, k, v, *rest)
    if q.device.type != "cpu":
        if gpu.library(q, k, *rest) is not None:
            return gpu.forward(q, k, v, *rest)
        return _plain(q, k, v, *rest)
    check_starts(q, k, query_starts, key_starts, max_queries, max_keys)
    out.zero_()
    lse.fill_(-torch.inf)
    for rows, columns in sequences(q, k, query_starts, key_starts):
        queries, results = _batch(q[rows]), _batch(out[rows])
        keys, values = _batch(k[columns]), _batch(v[columns])
        logs = _batch(lse[..., rows if query_starts is not None else slice(None)], 3)
        for part, seen, mask, causal in _pieces(queries, keys, left, right):
            own = (queries[:, :, part], keys[:, :, seen], values[:, :, seen], 0.0, causal)
            found = aten._scaled_dot_product_flash_attention_for_cpu(
                *own, attn_mask=mask, scale=scale
            )
            results[:, :, part], logs[..., part] = found
    return out, lse


def attention_backward(
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
    """As `ds_core.ops.attention.backward_reference`."""
    rest = (query_starts, key_starts, scale, left, right, max_queries, max_keys)
    dq, dk, dv = backward_fake(grad, grad_lse, q, k, v, out, lse, *rest)
    on_cpu = q.device.type == "cpu"
    if not on_cpu and gpu.library(q, k, *rest) is not None:
        return gpu.backward(grad, q, k, v, out, lse, *rest)
    if on_cpu:
        check_starts(q, k, query_starts, key_starts, max_queries, max_keys)
    if grad_lse is not None or not on_cpu:
        return _plain_backward(grad, grad_lse, q, k, v, out, lse, *rest)
    if q.dtype is torch.float16:  # whose last bits would depend on the number of threads
        g, *widened = (t.float() for t in (grad, q, k, v, out))
        found = attention_backward(
            g, None, widened[0], widened[1], widened[2], widened[3], lse, *rest
        )
        return found[0].half(), found[1].half(), found[2].half()
    dq.zero_()
    sums = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (dk, dv)
    ]
    for rows, columns in sequences(q, k, query_starts, key_starts):
        logs = _batch(lse[..., rows if query_starts is not None else slice(None)], 3)
        g, queries, results, own_dq = (_batch(t[rows]) for t in (grad, q, out, dq))
        keys, values, own_dk, own_dv = (_batch(t[columns]) for t in (k, v, *sums))
        for part, seen, mask, causal in _pieces(queries, keys, left, right):
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(g[:, :, part], queries[:, :, part], keys[:, :, seen], values[:, :, seen]),
                *(results[:, :, part], logs[..., part], 0.0, causal),
                attn_mask=mask,
                scale=scale,
            )
            own_dq[:, :, part] = found[0]
            own_dk[:, :, seen] += found[1]
            own_dv[:, :, seen] += found[2]
    return dq, sums[0].to(k.dtype), sums[1].to(v.dtype)


def _batch(t: torch.Tensor, dims: int = 4) -> torch.Tensor:
    """A view with a batch in front; of tensors with heads of vectors as `[batch, heads, ...]`."""
    whole = t if t.dim() == dims else t.unsqueeze(0)
    return whole.transpose(1, 2) if dims == 4 else whole


def _pieces(q: torch.Tensor, k: torch.Tensor, left: int, right: int) -> Iterator[_Piece]:
    """What torch's kernel for CPUs is called with; rows that see no key are in none.

    It masks what is square and causal; for all else some rows come with the keys of theirs and a
    mask, so that a long sequence has no mask of its square.
    """
    rows, keys = q.shape[2], k.shape[2]
    shift = keys - rows
    left = keys + rows if left == UNBOUNDED else left
    right = keys + rows if right == UNBOUNDED else right
    if not (q.numel() and keys):
        return
    everything = slice(0, rows), slice(0, keys)
    from_all_rows = left >= keys - 1  # as far as the last one needs it
    if from_all_rows and (right >= rows - 1 or (right == 0 and rows == keys)):
        yield *everything, None, right == 0 and rows > 1
        return
    first, end = max(0, -right - shift), min(rows, keys + left - shift)
    for begin in range(first, end, _ROWS):
        stop = min(begin + _ROWS, end)
        low, high = max(0, begin + shift - left), min(keys, stop + shift + right)
        position = torch.arange(begin, stop)[:, None] + shift
        ahead = torch.arange(low, high) - position
        hidden = (ahead < -left) | (ahead > right)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        yield slice(begin, stop), slice(low, high), mask, False


# --- Plain ----------------------------------------------------------------------------------------


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    *most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By products with all keys, of some queries at a time; looks at no value."""
    seen = _sight(q, k, query_starts, key_starts, left, right)
    found = [masked(q.narrow(-3, *part), k, v, scale, seen(*part)) for part in _chunks(q, k)]
    return torch.cat([out for out, _ in found], -3), torch.cat([lse for _, lse in found], -1)


def _plain_backward(
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
    *most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = []
    dk, dv = (
        torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
        for t in (k, v)
    )
    seen = _sight(q, k, query_starts, key_starts, left, right)
    for part in _chunks(q, k):
        g, queries, results = (t.narrow(-3, *part) for t in (grad, q, out))
        of_lse = None if grad_lse is None else grad_lse.narrow(-1, *part)
        logs = lse.narrow(-1, *part)
        found = masked_backward(g, of_lse, queries, k, v, results, logs, scale, seen(*part))
        parts.append(found[0].to(q.dtype))
        dk, dv = dk + found[1], dv + found[2]
    dq = torch.cat(parts, -3).clone(memory_format=torch.contiguous_format)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The first query, and how many; at least one chunk."""
    tokens = q.shape[-3]
    each = q.shape[:-3].numel() * q.shape[-2] * k.shape[-3]
    step = max(1, _SCORES // max(1, each))
    for begin in range(0, max(tokens, 1), step):
        yield begin, min(step, tokens - begin)


def _sight(
    q: torch.Tensor,
    k: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    left: int,
    right: int,
) -> Callable[[int, int], torch.Tensor]:
    """What tells which keys some rows see, `[rows, keys]`, worked out on their device."""
    row, of_row = _places(q, query_starts)
    column, of_column = _places(k, key_starts)

    def seen(*part: int) -> torch.Tensor:
        ahead = column - row.narrow(0, *part).unsqueeze(1)
        found = of_column == of_row.narrow(0, *part).unsqueeze(1)
        if left != UNBOUNDED:
            found = found & (ahead >= -left)
        if right != UNBOUNDED:
            found = found & (ahead <= right)
        return found

    return seen


def _places(t: torch.Tensor, starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token: its place, counted from its sequence's end, and its sequence."""
    at = torch.arange(t.shape[-3], device=t.device)
    if starts is None:
        return at - t.shape[-3], torch.zeros_like(at)
    ends = starts.narrow(0, 1, len(starts) - 1)
    if not len(at):
        return at, at
    sequence = torch.bucketize(at, ends, right=True)
    return at - ends.index_select(0, sequence.clamp(max=len(ends) - 1)), sequence


def not_taken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    """Why a call of `attention` is not taken, or None."""
    if q.device.type == "cpu" or q.dtype not in gpu.DTYPES:
        return None
    return gpu.refusal(q, k, *rest)


def backward_not_taken(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> str | None:
    """Why a call of `attention_backward` is not taken, or None."""
    if q.device.type == "cpu" or q.dtype not in gpu.DTYPES:
        return None
    if grad_lse is not None:
        return "grad_lse: torch's kernels have no gradient of lse"
    return gpu.refusal(q, k, *rest)
