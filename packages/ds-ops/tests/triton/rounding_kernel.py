"""A product and a sum: to a compiler one operation, as `block_codes.product` has it two."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_ops.triton_kernels.block_codes import product
from ds_ops.triton_kernels.kernel import Config, Kernel, types


@triton.jit
def product_and_sum(a, b, y, nothing, APART: tl.constexpr, BLOCK: tl.constexpr):
    """y = a * b + y."""
    at = tl.arange(0, BLOCK)
    left, right = tl.load(a + at), tl.load(b + at)
    found = product(left, right, nothing) if APART else left * right
    tl.store(y + at, found + tl.load(y + at))


CONFIG = Config({"BLOCK": 128})
#: Sums of two numbers, as assembly has them.
_SUM = {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), "add.f32"), "gfx942": "add_f32"}
APART, TOGETHER = (
    Kernel(
        product_and_sum,
        (CONFIG,),
        types({"*fp32": "a b y", "fp32": "nothing"}, APART=apart),
        instructions=_SUM,
        variant="apart" if apart else "together",
    )
    for apart in (True, False)
)
