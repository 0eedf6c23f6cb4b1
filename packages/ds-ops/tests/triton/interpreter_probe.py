"""Prints what Triton's interpreter makes of bf16: as it is, or with an argument as mended."""

from __future__ import annotations

import sys

import interpreter_bf16
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def rounded(x, y):
    at = tl.arange(0, 256)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


def main():
    if len(sys.argv) > 1:
        interpreter_bf16.mend()
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.zeros(16, 16)
    product[(1,)](a, b, c)
    x = torch.randn(256)
    x[0], x[1] = float("nan"), float("inf")
    y = torch.zeros(256, dtype=torch.bfloat16)
    rounded[(1,)](x, y)
    print("dot", torch.allclose(c, a.float() @ b.float(), atol=1e-3))
    print("rounding", torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0)))


if __name__ == "__main__":
    main()
