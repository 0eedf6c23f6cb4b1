"""Biases per channel and a sum of two tensors, in channels-last memory: each byte moves once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import nhwc_bias_add as op
from ds_core.ops.arguments import FLOATS, expect
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch


@triton.jit
def channel_sum(
    x,
    bias,
    other,
    other_bias,
    y,
    size,
    channels,
    OTHER: tl.constexpr,
    OTHER_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of `(x + bias) + (other + other_bias)`, channels of a pixel side by side."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    near = tl.arange(0, BLOCK)
    mask = near < size - begin
    # One division of 64 bits a program; what is left fits into 32.
    channel = ((begin % channels).to(tl.int32) + near) % channels
    total = tl.load(x + begin + near, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    if OTHER:
        second = tl.load(other + begin + near, mask=mask, other=0.0).to(tl.float32)
        if OTHER_BIAS:
            second += tl.load(other_bias + channel, mask=mask, other=0.0).to(tl.float32)
        total += second
    tl.store(y + begin + near, total.to(y.dtype.element_ty), mask=mask)


_KERNEL = Kernel(
    channel_sum,
    (Config({"BLOCK": 1024}),),
    types(
        {"*bf16": "x bias other other_bias y", "i64:16": "size", "i32:16": "channels"},
        OTHER=True,
        OTHER_BIAS=True,
    ),
)
KERNELS = (_KERNEL,)


def nhwc_bias_add(
    activation: torch.Tensor,
    bias: torch.Tensor,
    other: torch.Tensor | None = None,
    other_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ds_core.ops.nhwc_bias_add.reference`."""
    y = op.fake(activation, bias, other, other_bias)
    dtype = activation.dtype
    expect(dtype in FLOATS, op.NAME, "activation", dtype, "fp32, bf16 or fp16")
    expect_plain(op.NAME, bias=bias, other_bias=other_bias)
    config = _KERNEL.config(op.NAME, activation.device)
    size, channels = activation.numel(), activation.shape[1]
    launch(
        *(_KERNEL, config, (blocks(size, config.constants["BLOCK"]),), activation, bias),
        *(activation if other is None else other, bias if other_bias is None else other_bias),
        *(y, size, channels),
        OTHER=other is not None,
        OTHER_BIAS=other_bias is not None,
    )
    return y
