"""What the steps of optimizers share: elements, gradients, random rounding, undo buffers.

Everything is read once and written once, by programs of one block each: memory alone decides how
long a step takes. A flag on the device turns all loads and stores off, so that a step that is left
out costs next to nothing, and no host waits for the flag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ds_core.ops.optimizer_step import rounding_keys
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks
from ds_ops.triton_kernels.launching import launch, tracing

NVIDIA = ("sm_80", "sm_90", "sm_100")
#: Four elements a thread: 16 bytes of fp32 at once, and 8 of bf16 in the same layout. With more,
#: numbers would change threads through shared memory on their way to the low-precision copy.
CONFIGS = (
    Config({"BLOCK": 1024}, warps=8, targets=NVIDIA),
    Config({"BLOCK": 1024}, warps=4, targets=("gfx942",)),
)

#: Elements of one launch: offsets in bytes fit into 31 bits.
_PART = 1 << 28
_MASK = 0xFFFFFFFF


# --- In kernels -----------------------------------------------------------------------------------


@triton.jit
def changed(numel, found_inf, FLAGGED: tl.constexpr):
    """How many elements are to be changed: all, or none where the flag is not 0."""
    if FLAGGED:
        numel = tl.where(tl.load(found_inf) == 0.0, numel, 0)
    return numel


@triton.jit
def elements(numel, found_inf, FLAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: where its elements are, which of them exist, and which are to be changed."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return at, at < numel, at < changed(numel, found_inf, FLAGGED)


@triton.jit
def gradient(grad, grad_scale, sign, at, mask, SCALED: tl.constexpr):
    """`grad * grad_scale * sign` in fp32."""
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.load(grad_scale).to(tl.float32)
    return g * sign


@triton.jit
def take(stream, kept, at, there, live, KEPT: tl.constexpr):
    """Elements in fp32; KEPT: as they are, they go to the undo buffer too."""
    if KEPT:
        raw = tl.load(stream + at, mask=there, other=0.0)
        keep(kept, at, there, raw)
    else:
        raw = tl.load(stream + at, mask=live, other=0.0)
    return raw.to(tl.float32)


@triton.jit
def keep(kept, at, mask, raw):
    """Store numbers into an undo buffer: byte by byte, if they are not aligned there."""
    if kept.dtype.element_ty == raw.dtype:
        tl.store(kept + at, raw, mask=mask)
    else:
        size: tl.constexpr = raw.dtype.primitive_bitwidth // 8
        if size == 4:
            bits = raw.to(tl.uint32, bitcast=True)
        else:
            bits = raw.to(tl.uint16, bitcast=True).to(tl.uint32)
        for place in tl.static_range(size):
            tl.store(kept + at * size + place, (bits >> (8 * place)).to(tl.uint8), mask=mask)


@triton.jit
def random_bits(position, k0, k1):
    """32 random bits of each position, as `ds_core.ops.optimizer_step.random_bits` has them."""
    x = position.to(tl.uint32) * 0x9E3779B9 + k0.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ k1.to(tl.uint32)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def bits_of(at, k0, k1, SEEDED: tl.constexpr):
    """The random bits of elements; zeros, which nobody reads, where nothing is random."""
    if SEEDED:
        bits = random_bits(at, k0, k1)
    else:
        bits = at.to(tl.uint32) * 0
    return bits


@triton.jit
def put(stream, at, live, value, noise, SEEDED: tl.constexpr):
    """Store fp32 numbers, in bf16 by 16 random bits; returns what was stored, in fp32."""
    if SEEDED and stream.dtype.element_ty == tl.bfloat16:
        raw = value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
        cut = (raw & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(value) < float("inf"), cut, value)
    stored = value.to(stream.dtype.element_ty)
    tl.store(stream + at, stored, mask=live)
    return stored.to(tl.float32)


@triton.jit
def put_param(param, copy, at, live, value, bits, COPY: tl.constexpr, SEEDED: tl.constexpr):
    """Store the new parameter, and its copy, rounded to nearest."""
    stored = put(param, at, live, value, bits, SEEDED)
    if COPY:
        tl.store(copy + at, stored.to(copy.dtype.element_ty), mask=live)


# --- Launches -------------------------------------------------------------------------------------


def run(
    kernel: Kernel,
    op: str,
    param: torch.Tensor,
    streams: Sequence[torch.Tensor | None],
    scalars: Sequence[torch.Tensor | None],
    numbers: Sequence[float],
    seed: int | None,
    /,
    **flags: int | bool,
) -> None:
    """Launch a step over all elements.

    Args:
        streams: after `param`, in the kernel's order; those that are None are not used.
        scalars: 0-dim tensors.
        numbers: in fp32, in the kernel's order.
        flags: constants of the kernel.
    """
    numel = param.numel()
    config = kernel.config(op, param.device)
    every = [param, *(param if t is None else t for t in streams)]
    single = [param if t is None else t for t in scalars]
    for begin, end in parts(numel):
        own = every if end - begin == numel else [cut(t, numel, begin, end) for t in every]
        grid = (blocks(end - begin, config.constants["BLOCK"]),)
        rest = (end - begin, *keys(seed, begin), *numbers)
        launch(kernel, config, grid, *own, *single, *rest, **flags)


def parts(numel: int) -> list[tuple[int, int]]:
    """(begin, end) of the elements of each launch."""
    return [(begin, min(begin + _PART, numel)) for begin in range(0, numel, _PART)]


def cut(t: torch.Tensor, numel: int, begin: int, end: int) -> torch.Tensor:
    """What belongs to elements [begin, end) of a contiguous tensor of one or more for each."""
    each = t.numel() // numel
    return t.view(-1).narrow(0, begin * each, (end - begin) * each)


def keys(seed: int | None, begin: int) -> tuple[int, int]:
    """The keys of random bits for a launch that counts positions from `begin`, as int32."""
    if seed is None:
        return 0, 0
    k0, k1 = rounding_keys(seed, begin >> 32)
    return _signed(k0 + (begin & _MASK) * 0x9E3779B9), _signed(k1)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value


def kept_parts(
    undo: torch.Tensor | None, kept: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Where each tensor goes in an undo buffer: in its dtype, or as bytes if not aligned there."""
    if undo is None:
        return [None] * len(kept)
    found: list[torch.Tensor | None] = []
    begin = 0
    for t in kept:
        part = undo.narrow(0, begin, t.nbytes)
        size = t.element_size()
        aligned = part.storage_offset() % size == 0
        if aligned and not tracing():
            aligned = part.data_ptr() % size == 0
        found.append(part.view(t.dtype) if aligned else part)
        begin += t.nbytes
    return found
