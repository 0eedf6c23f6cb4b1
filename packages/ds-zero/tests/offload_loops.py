"""What the tests of offloaded steps share: everything that a step changes, and the other memory."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from zero_loops import sharded
from zero_models import CASES

import ds_zero
from ds_core.checkpoint import FlatShard
from ds_core.precision import Precision
from ds_zero.offload import homes

PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(compute=torch.bfloat16, master=torch.float32),
    "fp16": Precision(compute=torch.float16, master=torch.float32),
    "bf16-grad32": Precision(compute=torch.bfloat16, master=torch.float32, grad=torch.float32),
}


@contextmanager
def host_beside_device() -> Iterator[None]:
    """Inside, the memory of the host is another than the device's, as with an accelerator."""
    before = homes.is_host
    homes.is_host = lambda device: False
    try:
        yield
    finally:
        homes.is_host = before


def everything(optimizer: ds_zero.ZeroOptimizer) -> dict[str, Any]:
    """All that a step changes, on this rank: weights of the model, precise ones, every state."""
    found: dict[str, Any] = {f"seen {k}": v for k, v in optimizer.full_state_dict().items()}
    for name, value in optimizer.model_state().items():
        found[f"precise {name}"] = _copied(value)
    for key, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            found[f"{key} {name}"] = _copied(value)
    return found


def _copied(value: Any) -> Any:
    """A state's own elements, wherever they are; or its value."""
    if not isinstance(value, FlatShard):
        return copy.deepcopy(value)
    with value.opened() as local:
        return local.detach().clone()


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Two results of `everything` are equal, NaN included."""
    assert found.keys() == expected.keys(), what
    for key, value in found.items():
        other = expected[key]
        if not isinstance(value, torch.Tensor):
            assert value == other, f"{what}: {key}"
            continue
        assert value.dtype == other.dtype, f"{what}: {key}"
        assert torch.equal(value.nan_to_num(7.0), other.nan_to_num(7.0)), f"{what}: {key}"


def train(
    name: str,
    stage: int,
    offload: ds_zero.Offload,
    *,
    steps: int = 6,
    precision: str = "fp32",
    accumulate: int = 1,
    quiet: bool = False,
    seed: int | None = None,
    apart: bool = False,
    make: Any = None,
    **options: Any,
) -> tuple[list[Any], ds_zero.ZeroOptimizer]:
    """Train a case; what every step left, and the optimizer.

    Steps are plain, clipped, plain, and left out for an overflow on the last rank, in turns; with a
    `seed` by chance, and some end without any step.
    """
    case, rank = CASES[name], dist.get_rank()
    chance = random.Random(seed)
    with host_beside_device() if apart else nullcontext():
        model, optimizer = sharded(
            case,
            stage,
            make or _adamw,
            precision=PRECISIONS[precision],
            offload=offload,
            **options,
        )
    dtype = PRECISIONS[precision].compute or torch.float32
    scale, poison = 1024.0 if precision == "fp16" else 1.0, [1.0]
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * poison[0])
    left = []
    for step in range(steps):
        fate = chance.choice("pcos") if seed is not None else "pcpo"[step % 4]
        overflows = fate == "o" and rank == dist.get_world_size() - 1
        for micro in range(accumulate):
            last = micro == accumulate - 1
            optimizer.expected_scale = 1.0 / scale if last else None
            poison[0] = float("inf") if last and overflows else 1.0
            with optimizer.no_sync() if quiet and not last else nullcontext():
                number = step * accumulate + micro
                batch = case.inputs(rank, number)
                batch = batch.to(dtype) if batch.is_floating_point() else batch
                loss = case.loss(model, batch, rank, number) / accumulate * scale
                loss.backward()
        if fate != "s":
            _end(optimizer, fate, scale)
        optimizer.zero_grad()
        left.append(everything(optimizer))
    return left, optimizer


def _end(optimizer: ds_zero.ZeroOptimizer, fate: str, scale: float) -> None:
    """End a step as an engine does: one that is (c)lipped, or not, or left out (overflow)."""
    norm = float(optimizer.grad_norm()) / scale
    assert math.isfinite(norm) == (fate != "o")
    if fate != "o":
        clip = 0.3 * norm / (norm + 1e-6) if fate == "c" else 1.0
        optimizer.update(clip / scale)


def _adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
