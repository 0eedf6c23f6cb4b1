"""Writing keys and values of new tokens into a cache of blocks. Source: Kwon et al. 2023."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    unaligned,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import EXACT
from ds_core.seams.op import Floor, Op

NAME = "write_kv_cache_"


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write each token's keys and values into its slot of the caches, in place.

    Args:
        k, v: `[tokens, kv_heads, d]`; the heads of a token are contiguous, tokens need not be.
        k_cache, v_cache: `[blocks, block_size, kv_heads, d]`, of k's dtype; changed. May be views
            whose last dimension is contiguous, and lie side by side in one tensor.
        slots: `[tokens]`, int64: `block * block_size + offset`, or -1 to skip the token. No slot
            is named twice.

    Raises OpError or RuntimeError for shapes, dtypes or slots that do not fit; then nothing is
    written.
    """
    run(NAME, k, v, k_cache, v_cache, slots)


def reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """As `write_kv_cache`: `cache[slot // block_size, slot % block_size] = token`."""
    _check(k, v, k_cache, v_cache, slots)
    blocks, block_size = k_cache.shape[:2]
    wrong = slots[(slots < -1) | (slots >= blocks * block_size)]
    wanted = f"0 to {blocks * block_size - 1}, or -1 to skip a token"
    expect(wrong.numel() == 0, NAME, "slots", wrong[:1].tolist(), wanted)
    kept = slots >= 0
    named = slots[kept]
    once = named.unique().numel() == named.numel()
    expect(once, NAME, "slots", "a slot twice", "each slot once")
    k_cache[named // block_size, named % block_size] = k[kept]
    v_cache[named // block_size, named % block_size] = v[kept]


def _check(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    expect_float(NAME, "k", k)
    expect(k.dim() == 3, NAME, "k", f"shape {list(k.shape)}", "[tokens, kv_heads, head size]")
    expect_shape(NAME, "v", v, k.shape)
    for name, t in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        expect(t.dtype == k.dtype, NAME, name, t.dtype, k.dtype)
    fits = k_cache.dim() == 4 and k_cache.shape[1] > 0 and k_cache.shape[2:] == k.shape[1:]
    wanted = f"[blocks, block_size, {k.shape[1]}, {k.shape[2]}]"
    expect(fits, NAME, "k_cache", f"shape {list(k_cache.shape)}", wanted)
    expect_shape(NAME, "v_cache", v_cache, k_cache.shape)
    expect(slots.dtype is torch.int64, NAME, "slots", slots.dtype, torch.int64)
    expect_shape(NAME, "slots", slots, k.shape[:1])
    expect_together(NAME, k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)


def fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    _check(k, v, k_cache, v_cache, slots)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Some tokens skipped; one and none; unaligned; a slice of q, k, v; caches side by side."""

    def made(tokens: int, *shape: int) -> tuple[torch.Tensor, ...]:
        k, v = (randn(device, dtype, tokens, *shape[2:], seed=seed) for seed in (0, 1))
        generator = torch.Generator().manual_seed(tokens)
        slots = torch.randperm(shape[0] * shape[1], generator=generator)[:tokens].to(device)
        slots[1::3] = -1
        return k, v, randn(device, dtype, *shape), randn(device, dtype, *shape, seed=1), slots

    k, v, k_cache, v_cache, slots = made(21, 5, 7, 3, 40)
    fused = torch.stack([v, k, v], 1)
    both = torch.stack([k_cache, v_cache], 2)
    across = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    return [
        (k, v, k_cache, v_cache, slots),
        (unaligned(k), unaligned(v), unaligned(k_cache), unaligned(v_cache), slots),
        (fused[:, 1], fused[:, 2], k_cache, v_cache, slots),
        (k, v, *across, slots),
        (k, v, both[:, :, 0], both[:, :, 1].clone(), slots),
        made(1, 1, 1, 1, 1),
        made(300, 40, 16, 2, 128),
        made(0, 2, 16, 2, 64),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    k, v, k_cache, v_cache, slots = cases(device, torch.float32)[0]
    return [
        ("k: got torch.int64|k: got.*expected", (k.long(), v, k_cache, v_cache, slots)),
        ("k: got shape", (k[0], v, k_cache, v_cache, slots)),
        ("v: got", (k, v.half(), k_cache, v_cache, slots)),
        ("v: got", (k, v[:4], k_cache, v_cache, slots)),
        ("cache: got", (k, v, k_cache.half(), v_cache, slots)),
        ("shape", (k, v, k_cache[..., :8], v_cache[..., :8], slots)),
        ("v_cache: got shape", (k, v, k_cache, v_cache[:2], slots)),
        ("slots: got torch.int32", (k, v, k_cache, v_cache, slots.int())),
        ("slots: got shape", (k, v, k_cache, v_cache, slots[:3])),
        ("slots: got .*35.*0 to 34", (k, v, k_cache, v_cache, slots * 0 + 35)),
        ("slots: got .*-2.*0 to 34", (k, v, k_cache, v_cache, slots * 0 - 2)),
        ("slots: got .*each slot once", (k, v, k_cache, v_cache, slots * 0 + 3)),
    ]


def floor(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> Floor:
    return Floor(k.nbytes + v.nbytes + slots.nbytes, k.nbytes + v.nbytes)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """A prefill of 4096 tokens of a model with 8 key-value heads of 128."""
    k, v = (randn(device, torch.bfloat16, 4096, 8, 128, seed=seed) for seed in (0, 1))
    caches = (torch.zeros(512, 16, 8, 128, dtype=k.dtype, device=device) for _ in range(2))
    slots = torch.randperm(512, device=device)[:256, None] * 16 + torch.arange(16, device=device)
    return [("4096 tokens, 8x128 bfloat16", (k, v, *caches, slots.flatten()))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
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
