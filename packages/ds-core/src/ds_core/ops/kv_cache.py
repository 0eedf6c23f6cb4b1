"""Writing keys and values of new tokens into a cache of blocks, which may hold 8-bit floats.

Source: Kwon et al. 2023 (blocks); Micikevicius et al. 2022 and the OCP 8-bit floating point
specification (formats).
"""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
    unaligned,
    wide,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import EXACT
from ds_core.seams.op import Floor, Op

NAME = "write_kv_cache_"
#: What a cache may hold instead of the dtype of its keys, on every device in OCP's encoding.
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write each token's keys and values into its slot of the caches, in place.

    Args:
        k, v: `[tokens, kv_heads, d]`; the heads of a token are contiguous, tokens need not be.
        k_cache, v_cache: `[blocks, block_size, kv_heads, d]`, both of k's dtype, or both
            float8_e4m3fn or float8_e5m2; changed. May be views whose last dimension is contiguous,
            and lie side by side in one tensor.
        slots: `[tokens]`, int64: `block * block_size + offset`, or -1 to skip the token. No slot
            is named twice.
        k_scale, v_scale: `[1]` or `[kv_heads]`, fp32, for caches of 8-bit floats: a cache holds
            `x / scale`, rounded to the nearest and even; what is beyond the largest number becomes
            that, NaN stays. None: 1.

    Raises OpError or RuntimeError for shapes, dtypes or slots that do not fit; then nothing is
    written. On a GPU slots are not looked at, for the host would have to wait for them: a token
    whose slot is not in the cache is skipped, and of two with the same slot either is written.
    """
    expect_tensors(NAME, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    run(NAME, k, v, k_cache, v_cache, slots, k_scale, v_scale)


def reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """As `write_kv_cache`: `cache[slot // block_size, slot % block_size] = token`."""
    check(NAME, k, v, k_cache, v_cache, slots, k_scale, v_scale)
    check_slots(NAME, slots, k_cache)
    block_size = k_cache.shape[1]
    kept = slots >= 0
    named = slots[kept]
    for t, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        values = as_cached(t[kept], cache, scale)
        if cache.dtype in FP8:  # which torch moves only as bytes
            values, cache = values.view(torch.uint8), cache.view(torch.uint8)
        cache[named // block_size, named % block_size] = values


def as_cached(t: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Keys or values `[..., kv_heads, d]` as a cache holds them."""
    if cache.dtype not in FP8:
        return t
    scaled = wide(t) if scale is None else wide(t) / scale.unsqueeze(-1)
    largest = torch.finfo(cache.dtype).max
    return scaled.clamp(-largest, largest).to(cache.dtype)


def from_cache(cache: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values `[..., kv_heads, d]` of a cache as numbers in `dtype`."""
    t = cache.to(dtype)
    return t if scale is None else t * scale.to(dtype).unsqueeze(-1)


def check_slots(op: str, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Raise OpError unless slots are in a cache, each named once, or -1; looks at their values."""
    room = cache.shape[0] * cache.shape[1]
    wrong = slots[(slots < -1) | (slots >= room)]
    wanted = f"0 to {room - 1}, or -1 to skip a token"
    expect(wrong.numel() == 0, op, "slots", wrong[:1].tolist(), wanted)
    named = slots[slots >= 0]
    once = named.unique().numel() == named.numel()
    expect(once, op, "slots", "a slot twice", "each slot once")


def expect_scales(
    op: str, cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """Raise OpError unless scales fit caches of 8-bit floats, or are None."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        told = f"a tensor for caches of {cache.dtype}"
        expect(cache.dtype in FP8, op, name, told, "None: only fp8 is scaled")
        wide_enough = scale.dtype in (torch.float32, torch.float64)
        expect(wide_enough, op, name, scale.dtype, torch.float32)
        heads = cache.shape[2]
        fits = scale.dim() == 1 and scale.shape[0] in (1, heads)
        expect(fits, op, name, f"shape {list(scale.shape)}", f"[1] or [{heads}]")
        expect_together(op, cache, **{name: scale})


def check(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Raise OpError unless shapes and dtypes fit; looks at no value."""
    expect_float(op, "k", k)
    expect(k.dim() == 3, op, "k", f"shape {list(k.shape)}", "[tokens, kv_heads, head size]")
    expect_shape(op, "v", v, k.shape)
    expect(v.dtype == k.dtype, op, "v", v.dtype, k.dtype)
    expect(k_cache.dtype in (k.dtype, *FP8), op, "k_cache", k_cache.dtype, k.dtype)
    expect(v_cache.dtype == k_cache.dtype, op, "v_cache", v_cache.dtype, k_cache.dtype)
    fits = k_cache.dim() == 4 and k_cache.shape[1] > 0 and k_cache.shape[2:] == k.shape[1:]
    wanted = f"[blocks, block_size, {k.shape[1]}, {k.shape[2]}]"
    expect(fits, op, "k_cache", f"shape {list(k_cache.shape)}", wanted)
    expect_shape(op, "v_cache", v_cache, k_cache.shape)
    expect(slots.dtype is torch.int64, op, "slots", slots.dtype, torch.int64)
    expect_shape(op, "slots", slots, k.shape[:1])
    expect_together(op, k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    expect_scales(op, k_cache, k_scale, v_scale)


def fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    check(NAME, k, v, k_cache, v_cache, slots, k_scale, v_scale)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Some tokens skipped; one and none; unaligned; a slice of q, k, v; caches side by side; fp8.

    Among the numbers that become 8-bit floats are ties, tiny and huge ones and NaN.
    """

    def made(tokens: int, *shape: int) -> tuple[torch.Tensor, ...]:
        k, v = (randn(device, dtype, tokens, *shape[2:], seed=seed) for seed in (0, 1))
        generator = torch.Generator().manual_seed(tokens)
        slots = torch.randperm(shape[0] * shape[1], generator=generator)[:tokens].to(device)
        slots[1::3] = -1
        return k, v, randn(device, dtype, *shape), randn(device, dtype, *shape, seed=1), slots

    k, v, k_cache, v_cache, slots = made(21, 5, 7, 3, 40)
    fused = torch.stack([v, k, v], 1)
    both = torch.stack([k_cache, v_cache], 2)
    # All of them, numbers half way between two and just beside those.
    codes = torch.arange(127, dtype=torch.uint8, device=device).view(FP8[0]).double()
    middle = torch.cat((codes, (codes[1:] + codes[:-1]) / 2, codes * 150))
    special = torch.cat((middle, middle * (1 + 2**-7), k.double().flatten())).to(dtype)
    special[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    extreme = special[-k.numel() :].view(k.shape), special[: k.numel()].view(k.shape)
    tiny, per_head = torch.tensor([2.0**-9, 0.37]), torch.tensor([0.5, 1.0, 0.3])
    tiny, per_head = tiny.to(device), per_head.to(device)
    packed, scaled = both.to(FP8[0]), (slots, per_head, tiny[1:])
    across = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    return [
        (k, v, k_cache, v_cache, slots),
        (unaligned(k), unaligned(v), unaligned(k_cache), unaligned(v_cache), slots),
        (fused[:, 1], fused[:, 2], k_cache, v_cache, slots),
        (k, v, *across, slots),
        (k, v, both[:, :, 0], both[:, :, 1].clone(), slots),
        made(1, 1, 1, 1, 1),
        made(150, 20, 16, 2, 128),
        made(0, 2, 16, 2, 64),
        (*extreme, k_cache.to(FP8[0]), v_cache.to(FP8[0]), slots),
        (*extreme, k_cache.to(FP8[1]), v_cache.to(FP8[1]), slots, tiny[:1], None),
        (*(fused[:, 1], fused[:, 2], packed[:, :, 0], packed[:, :, 1].clone()), *scaled),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    k, v, k_cache, v_cache, slots = cases(device, torch.float32)[0]
    small, scale = k_cache.to(FP8[1]), torch.ones(3, device=device)
    if device.type != "cpu":  # values that no GPU kernel's host looks at
        values: list[tuple[str, tuple[Any, ...]]] = []
    else:
        values = [
            ("slots: got .*35.*0 to 34", (k, v, k_cache, v_cache, slots * 0 + 35)),
            ("slots: got .*-2.*0 to 34", (k, v, k_cache, v_cache, slots * 0 - 2)),
            ("slots: got .*each slot once", (k, v, k_cache, v_cache, slots * 0 + 3)),
        ]
    return [
        *values,
        ("k: got torch.int64|k: got.*expected", (k.long(), v, k_cache, v_cache, slots)),
        ("k: got shape", (k[0], v, k_cache, v_cache, slots)),
        ("v: got", (k, v.half(), k_cache, v_cache, slots)),
        ("v: got", (k, v[:4], k_cache, v_cache, slots)),
        ("cache: got", (k, v, k_cache.half(), v_cache, slots)),
        ("shape", (k, v, k_cache[..., :8], v_cache[..., :8], slots)),
        ("v_cache: got shape", (k, v, k_cache, v_cache[:2], slots)),
        ("v_cache: got torch.float32, expected torch.float8_e5m2", (k, v, small, v_cache, slots)),
        ("k_scale: got .*only fp8 is scaled", (k, v, k_cache, v_cache, slots, scale)),
        ("k_scale: got torch.float16", (k, v, small, small.clone(), slots, scale.half())),
        (r"v_scale: got shape \[2\].*\[3\]", (k, v, small, small.clone(), slots, None, scale[:2])),
        ("slots: got torch.int32", (k, v, k_cache, v_cache, slots.int())),
        ("slots: got shape", (k, v, k_cache, v_cache, slots[:3])),
    ]


def floor(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Floor:
    written = (k.numel() + v.numel()) * k_cache.element_size()
    return Floor(k.nbytes + v.nbytes + slots.nbytes, written)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """A prefill of 4096 tokens of a model with 8 key-value heads of 128."""
    k, v = (randn(device, torch.bfloat16, 4096, 8, 128, seed=seed) for seed in (0, 1))
    caches = (torch.zeros(512, 16, 8, 128, dtype=k.dtype, device=device) for _ in range(2))
    slots = torch.randperm(512, device=device)[:256, None] * 16 + torch.arange(16, device=device)
    return [("4096 tokens, 8x128 bfloat16", (k, v, *caches, slots.flatten()))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
        "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=EXACT,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
