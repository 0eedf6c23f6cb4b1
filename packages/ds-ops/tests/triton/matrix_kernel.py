"""A product of matrices, as small as it can be: what compilers make of `tl.dot`."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_ops.triton_kernels.kernel import Config, Kernel, types
from ds_ops.triton_kernels.targets import MATRIX


@triton.jit
def product(a, b, c, depth, a_stride, b_stride, c_stride, M: tl.constexpr, N: tl.constexpr,
            K: tl.constexpr):  # fmt: skip
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        left = tl.load(a + row[:, None] * a_stride + start + inner[None, :])
        right = tl.load(b + (start + inner)[:, None] * b_stride + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + row[:, None] * c_stride + column[None, :], total.to(c.dtype.element_ty))


FITS = Config({"M": 128, "N": 128, "K": 32}, stages=2)
#: More shared memory than gfx942 has.
LARGE = Config({"M": 256, "N": 128, "K": 128}, warps=8, stages=2)
KERNEL = Kernel(
    product,
    (FITS, LARGE),
    types({"*bf16": "a b c", "i32:16": "depth a_stride b_stride c_stride"}),
    instructions=MATRIX,
)
