"""Prints what serving kernels do with lists of numbers that are wrong, as on a GPU: unlooked at."""

from __future__ import annotations

import json
import warnings

import torch

from ds_core import ops
from ds_core.ops import kv_cache, paged_attention, rope_write_kv_cache

CPU = torch.device("cpu")


def attention(**changed):
    """Which rows become NaN if some list is changed; two sequences of three and one queries."""
    q, k, v, table, lengths, starts = paged_attention.example(
        CPU, torch.float32, [(3, 20), (1, 5)], (2, 1), 16
    )
    named = {"table": table, "lengths": lengths, "starts": starts}
    for name, change in changed.items():
        change(named[name])
    out = ops.run("paged_attention", q, k, v, *named.values(), 0.1, None, None, impl="triton")
    return out.isnan().flatten(1).any(1).tolist()


def written(change):
    """Rows of q that become NaN, and how many slots are written, if positions or slots change."""
    args = rope_write_kv_cache.example(CPU, torch.float32, 4, (1, 1), 16, 16)
    q, positions, k_cache, slots = args[0], args[5], args[6], args[8]
    slots.copy_(torch.arange(4))
    change(positions, slots)
    before = k_cache.clone()
    ops.run("rope_write_kv_cache_", *args, False, None, None, impl="triton")
    changed = (k_cache != before).flatten(0, 1).any(-1)
    return q.isnan().flatten(1).any(1).tolist(), changed.flatten().tolist()


def main():
    warnings.simplefilter("ignore")  # numpy's own
    paged_attention.check_values = lambda *_: None
    kv_cache.check_slots = rope_write_kv_cache.check_positions = lambda *_: None

    def put(at, value):
        return lambda t: t.__setitem__(at, value)

    found = {
        "right": attention(),
        "a block behind the cache": attention(table=put((0, 1), 1000)),
        "a block before the cache": attention(table=put((1, 0), -1)),
        "more keys than the table has blocks for": attention(lengths=put(1, 999)),
        "fewer keys than queries": attention(lengths=put(0, 2)),
        "a position without a row": written(lambda positions, slots: put(1, 99)(positions)),
        "a slot behind the cache": written(lambda positions, slots: put(2, 10**6)(slots)),
        "a slot before the cache": written(lambda positions, slots: put(3, -5)(slots)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
