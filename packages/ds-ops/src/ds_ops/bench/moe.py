"""Gate, permute and unpermute of experts beside plain torch (sort, index_select, index_add).

python -m ds_ops.bench.moe --threads 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ds_core import ops
from ds_core.ops.checking import compare
from ds_core.seams.op import Op
from ds_ops.bench.floors import stream_floor
from ds_ops.bench.timing import Row, interleave, main, row

_CPU = torch.device("cpu")
_MIN_X_PEER = 1.5


def rows(seconds: float) -> Iterator[Row]:
    """Every op of a layer of experts, at the sizes of Mixtral, Qwen3-MoE and DeepSeek-V3."""
    peers: dict[str, Callable[..., Any]] = {
        "moe_gate": ops.get("moe_gate").reference,
        "moe_gate_backward": ops.get("moe_gate_backward").reference,
        "moe_permute": permute,
        "moe_unpermute": unpermute,
        "moe_unpermute_backward": unpermute_backward,
    }
    for name, peer in peers.items():
        op = ops.get(name)
        for label, args in op.benchmarks(_CPU):
            yield _row(op, label, args, peer, seconds)


def _row(
    op: Op, label: str, args: tuple[Any, ...], peer: Callable[..., Any], seconds: float
) -> Row:
    shape, _, dtype = label.rpartition(" ")
    floor = op.floor(*args)
    read, written = torch.ones(floor.read_bytes // 4), torch.ones(floor.written_bytes // 4)
    candidates = {
        "ours": lambda: ops.run(op.name, *args),
        "floor": stream_floor([read], [written]),
        "torch": lambda: peer(*args),
    }
    found = interleave(candidates, seconds=seconds)
    error = compare(op, lambda *given: ops.run(op.name, *given), args).error
    return row(op.name, shape, dtype, found, peer="torch", error=error, min_x_peer=_MIN_X_PEER)


def permute(x: torch.Tensor, indices: torch.Tensor, experts: int, capacity: None) -> Any:
    """What `moe_permute` computes without a capacity, in few calls of torch."""
    order = indices.flatten().argsort(stable=True)
    counts = indices.flatten().bincount(minlength=experts).cumsum(0)
    row_map = torch.empty_like(order)
    row_map[order] = torch.arange(order.numel())
    return x.index_select(0, order // indices.shape[1]), counts, row_map


def unpermute(y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What `moe_unpermute` computes, by an index_add in y's dtype."""
    tokens, k = row_map.shape
    rows = row_map.flatten()
    scaled = y.index_select(0, rows) * weights.reshape(-1, 1).to(y.dtype)
    token = torch.arange(tokens).repeat_interleave(k)
    return y.new_zeros(tokens, y.shape[1]).index_add_(0, token, scaled)


def unpermute_backward(
    grad: torch.Tensor, y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor, rows: int
) -> Any:
    """What `moe_unpermute_backward` computes, in y's dtype."""
    each = grad.repeat_interleave(row_map.shape[1], 0)
    flat = row_map.flatten().long()
    dy = torch.empty_like(y).index_copy_(0, flat, each * weights.reshape(-1, 1).to(y.dtype))
    return dy, (each * y.index_select(0, flat)).sum(-1)


if __name__ == "__main__":
    main(rows)
