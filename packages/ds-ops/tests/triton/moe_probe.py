"""Prints what kernels of an MoE make of values that no case has, interpreted, as JSON."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from ds_core.ops import moe_gate as gate
from ds_core.ops import moe_permute as permute
from ds_ops.triton_kernels import fp8, moe_gate, moe_permute
from ds_ops.triton_kernels import grouped_mm as products


@triton.jit
def halve(bits, out):
    at = tl.arange(0, 256)
    tl.store(out + at, fp8.halved(tl.load(bits + at)))


def other_fp8():
    """Whether all numbers of an fp8 are twice what their bits become in the other."""
    bits, out = torch.arange(256, dtype=torch.uint8), torch.empty(256, dtype=torch.uint8)
    halve[(1,)](bits, out)
    half, whole = out.view(torch.float8_e4m3fnuz).float(), bits.view(torch.float8_e4m3fn).float()
    return torch.equal((2 * half).nan_to_num(-1.0), whole.nan_to_num(-1.0))


def without_order():
    """Whether logits that are NaN or infinite are routed as by the reference."""
    found = []
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.randn(6, 20)
        logits[1, 3], logits[2], logits[3, ::2], logits[4, :19] = (value,) * 4
        for scoring in ("softmax", "sigmoid"):
            for groups in (1, 4):
                args = (logits, 5, True, scoring, None, groups, groups // 2 or 1, 1.0)
                weights, *rest = moe_gate.moe_gate(*args)
                expected, *others = gate.reference(*args)
                same = torch.allclose(weights, expected, equal_nan=True)
                counts = zip(rest[:2], others[:2], strict=True)
                found.append(same and all(torch.equal(a, b) for a, b in counts))
    return all(found)


def out_of_range():
    """Whether what nobody looks at on a GPU counts as -1."""
    permute.check_indices = permute.check_rows = lambda *_: None
    x = torch.randn(5, 8)
    indices = torch.tensor([[0, 7], [-9, 1], [2, 3], [1, 4], [3, 0]], dtype=torch.int32)
    none = indices.masked_fill((indices < 0) | (indices > 3), -1)
    moved = moe_permute.moe_permute(x, indices, 4, None)
    expected = permute.permute_reference(x, none, 4, None)
    same = [torch.equal(a, b) for a, b in zip(moved, expected, strict=True)]
    row_map = torch.tensor([[0, 5], [-2, 4], [7, -1]], dtype=torch.int32)
    none = row_map.masked_fill((row_map < 0) | (row_map > 4), -1)
    same.append(
        torch.equal(
            moe_permute.moe_unpermute(x, row_map, None), permute.unpermute_reference(x, none, None)
        )
    )
    return all(same)


def cleared():
    """What torch's products leave on a GPU, after it is cleared: rows, matrices that are zero."""
    offsets = torch.tensor([3, 3, 18, 18], dtype=torch.int32)
    rows = products.clear_behind(torch.full((21, 300), torch.nan), offsets)
    matrices = products.clear_empty(torch.full((4, 50, 60), torch.nan), offsets)
    for t in (rows, matrices):
        assert (t.isnan().flatten(1).all(1) | (t == 0).flatten(1).all(1)).all()
    return [rows[:, 0].eq(0).nonzero().flatten().tolist(), matrices[:, 0, 0].eq(0).tolist()]


def unsafe_offsets():
    """The shape of a product with offsets that fall and lie outside."""
    products.op.ends = lambda *_: []
    offsets = torch.tensor([9, -4, 90, 3], dtype=torch.int32)
    out = products.grouped_mm(torch.ones(16, 8), torch.ones(4, 8, 8), offsets)
    gradient = products.grouped_mm_backward(torch.ones(16, 8), torch.ones(16, 8), offsets)
    return [list(out.shape), list(gradient.shape)]


def main():
    torch.manual_seed(0)
    tried = (without_order, other_fp8, out_of_range, cleared, unsafe_offsets)
    print(json.dumps({each.__name__: each() for each in tried}))


if __name__ == "__main__":
    main()
