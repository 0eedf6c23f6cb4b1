"""Keys and values of new tokens into a cache in pages, with or without the rotation of RoPE.

A program has some heads of one token: of q, which is rotated in place, or of k and v, which are
written to the token's slot. Each number is read once and written once; 8 heads of 128 in bf16 are 2
KiB in a row, enough to fill what four warps load at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import kv_cache as op
from ds_core.ops import rope_write_kv_cache as rope_op
from ds_core.ops.arguments import expect
from ds_ops.triton_kernels.fp8_bits import FORMATS, narrowed
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch


@triton.jit
def _rotated(source, c, s, mask, pairs, PAIRS: tl.constexpr):
    """The first half of rotated heads, and the second, in fp32."""
    pair = tl.arange(0, PAIRS)[None, :]
    a = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + pairs + pair, mask=mask, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def _rotated_neighbours(source, c, s, mask, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Rotated heads whose pairs lie side by side, in fp32."""
    both = tl.load(source + tl.arange(0, 2 * PAIRS)[None, :], mask=mask, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * PAIRS))


@triton.jit
def _put(target, x, kind: tl.constexpr, scale, mask, FORMAT: tl.constexpr):
    """Store x, rounded to a dtype; with FORMAT also divided by scale, as 8-bit floats."""
    x = x.to(kind)
    if FORMAT:
        x = narrowed(tl.div_rn(x.to(tl.float32), scale), FORMAT)
    tl.store(target, x, mask=mask)


@triton.jit
def _copy(source, target, begin, end, there, scale, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Elements from begin to end of some heads."""
    for start in range(begin, end, BLOCK):
        element = start + tl.arange(0, BLOCK)[None, :]
        mask = there & (element < end)
        x = tl.load(source + element, mask=mask, other=0.0)
        _put(target + element, x, x.dtype, scale, mask, FORMAT)


#: Numbers that no address depends on: one code for all.
_CHANGING = ["heads", "kv_heads", "places", "room", "k_step", "v_step"]


@triton.jit(do_not_specialize=_CHANGING)
def write_kv(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    heads,
    kv_heads,
    width,
    pairs,
    places,
    room,
    page_size,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    k_page,
    k_slot,
    k_cache_head,
    v_page,
    v_slot,
    v_cache_head,
    k_step,
    v_step,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """HEADS heads of a token: with ROTATES first those of q, then of k and v; else of k and v."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    kind: tl.constexpr = k.dtype.element_ty
    c = 1.0
    s = 0.0
    if ROTATES:
        pair = tl.arange(0, PAIRS)
        position = tl.load(positions + token)
        row = tl.where((position >= 0) & (position < places), position, 0)
        lost = tl.where(row == position, 0.0, float("nan"))
        inside = pair < pairs
        c = tl.load(cos + row * pairs + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + row * pairs + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
        c += lost
        q_parts = tl.cdiv(heads, HEADS)
        if part < q_parts:
            head = part * HEADS + tl.arange(0, HEADS)[:, None]
            at = q + token * q_token + head.to(tl.int64) * q_head
            there = head < heads
            if INTERLEAVED:
                element = tl.arange(0, 2 * PAIRS)[None, :]
                mask = there & (element < 2 * pairs)
                turned = _rotated_neighbours(at, c, s, mask, HEADS, PAIRS)
                _put(at + element, turned, kind, 1.0, mask, 0)
            else:
                mask = there & inside[None, :]
                first, second = _rotated(at, c, s, mask, pairs, PAIRS)
                _put(at + pair[None, :], first, kind, 1.0, mask, 0)
                _put(at + pairs + pair[None, :], second, kind, 1.0, mask, 0)
            return
        part -= q_parts
    slot = tl.load(slots + token)
    if (slot < 0) | (slot >= room):
        return
    head = part * HEADS + tl.arange(0, HEADS)[:, None]
    there = head < kv_heads
    k_factor = 1.0
    v_factor = 1.0
    if K_SCALED:
        k_factor = tl.load(k_scale + head * k_step, mask=there, other=1.0)
    if V_SCALED:
        v_factor = tl.load(v_scale + head * v_step, mask=there, other=1.0)
    page = slot // page_size
    inner = slot % page_size
    head = head.to(tl.int64)
    from_k = k + token * k_token + head * k_head
    from_v = v + token * v_token + head * v_head
    to_k = k_cache + page * k_page + inner * k_slot + head * k_cache_head
    to_v = v_cache + page * v_page + inner * v_slot + head * v_cache_head
    turned_width = 0
    if ROTATES:
        turned_width = 2 * pairs
        if INTERLEAVED:
            element = tl.arange(0, 2 * PAIRS)[None, :]
            mask = there & (element < 2 * pairs)
            turned = _rotated_neighbours(from_k, c, s, mask, HEADS, PAIRS)
            _put(to_k + element, turned, kind, k_factor, mask, FORMAT)
        else:
            pair = tl.arange(0, PAIRS)[None, :]
            mask = there & (pair < pairs)
            first, second = _rotated(from_k, c, s, mask, pairs, PAIRS)
            _put(to_k + pair, first, kind, k_factor, mask, FORMAT)
            _put(to_k + pairs + pair, second, kind, k_factor, mask, FORMAT)
    _copy(from_k, to_k, turned_width, width, there, k_factor, FORMAT, 2 * PAIRS)
    _copy(from_v, to_v, 0, width, there, v_factor, FORMAT, 2 * PAIRS)


_CONFIGS = (
    Config({"HEADS": 8, "PAIRS": 64}, {"pairs": 64}, warps=4),
    Config({"HEADS": 4, "PAIRS": 256}, {"pairs": 256}, warps=4),
)
_TYPES = {
    "*bf16": "q k v",
    "*fp32": "cos sin k_scale v_scale",
    "*i64": "positions slots",
    "i32": " ".join(_CHANGING),
    "i32:16": "width pairs page_size q_token q_head k_token k_head v_token v_head k_page k_slot "
    "k_cache_head v_page v_slot v_cache_head",
}


def _kernel(variant: str, configs: tuple[Config, ...], fp8: bool, **constants: bool) -> Kernel:
    by_type = _TYPES | ({"*u8": "k_cache v_cache"} if fp8 else {})
    if not fp8:
        by_type["*bf16"] += " k_cache v_cache"
    scaled = {"FORMAT": int(fp8), "K_SCALED": fp8, "V_SCALED": fp8}
    return Kernel(write_kv, configs, types(by_type, **scaled, **constants), variant=variant)


_PLAIN = _kernel("plain", _CONFIGS[:1], True, ROTATES=False, INTERLEAVED=False)
_HALVES = _kernel("halves", _CONFIGS, False, ROTATES=True, INTERLEAVED=False)
_NEIGHBOURS = _kernel("interleaved", _CONFIGS, True, ROTATES=True, INTERLEAVED=True)
KERNELS = (_PLAIN, _HALVES, _NEIGHBOURS)


def write_kv_cache_(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.kv_cache.reference`; slots on a GPU are not looked at."""
    op.fake(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    if slots.device.type == "cpu":  # the interpreter's, which nothing waits for
        op.check_slots(op.NAME, slots, k_cache)
    _write(op.NAME, _PLAIN, None, k, v, None, k_cache, v_cache, slots, False, k_scale, v_scale)


def rope_write_kv_cache_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.rope_write_kv_cache.reference`; on a GPU positions are not looked at."""
    tables, caches = (cos, sin, positions), (k_cache, v_cache, slots)
    rope_op.fake(q, k, v, *tables, *caches, interleaved, k_scale, v_scale)
    expect_plain(rope_op.NAME, cos=cos, sin=sin, positions=positions)
    if slots.device.type == "cpu":
        rope_op.check_positions(positions, cos)
        op.check_slots(rope_op.NAME, slots, k_cache)
    kernel = _NEIGHBOURS if interleaved else _HALVES
    _write(rope_op.NAME, kernel, q, k, v, tables, *caches, interleaved, k_scale, v_scale)


def _write(
    name: str,
    kernel: Kernel,
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    expect_plain(name, slots=slots, k_scale=k_scale, v_scale=v_scale)
    for argument, t in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _expect_rows(name, argument, t)
    # Without a rotation no program reads q or the tables: others stand for them.
    cos, sin, positions = tables or (k, k, slots)
    turned = k if q is None else q
    _expect_rows(name, "q", turned)
    tokens, kv_heads, width = k.shape
    pages, page_size = k_cache.shape[:2]
    fp8 = FORMATS.get(k_cache.dtype, 0)
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    pairs = 0 if q is None else cos.shape[1]
    places = 0 if q is None else cos.shape[0]
    config = kernel.config(name, k.device, pairs=pairs)
    size = config.constants["HEADS"]
    parts = blocks(kv_heads, size) + (0 if q is None else blocks(turned.shape[1], size))
    scales = [slots if t is None else t for t in (k_scale, v_scale)]
    steps = [int(t is not None and t.numel() > 1) for t in (k_scale, v_scale)]
    launch(
        *(kernel, config, (tokens, parts)),
        *(turned, k, v, cos, sin, positions, k_cache, v_cache, slots, *scales),
        *(turned.shape[1], kv_heads, width, pairs, places, pages * page_size, page_size),
        *(stride for t in (turned, k, v) for stride in t.stride()[:2]),
        *(stride for t in (k_cache, v_cache) for stride in t.stride()[:3]),
        *steps,
        ROTATES=q is not None,
        INTERLEAVED=interleaved,
        FORMAT=fp8,
        K_SCALED=k_scale is not None,
        V_SCALED=v_scale is not None,
    )


def _expect_rows(name: str, argument: str, t: torch.Tensor) -> None:
    """Raise OpError unless heads are contiguous, and no two of them are in the same memory."""
    told = f"strides {list(t.stride())}"
    expect(t.numel() == 0 or t.stride(-1) == 1, name, argument, told, "1 for the last dimension")
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            expect(stride > reach, name, argument, told, "rows that do not overlap")
            reach += stride * (size - 1)
