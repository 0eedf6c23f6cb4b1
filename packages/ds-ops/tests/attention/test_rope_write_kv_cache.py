"""rope_write_kv_cache: every implementation against the reference, and against its parts."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core.ops.rope_write_kv_cache import example
from ds_core.testing.contracts import OpContract

CPU = torch.device("cpu")


class TestRopeWriteKvCache(OpContract):
    op = "rope_write_kv_cache_"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_it_does_what_its_parts_do(kind: torch.dtype) -> None:
    q, k, v, cos, sin, positions, k_cache, v_cache, slots = example(
        CPU, torch.bfloat16, 9, (4, 2), 32, 32, kind=kind
    )
    scale = None if kind is torch.bfloat16 else torch.tensor([0.5])
    tables = cos[positions], sin[positions]
    expected_q = ds_ops.rope(q[None], *tables)[0]
    caches = k_cache.clone(), v_cache.clone()
    turned = ds_ops.rope(k[None], *tables)[0]
    ds_ops.write_kv_cache(turned, v, *caches, slots, k_scale=scale, v_scale=scale)
    rest = (cos, sin, positions, k_cache, v_cache, slots)
    ds_ops.rope_write_kv_cache(q, k, v, *rest, k_scale=scale, v_scale=scale)
    assert torch.equal(q, expected_q)
    assert torch.equal(k_cache.view(torch.uint8), caches[0].view(torch.uint8))
    assert torch.equal(v_cache.view(torch.uint8), caches[1].view(torch.uint8))


def test_a_bad_slot_leaves_everything_as_it_was() -> None:
    q, k, v, *tables, k_cache, v_cache, slots = example(CPU, torch.float32, 4, (2, 2), 16, 16)
    before = q.clone(), k_cache.clone(), v_cache.clone()
    slots[3] = 10_000
    with pytest.raises(RuntimeError, match="slots: got 10000"):
        ds_ops.rope_write_kv_cache(q, k, v, *tables, k_cache, v_cache, slots)
    assert all(torch.equal(a, b) for a, b in zip((q, k_cache, v_cache), before, strict=True))
