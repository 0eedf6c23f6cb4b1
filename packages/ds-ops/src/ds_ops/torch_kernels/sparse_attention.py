"""sparse_attention by torch: rows of blocks one after the other on a CPU, flex_attention on a GPU.

On a CPU each row of blocks is dense attention on the keys that it sees, so that time and memory are
those of the blocks that there are. On a GPU torch.compile makes one kernel from the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from ds_core.ops.arguments import wide
from ds_core.ops.sparse_attention import Options, backward_fake, fake

#: Tokens along one side of the blocks that flex_attention skips; its kernels take no smaller ones.
_FLEX_BLOCK = 128

#: Narrower heads are too small for its products.
_FLEX_HEAD = 16


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.sparse_attention.reference`."""
    out, lse = fake(q, k, v, *rest)
    options = Options(*rest)
    if q.device.type != "cpu":
        return by_flex(q, k, v, options, _compiled())
    for heads, rows, keys in _rows(options, q):
        scores = _scores(q, k, options, heads, rows, keys)
        sums = scores.logsumexp(-1) if len(keys) else scores.new_full(scores.shape[:-1], -torch.inf)
        lse[:, heads, rows] = sums
        weights = torch.exp(scores - sums.masked_fill(sums == -torch.inf, 0.0)[..., None])
        out[:, heads, rows] = (weights @ wide(v[:, heads, keys])).to(q.dtype)
    return out, lse


def sparse_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.sparse_attention.backward_reference`; sums over rows are kept in fp32."""
    dq, dk, dv = backward_fake(grad, q, k, v, out, lse, *rest)
    options = Options(*rest)
    if q.device.type != "cpu":
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            again, _ = by_flex(leaves[0], leaves[1], leaves[2], options, _compiled())
        for to, found in zip((dq, dk, dv), torch.autograd.grad(again, leaves, grad), strict=True):
            to.copy_(found)
        return dq, dk, dv
    key_sums, value_sums = (torch.zeros(t.shape, dtype=lse.dtype) for t in (k, v))
    for heads, rows, keys in _rows(options, q):
        arrived = wide(grad[:, heads, rows])
        delta = (arrived * wide(out[:, heads, rows])).sum(-1, keepdim=True)
        level = lse[:, heads, rows].masked_fill(lse[:, heads, rows] == -torch.inf, 0.0)
        weights = torch.exp(_scores(q, k, options, heads, rows, keys) - level[..., None])
        ds = weights * (arrived @ wide(v[:, heads, keys]).transpose(2, 3) - delta) * options.scale
        dq[:, heads, rows] = (ds @ wide(k[:, heads, keys])).to(q.dtype)
        key_sums[:, heads, keys] += ds.transpose(2, 3) @ wide(q[:, heads, rows])
        value_sums[:, heads, keys] += weights.transpose(2, 3) @ arrived
    return dq, dk.copy_(key_sums), dv.copy_(value_sums)


def partly(*args: Any) -> str | None:
    """Why torch does not take a call, or None: on GPUs it is flex_attention that computes."""
    q = next(value for value in args if isinstance(value, torch.Tensor))
    if q.device.type == "cpu":
        return None
    if q.dim() != 4 or q.shape[-1] < _FLEX_HEAD or q.numel() == 0:
        return f"flex_attention takes heads of {_FLEX_HEAD} and more, and one token or more"
    return None


# --- On a CPU -------------------------------------------------------------------------------------


def _rows(options: Options, q: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Heads that share a layout, the tokens of a row of blocks, and the keys that they see."""
    layouts, count, _ = options.blocks.shape
    block = options.block
    inner = torch.arange(block)
    for layout in range(layouts):
        heads = slice(0, q.shape[1]) if layouts == 1 else slice(layout, layout + 1)
        for row in range(count):
            seen = options.blocks[layout, row]
            if options.causal:
                seen = seen[: row + 1]
            keys = (seen.nonzero() * block + inner).flatten()
            yield heads, slice(row * block, (row + 1) * block), keys


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    options: Options,
    heads: slice,
    rows: slice,
    keys: torch.Tensor,
) -> torch.Tensor:
    """Of the queries of `rows` and the keys of numbers `keys`, with bias and masks."""
    scores = wide(q[:, heads, rows]) @ wide(k[:, heads, keys]).transpose(2, 3) * options.scale
    if options.rpe is not None:
        own = heads if options.rpe.shape[1] > 1 else slice(None)
        scores += wide(options.rpe[:, own, rows][..., keys])
    if options.key_padding_mask is not None:
        scores += _added(options.key_padding_mask[:, keys], options.key_mul)[:, None, None]
    if options.attn_mask is not None:
        scores += _added(options.attn_mask[rows][:, keys], options.pair_mul)
    if options.causal:
        later = keys > torch.arange(rows.start, rows.stop)[:, None]
        scores.masked_fill_(later, -torch.inf)
    return scores


def _added(mask: torch.Tensor, multiplied: bool) -> torch.Tensor:
    """What a mask adds to scores."""
    number = wide(mask)
    return torch.zeros_like(number).masked_fill_(number == 0, -torch.inf) if multiplied else number


# --- By flex_attention ----------------------------------------------------------------------------


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention, dynamic=False)


def by_flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    attend: Callable[..., Any] = flex.flex_attention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op by torch's flex_attention: the result and `lse`; differentiable in q, k and v.

    Args:
        attend: `flex_attention`, compiled or, for small sizes, as it is.
    """
    out, aux = attend(
        q, k, v,
        score_mod=_score_mod(options),
        block_mask=block_mask(options, q.shape[2]),
        scale=options.scale,
        return_aux=flex.AuxRequest(lse=True),
    )  # fmt: skip
    return out, aux.lse


def block_mask(options: Options, tokens: int) -> flex.BlockMask:
    """The layout as flex_attention takes it; made on the device, without waiting for it."""
    blocks, block, causal = options.blocks, options.block, options.causal
    layouts = blocks.shape[0]

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        there = blocks[head % layouts, query // block, key // block]
        return there & (key <= query) if causal else there

    # Padded so that each of flex_attention's blocks is whole; what is beyond is not looked at.
    tiles = -(-tokens // _FLEX_BLOCK)
    token = torch.arange(tiles * _FLEX_BLOCK, device=blocks.device).clamp(max=max(tokens - 1, 0))
    place = (token // block).view(tiles, _FLEX_BLOCK)
    some = _pooled(blocks, place)
    if causal:
        some = some.tril()
    counts = some.sum(-1, dtype=torch.int32)[None]
    order = torch.argsort(some.int(), dim=-1, descending=True, stable=True).to(torch.int32)[None]
    return flex.BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=_FLEX_BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )


def _pooled(blocks: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Which of flex_attention's blocks have any block; place: the blocks of their tokens."""
    layouts, _, count = blocks.shape
    tiles, size = place.shape
    rows = blocks[:, place.flatten()].view(layouts, tiles, size, count).any(2)
    return rows[..., place.flatten()].view(layouts, tiles, tiles, size).any(3)


def _score_mod(options: Options) -> Callable[..., Any] | None:
    rpe, keys, pairs = options.rpe, options.key_padding_mask, options.attn_mask
    if rpe is None and keys is None and pairs is None:
        return None

    def biased(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        if rpe is not None:
            score = score + rpe[batch % rpe.shape[0], head % rpe.shape[1], query, key]
        if keys is not None:
            number = keys[batch, key]
            score = _with(score, number, options.key_mul)
        if pairs is not None:
            score = _with(score, pairs[query, key], options.pair_mul)
        return score

    return biased


def _with(score: Any, number: Any, multiplied: bool) -> Any:
    return torch.where(number == 0, -torch.inf, score) if multiplied else score + number
