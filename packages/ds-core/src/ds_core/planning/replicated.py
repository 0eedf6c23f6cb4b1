"""What plain data parallelism costs: every rank holds everything (`ds_core.replicated`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_core.planning.costs import Costs, Message, Workload
from ds_core.replicated import BUCKET_BYTES


@dataclass(frozen=True)
class _Tensor:
    """One parameter as it is held: its dtype after the cast, and that of its master copy."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    master: torch.dtype | None
    is_trained: bool

    @property
    def numel(self) -> int:
        return self.shape.numel()


def replicated_costs(work: Workload) -> Costs:
    """What each rank holds and sends at stage 0; all ranks alike."""
    tensors = list(_held(work))
    trained = [tensor for tensor in tensors if tensor.is_trained]
    buckets = list(_buckets(trained))
    grads = [work.precision.grad or bucket[0].dtype for bucket in buckets]
    sizes = [sum(tensor.numel for tensor in bucket) for bucket in buckets]
    memory = {
        "parameters": sum(t.numel * t.dtype.itemsize for t in tensors),
        "gradients": sum(n * d.itemsize for n, d in zip(sizes, grads, strict=True)),
        "master": sum(t.numel * t.master.itemsize for t in tensors if t.master is not None),
        "optimizer": work.optimizer.total_bytes(
            (t.name, t.shape, t.master or t.dtype) for t in trained
        ),
        "padding": 0,
    }
    # The update hands every gradient to the optimizer in the dtype of what it steps on.
    recast = sum(
        tensor.numel * (tensor.master or tensor.dtype).itemsize
        for bucket, grad in zip(buckets, grads, strict=True)
        for tensor in bucket
        if (tensor.master or tensor.dtype) != grad
    )
    updated = memory["gradients"] + 2 * (memory["master"] + memory["optimizer"])
    return Costs(
        sharding="none: every rank holds everything",
        memory=memory,
        computing_bytes=max((t.numel * t.dtype.itemsize for t in trained), default=0),
        updating_bytes=recast,
        update_traffic_bytes=updated + memory["parameters"] * (1 if memory["master"] else 2),
        messages=tuple(
            _messages(work.data_ranks, buckets, sizes, [work.wire or grad for grad in grads])
        ),
    )


def _held(work: Workload) -> Iterator[_Tensor]:
    precision = work.precision
    for name, param in work.model.named_parameters():
        target = precision.compute if param.dtype.is_floating_point else None
        # Also of a model that was built in 16 bits, as `ds_core.whole_model` has it.
        has_master = target is not None and precision.master not in (None, target)
        master = precision.master if has_master and param.requires_grad else None
        yield _Tensor(name, param.shape, target or param.dtype, master, param.requires_grad)


def _buckets(trained: list[_Tensor]) -> Iterator[list[_Tensor]]:
    """The parameters whose gradients travel together, as `ds_core.replicated` divides them."""
    runs: dict[torch.dtype, list[_Tensor]] = {}
    for tensor in trained:
        run = runs.setdefault(tensor.dtype, [])
        run.append(tensor)
        if sum(each.numel for each in run) * tensor.dtype.itemsize >= BUCKET_BYTES:
            yield runs.pop(tensor.dtype)
    yield from runs.values()


def _messages(
    ranks: int, buckets: list[list[_Tensor]], sizes: list[int], wires: list[torch.dtype]
) -> Iterator[Message]:
    if ranks == 1:
        return
    for bucket, numel, dtype in zip(buckets, sizes, wires, strict=True):
        if numel:
            sent = _all_reduced(numel * dtype.itemsize, ranks)
            caller = bucket[0].name
            yield Message("all_reduce", caller, "dp", "gradients", "last backward", 1, sent)
    votes = sum(len(bucket) for bucket in buckets)
    if votes:
        sent = _all_reduced(4 * votes, ranks)
        yield Message("all_reduce", "used parameters", "dp", "control", "update", 1, sent)


def _all_reduced(size_bytes: int, ranks: int) -> int:
    return 2 * (ranks - 1) * size_bytes // ranks
