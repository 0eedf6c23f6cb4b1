from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from zero_loops import adamw, sharded_steps
from zero_models import CASES, Case, Stack, square

import ds_zero
from ds_core import comm
from ds_core.precision import Precision
from ds_core.testing import run_ranks

WIDE = Case(lambda: Stack(6), square)
ALIGN_BYTES = 64


def padded(unit: ds_zero.optimizer.Unit, itemsize: int, num_ranks: int) -> int:
    """Elements of a unit's flat buffer: each parameter from a multiple of 64 bytes on."""
    align, end = ALIGN_BYTES // itemsize, 0
    for spec in unit.specs:
        end = math.ceil(end / align) * align + spec.param.numel()
    return math.ceil(end / (align * num_ranks)) * align * num_ranks


def measured_step(
    case: Case, stage: int, accumulate: int = 1, no_sync: bool = False, **options
) -> tuple[comm.Ledger, ds_zero.ZeroOptimizer]:
    """The account of one step, after two that settle every order."""
    torch.manual_seed(0)
    model, mesh = case.build(), comm.Mesh.world()
    options.setdefault("min_unit_numel", 0)
    optimizer = ds_zero.shard(model, adamw(case.params(model)), stage, mesh=mesh, **options)
    settings = {"accumulate": accumulate, "no_sync": no_sync}
    sharded_steps(model, optimizer, case, 3, **settings)
    with mesh.ledger.measure() as sent:
        sharded_steps(model, optimizer, case, 1, first=3, **settings)
    return sent, optimizer


def unit_bytes(sent: comm.Ledger, optimizer: ds_zero.ZeroOptimizer, op: str) -> int:
    names = {unit.name for unit in optimizer.units}
    return sum(sent.sent_bytes(op=op, caller=name) for name in names)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_sends_the_optimum(world_size: int, stage: int):
    run_ranks(world_size, check_step, stage)


def check_step(stage: int) -> None:
    sent, optimizer = measured_step(WIDE, stage)
    n = dist.get_world_size()
    whole = sum(4 * padded(unit, 4, n) for unit in optimizer.units)
    root = sum(4 * padded(unit, 4, n) for unit in optimizer.units if unit.is_root)
    # Parameters: once at stages 1 and 2; at stage 3 for forward and for backward, but for the
    # root unit, which is kept between them.
    gathered = 2 * whole - root if stage == 3 else whole
    assert unit_bytes(sent, optimizer, "all_gather") == (n - 1) * gathered // n
    assert unit_bytes(sent, optimizer, "reduce_scatter") == (n - 1) * whole // n
    assert sent.num_calls(op="broadcast") == sent.num_calls(op="all_to_all") == 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_control_messages_are_a_few_bytes(world_size: int, stage: int):
    run_ranks(world_size, check_control, stage)


def check_control(stage: int) -> None:
    sent, optimizer = measured_step(WIDE, stage)
    useful = unit_bytes(sent, optimizer, "all_gather") + unit_bytes(
        sent, optimizer, "reduce_scatter"
    )
    # The norm, whether a rank is in trouble, what it has updated already; by parameter, its use.
    flags = 8 * (3 + sum(len(unit.params) for unit in optimizer.units))
    passes = 2 * 8 if stage == 3 else 0
    control = (dist.get_world_size() - 1) * (flags + passes)
    assert sent.sent_bytes() - useful == control


@pytest.mark.parametrize("no_sync", [False, True], ids=["reduce-each", "no-sync"])
def test_accumulation_sends_gradients_as_often_as_documented(no_sync: bool, stage: int):
    run_ranks(2, check_accumulation, stage, no_sync)


def check_accumulation(stage: int, no_sync: bool) -> None:
    sent, optimizer = measured_step(WIDE, stage, accumulate=3, no_sync=no_sync)
    whole = sum(4 * padded(unit, 4, 2) for unit in optimizer.units)
    times = 1 if no_sync else 3
    assert unit_bytes(sent, optimizer, "reduce_scatter") == times * whole // 2
    passes = 6 if stage == 3 else 1
    assert unit_bytes(sent, optimizer, "all_gather") == passes * whole // 2


def test_bf16_halves_the_bytes(stage: int):
    run_ranks(2, check_bf16, stage)


def check_bf16(stage: int) -> None:
    precision = Precision(compute=torch.bfloat16, master=torch.float32)
    sent, optimizer = measured_step(CASES["untied"], stage, precision=precision)
    whole = sum(2 * padded(unit, 2, 2) for unit in optimizer.units)
    assert unit_bytes(sent, optimizer, "reduce_scatter") == whole // 2


def test_frozen_units_send_no_gradients(stage: int):
    run_ranks(2, check_frozen, stage)


def check_frozen(stage: int) -> None:
    sent, optimizer = measured_step(CASES["lora"], stage)
    trained = sum(4 * padded(unit, 4, 2) for unit in optimizer.units if unit.trainable)
    whole = sum(4 * padded(unit, 4, 2) for unit in optimizer.units)
    assert unit_bytes(sent, optimizer, "reduce_scatter") == trained // 2
    # The published parameters; or two gathers of everything, frozen ones included. What no
    # gradient flows through, as the frozen entry, is not gathered for backward.
    entry = sum(4 * padded(unit, 4, 2) for unit in optimizer.units if unit.name == "entry")
    gathered = 2 * whole - entry if stage == 3 else trained
    assert unit_bytes(sent, optimizer, "all_gather") == gathered // 2


def test_recomputation_gathers_nothing_more():
    run_ranks(2, check_recomputation)


def check_recomputation() -> None:
    for name in ("reentrant", "non-reentrant"):
        sent, optimizer = measured_step(CASES[name], 3)
        whole = sum(4 * padded(unit, 4, 2) for unit in optimizer.units)
        assert unit_bytes(sent, optimizer, "all_gather") == 2 * whole // 2
