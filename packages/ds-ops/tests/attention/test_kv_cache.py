"""write_kv_cache: every implementation against the reference, and memory it must not touch."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core.testing.contracts import OpContract


class TestWriteKvCache(OpContract):
    op = "write_kv_cache_"
    compiled = False


def tokens(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, count, 2, 8)
    return k, v, torch.arange(count)


def test_caches_may_lie_side_by_side_in_one_tensor() -> None:
    k, v, slots = tokens()
    both = torch.zeros(2, 4, 2, 2, 8)
    ds_ops.write_kv_cache(k, v, both[:, :, 0], both[:, :, 1], slots)
    assert torch.equal(both[0, :3, 0], k)
    assert torch.equal(both[0, :3, 1], v)
    assert not both[1].any()


def test_caches_may_be_side_by_side_with_heads_outside_of_tokens() -> None:
    k, v, slots = tokens()
    both = torch.zeros(2, 2, 4, 2, 8).movedim(1, 3)  # [blocks, tokens, k or v, heads, size]
    ds_ops.write_kv_cache(k, v, both[:, :, 0], both[:, :, 1], slots)
    assert torch.equal(both[0, :3, 0], k)
    assert torch.equal(both[0, :3, 1], v)


def test_a_bad_slot_leaves_everything_as_it_was() -> None:
    k, v, slots = tokens()
    caches = torch.zeros(2, 2, 4, 2, 8)
    slots[2] = 8
    with pytest.raises(RuntimeError, match="slots: got 8 for token 2, expected 0 to 7"):
        ds_ops.write_kv_cache(k, v, *caches, slots)
    assert not caches.any()


def test_memory_that_overlaps_is_refused() -> None:
    k, v, slots = tokens()
    cache, other = torch.zeros(2, 2, 4, 2, 8)
    wide = torch.zeros(2, 4, 2, 17)
    with pytest.raises(RuntimeError, match="k_cache and v_cache overlap"):
        ds_ops.write_kv_cache(k, v, cache, cache, slots)
    with pytest.raises(RuntimeError, match="k_cache and v_cache overlap"):
        ds_ops.write_kv_cache(k, v, wide[..., :8], wide[..., 7:15], slots)
    # Heads outside of tokens: what lies a row behind is the next token, not room between heads.
    heads_first = cache.flatten().as_strided((2, 3, 2, 8), (64, 8, 32, 1))
    next_token = cache.flatten().as_strided((2, 3, 2, 8), (64, 8, 32, 1), 8)
    with pytest.raises(RuntimeError, match="k_cache and v_cache overlap"):
        ds_ops.write_kv_cache(k, v, heads_first, next_token, slots)
    inside = cache.flatten()[:6].view(torch.int64)
    with pytest.raises(RuntimeError, match="slots and k_cache overlap"):
        ds_ops.write_kv_cache(k, v, cache, other, inside)
    with pytest.raises(RuntimeError, match="k and k_cache overlap"):
        ds_ops.write_kv_cache(cache[0, :3], v, cache, other, slots)
    with pytest.raises(RuntimeError, match="k_cache: elements of dimension 0 overlap"):
        ds_ops.write_kv_cache(k, v, cache[:1].expand(2, -1, -1, -1), other, slots)


def test_threads_write_what_one_does() -> None:
    k, v, _ = tokens(5000)
    slots = torch.randperm(6000)[:5000]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            caches = torch.zeros(2, 375, 16, 2, 8)
            ds_ops.write_kv_cache(k, v, *caches, slots)
            found.append(caches)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0][0].flatten(0, 1)[slots], k)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_the_nearest_of_what_was_written(kind: torch.dtype) -> None:
    k, v, slots = tokens()
    k[0, 0, :4] = torch.tensor([1e9, -torch.inf, torch.nan, 0.0])
    caches = torch.zeros(2, 2, 4, 2, 8).to(kind)
    scale = torch.tensor([0.25, 4.0])
    ds_ops.write_kv_cache(k, v, *caches, slots, k_scale=scale)
    largest = torch.finfo(kind).max
    assert caches[0][0, 0, 0, :2].tolist() == [largest, -largest]
    assert caches[0][0, 0, 0, 2].isnan()
    read = caches[0][0, :3].float() * scale[:, None]
    # Half of the last bit of mantissa, or of the smallest number.
    step = torch.finfo(kind).eps / 2
    error = (read - k)[1:].abs()
    assert (error <= k[1:].abs() * step + scale[:, None] * torch.finfo(kind).smallest_normal).all()
    assert torch.equal(caches[1][0, :3].float(), v.to(kind).float())
