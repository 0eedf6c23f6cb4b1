"""Taking back a step of an optimizer, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
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
from ds_core.ops.optimizer_step import check_undo
from ds_core.ops.registry import run
from ds_core.ops.tolerance import EXACT
from ds_core.seams.op import Floor, Op

NAME = "step_undo_"


def step_undo_(
    param: torch.Tensor,
    states: Sequence[torch.Tensor],
    undo: torch.Tensor,
    copy: torch.Tensor | None = None,
) -> None:
    """Give `param` and `states` the bytes that a step saved in `undo` before it changed them.

    Args:
        param, states: as the step had them, the states in its order.
        undo: flat uint8, as the step filled it.
        copy: receives the restored parameter, rounded to nearest.
    """
    run(NAME, param, list(states), copy, undo)


def reference(
    param: torch.Tensor,
    states: list[torch.Tensor],
    copy: torch.Tensor | None,
    undo: torch.Tensor,
) -> None:
    """As `step_undo_`."""
    fake(param, states, copy, undo)
    start = 0
    for kept in (param, *states):
        stop = start + kept.nbytes
        # Through bytes, because a part of `undo` may begin anywhere.
        kept.view(-1).view(torch.uint8).copy_(undo[start:stop])
        start = stop
    if copy is not None:
        copy.copy_(param)


def fake(
    param: torch.Tensor,
    states: list[torch.Tensor],
    copy: torch.Tensor | None,
    undo: torch.Tensor,
) -> None:
    """It returns nothing; raises OpError for what does not fit."""
    expect_float(NAME, "param", param)
    expect(param.is_contiguous(), NAME, "param", "a tensor with gaps", "a contiguous one")
    for state in states:
        expect_float(NAME, "states", state)
        expect_shape(NAME, "states", state, param.shape)
        expect(state.is_contiguous(), NAME, "states", "a tensor with gaps", "contiguous ones")
        expect_together(NAME, param, states=state)
    if copy is not None:
        expect_float(NAME, "copy", copy)
        expect_shape(NAME, "copy", copy, param.shape)
    check_undo(NAME, undo, [param, *states])
    expect_together(NAME, param, copy=copy, undo=undo)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; no state, one and two; a copy; all unaligned."""
    found: list[tuple[Any, ...]] = []
    for numel, states in ((1003, 2), (127, 1), (33, 0), (1, 2), (0, 2)):
        old = [randn(device, dtype, numel, seed=1)]
        old += [randn(device, torch.float32, numel, seed=2 + index) for index in range(states)]
        undo = torch.cat([t.view(torch.uint8) for t in old])
        param, *others = (torch.zeros_like(t) for t in old)
        copy = torch.zeros(numel, dtype=torch.bfloat16, device=device) if numel == 1003 else None
        found.append((param, others, copy, undo))
    param, others, copy, undo = found[0]
    found.append((unaligned(param), [unaligned(t) for t in others], copy, unaligned(undo)))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x, undo = torch.ones(8, device=device), torch.zeros(64, dtype=torch.uint8, device=device)
    return [
        ("param: got torch.int64", (x.long(), [x.clone()], None, undo)),
        ("states: (got shape|has)", (x.clone(), [x[:7].clone()], None, undo)),
        ("undo: (got shape|has)", (x.clone(), [x.clone()], None, undo[:63])),
        ("undo: got torch.float32", (x.clone(), [x.clone()], None, undo.float())),
        ("undo: ", (x.clone(), [x.clone()], None, undo.repeat(2)[::2])),
    ]


def floor(
    param: torch.Tensor,
    states: list[torch.Tensor],
    copy: torch.Tensor | None,
    undo: torch.Tensor,
) -> Floor:
    return Floor(undo.nbytes, undo.nbytes + (copy.nbytes if copy is not None else 0))


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    param, *states = (torch.zeros(10_000_000, device=device) for _ in range(3))
    undo = torch.zeros(120_000_000, dtype=torch.uint8, device=device)
    return [("10M float32, two states", (param, states, None, undo))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) param, Tensor(b!)[] states, Tensor(c!)? copy, Tensor undo) -> ()",
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
