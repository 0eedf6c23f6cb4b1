"""linear_cross_entropy: torch's matrix products, and the loss of one chunk of tokens at a time.

On a GPU the products are cuBLAS's and the loss is our kernel, in place: a chunk's logits are read
twice and written once. Torch's own `linear_cross_entropy` (2.13) has neither z-loss nor softcap,
walks over a chunk once per operator (log_softmax, its gradient, each with a result of its own), and
holds all logits unless it is given options, with which it cannot be compiled; so it is no
implementation here.
"""

from __future__ import annotations

import torch

from ds_core.ops import run
from ds_core.ops.linear_cross_entropy import NAME, chunk_of, fake
from ds_core.ops.loss_arguments import check_targets, weighted_sum


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    gradients: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, with the logits of `chunk` tokens in memory at most.

    A chunk's logits become their own gradient where they are, and that at once the chunk's share
    of all three gradients; sums over chunks are kept in fp32. Nothing waits for a GPU.
    """
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    # The checks, and the results' shapes.
    _, losses, dhidden, dweight, dbias = fake(
        hidden, weight, bias, targets, scale, *numbers, chunk, gradients
    )
    if targets.device.type == "cpu":
        check_targets(NAME, targets, weight.shape[0], ignore_index)
    tokens = hidden.shape[0]
    size = max(1, min(tokens, chunk_of(tokens, chunk)))
    room = hidden.new_empty(size, weight.shape[0])
    sums = torch.zeros_like(dweight, dtype=torch.float32) if tokens > size else dweight
    bias_sums = torch.zeros_like(dbias, dtype=torch.float32)
    if tokens == 0:
        dweight.zero_()
    parts = [losses.narrow(0, 0, 0)]
    for begin in range(0, tokens, size):
        part = (0, begin, min(size, tokens - begin))
        own, logits = hidden.narrow(*part), room.narrow(0, 0, part[2])
        if bias is None:
            torch.mm(own, weight.t(), out=logits)
        else:
            torch.addmm(bias, own, weight.t(), out=logits)
        factors = scale if scale.numel() == 1 else scale.narrow(*part)
        if any(gradients):
            found = run("cross_entropy_", logits, targets.narrow(*part), factors, *numbers)
        else:
            found = run("cross_entropy", logits, targets.narrow(*part), factors, *numbers, False)
        parts.append(found[1])
        if gradients[0]:
            torch.mm(logits, weight, out=dhidden.narrow(*part))
        if gradients[1]:
            _add_product(sums, logits.t(), own, first=begin == 0)
        if gradients[2]:
            bias_sums += logits.sum(0, dtype=torch.float32)
    if gradients[1] and sums is not dweight:
        dweight = sums.to(weight.dtype)
    losses = torch.cat(parts)
    return weighted_sum(losses, scale), losses, dhidden, dweight, bias_sums.to(weight.dtype)


def _add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """sums += a @ b, or = a @ b.

    Products of 16 bits are added up in fp32: by cuBLAS as it stores them; elsewhere a few rows at
    a time, for torch has no such product for CPUs.
    """
    if sums.dtype == a.dtype:
        sums.addmm_(a, b, beta=0 if first else 1)
    elif a.is_cuda and first:
        torch.mm(a, b, out_dtype=sums.dtype, out=sums)
    elif a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        rows = 4096
        for begin in range(0, len(sums), rows):
            sums[begin : begin + rows] += a[begin : begin + rows] @ b
