"""rope_write_kv_cache_ by the ops that it is made of, each by what computes it best."""

from __future__ import annotations

import torch

from ds_core.ops import run
from ds_core.ops.rope_write_kv_cache import check, check_positions


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
    """As `ds_core.ops.rope_write_kv_cache.reference`."""
    check(q, k, v, cos, sin, positions, k_cache, v_cache, slots, k_scale, v_scale)
    check_positions(positions, cos)
    turn = (cos[positions], sin[positions], False, interleaved, False)
    turned = run("rope", k.unsqueeze(0), *turn).squeeze(0)
    # What may be refused still comes before what changes q.
    run("write_kv_cache_", turned.contiguous(), v, k_cache, v_cache, slots, k_scale, v_scale)
    run("rope_", q.unsqueeze(0), *turn)
