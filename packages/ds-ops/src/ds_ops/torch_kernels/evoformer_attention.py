"""evoformer_attention by torch's matrix products, a few sequences at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ds_core.ops import evoformer_attention as op
from ds_core.ops.arguments import wide

#: Of scores that are in memory at once; one sequence's are, however large: they are as large as
#: bias2 is.
_MOST_BYTES = 16 << 20


def evoformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, with the scores of a few sequences in memory."""
    out, lse = op.fake(q, k, v, bias1, bias2, scale)
    for batch, part in _parts(q):
        scores = _scores(q, k, bias1, bias2, scale, batch, part)
        sums = scores.logsumexp(-1)
        weights = _weights(scores, sums)
        lse[batch, part] = sums
        out[batch, part] = (weights @ _turned(v, batch, part)).transpose(1, 2).to(q.dtype)
    return out, lse


def evoformer_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, with the scores of a few sequences in memory; sums over them in fp32."""
    results = op.backward_fake(grad, q, k, v, bias1, bias2, out, lse, scale, wants)
    dq, dk, dv, dbias1, dbias2 = results
    pairs = torch.zeros_like(dbias2, dtype=lse.dtype)
    for batch, part in _parts(q):
        keys, g = _turned(k, batch, part), _turned(grad, batch, part)
        scores = _scores(q, k, bias1, bias2, scale, batch, part)
        weights = _weights(scores, lse[batch, part])
        dv[batch, part] = (weights.mT @ g).transpose(1, 2).to(q.dtype)
        level = (g * _turned(out, batch, part)).sum(-1, keepdim=True)
        ds = (g @ _turned(v, batch, part).mT).sub_(level).mul_(weights)
        dq[batch, part] = (ds @ keys).mul_(scale).transpose(1, 2).to(q.dtype)
        dk[batch, part] = (ds.mT @ _turned(q, batch, part)).mul_(scale).transpose(1, 2).to(q.dtype)
        if dbias1.dim() > 1:
            dbias1[batch, part] = ds.sum((1, 2))[:, None, None].to(q.dtype)
        if dbias2.dim() > 1:
            pairs[batch, 0] += ds.sum(0)
    dbias2.copy_(pairs)
    return results


def _parts(q: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Which batch and sequences are computed together."""
    batches, sequences, residues, heads, _ = q.shape
    together = max(1, _MOST_BYTES // max(1, heads * residues * residues * 4))
    for batch in range(batches if residues and heads else 0):
        for begin in range(0, sequences, together):
            yield batch, slice(begin, min(begin + together, sequences))


def _turned(t: torch.Tensor, batch: int, part: slice) -> torch.Tensor:
    """`[sequences, heads, residues, d]`, in fp32."""
    return wide(t[batch, part]).transpose(1, 2)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
    batch: int,
    part: slice,
) -> torch.Tensor:
    """`[sequences, heads, query, key]`."""
    scores = (_turned(q, batch, part) * scale) @ _turned(k, batch, part).mT
    if bias1 is not None:
        scores += bias1[batch, part]
    if bias2 is not None:
        scores += bias2[batch]
    return scores


def _weights(scores: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The softmax, where the scores were; 0 where all are -inf."""
    finite = sums.masked_fill(sums == -torch.inf, 0.0)
    return scores.sub_(finite.unsqueeze(-1)).exp_()
