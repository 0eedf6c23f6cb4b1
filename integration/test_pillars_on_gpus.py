"""What ds-zero computes on a GPU that is not there, with fake tensors: by kernels of ds-ops.

A piece of a flat shard is one call of a kernel; a loss by tiles is the fused one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ds_ops
from ds_core import ops
from ds_ops.triton_kernels import targets
from ds_zero.inner_step import InnerStep
from ds_zero.tiled_compute import tiled_loss
from ds_zero.unit_piece import OptimizerPiece

pytest.importorskip("triton", reason="triton is not installed")

NUMEL = 64
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adam_step_": ds_ops.FusedAdam,
    "lion_step_": ds_ops.FusedLion,
    "adagrad_step_": ds_ops.FusedAdagrad,
    "sgd_step_": lambda p: ds_ops.FusedSGD(p, momentum=0.9),
    "adam8bit_step_": ds_ops.Adam8bit,
}


class Flat:
    """A flat tensor: torch without CUDA has no indices for one that says it is on a GPU."""

    def __init__(self, t: torch.Tensor) -> None:
        self._t = t

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self._t.narrow(0, part.start, part.stop - part.start)


class Shard:
    """What a step reads of a unit."""

    states = "device"

    def __init__(self, grad: Any) -> None:
        self.grad = grad

    def settle_gradient(self) -> None:
        """It is there."""

    @contextlib.contextmanager
    def stepping(self, piece: OptimizerPiece, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        yield


class Calls(TorchDispatchMode):
    """Our operators, each with the formats and places of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, set[str]]] = []
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ds_ops":
            tensors = [a for a in args if torch.is_tensor(a)]
            self.found.append((func.name().split("::")[1], {t.device.type for t in tensors}))
            self.dtypes = [t.dtype for t in tensors[:2]]
        else:
            self.others.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_flat_shards_is_one_kernel_for_each_piece(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "architecture", lambda *_: "sm_90")
    assert ops.choose(name, "cuda").implementation.name == "triton"
    low = torch.bfloat16
    with FakeTensorMode():
        master = Flat(torch.empty(NUMEL, device="cuda"))
        rounded: Any = Flat(torch.empty(NUMEL, device="cuda", dtype=low))
        unit = Shard(Flat(torch.empty(NUMEL, device="cuda", dtype=low)))
        scale = torch.empty((), device="cuda")
    halves = [nn.Parameter(master[0:32]), nn.Parameter(master[32:NUMEL])]
    pieces = [
        OptimizerPiece(0, weights, 32 * index, 32 * (index + 1))
        for index, weights in enumerate(halves)
    ]
    optimizer = OPTIMIZERS[name](halves)
    with Calls() as calls, torch.no_grad():
        InnerStep(optimizer, scale).take(unit, pieces, rounded)
    assert calls.found == [(name, {"cuda"})] * 2
    assert calls.dtypes == [torch.float32, low]
    # Neither casts nor copies beside it.
    passes = ("aten::copy_", "aten::_to_copy", "aten::mul.Tensor", "aten::mul_.Tensor")
    assert not calls.others & set(passes)


def test_a_loss_by_tiles_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "architecture", lambda *_: "gfx942")
    # Products by torch, the loss between them in place by ours.
    assert ops.choose("linear_cross_entropy", "cuda").implementation.name == "torch"
    assert ops.choose("cross_entropy_", "cuda").implementation.name == "triton"
    with FakeTensorMode():
        head = nn.Linear(16, 32, device="meta")
        head.weight = nn.Parameter(torch.empty(32, 16, device="cuda"))
        head.bias = nn.Parameter(torch.empty(32, device="cuda"))
        hidden = torch.empty(3, 2, 16, device="cuda")
        tokens = torch.empty(3, 2, device="cuda", dtype=torch.int64)
        with Calls() as calls, torch.no_grad():
            loss = tiled_loss(head, hidden, tokens, num_tiles=2)
    assert calls.found == [("linear_cross_entropy", {"cuda"})]
    assert loss.device.type == "cuda"
    assert loss.shape == ()
