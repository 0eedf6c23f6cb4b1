"""Steps that the host takes before the gradient norm is known leave the bits of plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offload_loops import (
    PRECISIONS,
    assert_same_bits,
    everything,
    host_beside_device,
    train,
)
from zero_loops import adamw, sharded
from zero_models import CASES

import ds_zero
from ds_core.errors import DsError
from ds_core.testing import run_ranks
from ds_zero import Offload
from ds_zero.config import ZeroSection
from ds_zero.host_steps.speculative import Speculation

PLAIN = Offload(optimizer="cpu")
AHEAD = Offload(optimizer="cpu", speculative=True)


def compare(name: str, stage: int, **options: Any) -> list[int]:
    """Every step leaves what it does without speculation; (taken ahead, taken back)."""
    expected, _ = train(name, stage, PLAIN, **options)
    found, optimizer = train(name, stage, AHEAD, **options)
    for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(mine, other, f"step {step}")
    ahead = optimizer._host_step
    assert isinstance(ahead, Speculation)
    optimizer.close()
    return [ahead.taken, ahead.redone]


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_a_speculative_step_is_the_plain_one(precision: str, stage: int):
    world_size = 1 if precision == "bf16-grad32" else 2
    for taken, redone in run_ranks(world_size, compare, "groups", stage, precision=precision):
        assert 0 < redone < taken


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_in_a_thread_with_memory_of_its_own(precision: str, stage: int):
    # As beside an accelerator: copies cross, and the host's steps run while backward does.
    for taken, redone in run_ranks(2, compare, "tied", stage, precision=precision, apart=True):
        assert 0 < redone < taken


@pytest.mark.parametrize("apart", [False, True], ids=["one-memory", "two-memories"])
@pytest.mark.parametrize("quiet", [False, True], ids=["reduce-each", "no-sync"])
def test_only_the_last_micro_batch_is_stepped_ahead(quiet: bool, apart: bool, stage: int):
    run = run_ranks(2, compare, "stack", stage, accumulate=3, quiet=quiet, apart=apart)
    # Steps 1 and 5 of six are clipped, step 3 overflows: nothing else is taken back.
    units, clipped, left_out = 6, 2, 1
    for taken, redone in run:
        assert taken == 5 * units
        assert clipped * units <= redone <= (clipped + left_out) * units


@pytest.mark.parametrize("name", ["unused", "odd-sizes", "inner-branches", "branches-random"])
def test_parameters_that_a_step_does_not_use(name: str, stage: int):
    world_size = 1 if name == "unused" else 2
    run_ranks(world_size, compare, name, stage, timeout_s=60)


@pytest.mark.parametrize("seed", range(4))
def test_no_update_is_lost_whatever_comes(seed: int):
    stage, precision = 1 + seed % 3, ["fp32", "bf16", "fp16", "bf16-grad32"][seed]
    options = {"seed": seed, "steps": 25, "precision": precision, "apart": seed % 2 == 0}
    run_ranks(2, compare, "groups", stage, **options)


@pytest.mark.parametrize("which", ["SGD", "Adagrad", "RMSprop", "NAdam"])
def test_any_elementwise_optimizer(which: str):
    run_ranks(1, with_optimizer, which)


def with_optimizer(which: str) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, which)(params, lr=1e-2)

    compare("stack", 2, make=make, precision="bf16")


def test_what_happens_between_backward_and_step_counts(stage: int):
    run_ranks(2, meddle, stage)


def meddle(stage: int) -> None:
    results = []
    for offload in (PLAIN, AHEAD):
        torch.manual_seed(0)
        case, rank = CASES["stack"], torch.distributed.get_rank()
        model, optimizer = sharded(case, stage, adamw, offload=offload)
        for step in range(9):
            case.loss(model, case.inputs(rank, step), rank, step).backward()
            if step == 1:  # a schedule that is stepped early
                optimizer.param_groups[0]["lr"] *= 0.5
            elif step == 2:
                optimizer.set_full_gradient("exit.bias", torch.ones(5))
            elif step == 3:
                optimizer.set_full_parameter("exit.bias", torch.ones(5))
            elif step == 4:  # a second backward without no_sync, after another forward
                case.loss(model, case.inputs(rank, 99), rank, step).backward()
            elif step == 5:
                before = everything(optimizer)
                results.append(before)
            elif step == 6:
                optimizer.clip_grad_norm_(1e-3)
            elif step == 7:
                optimizer.local_value("exit.bias", "gradient").mul_(2.0)
            elif step == 8:
                results.append({"gradient": optimizer.full_gradient("entry.weight")})
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(optimizer))
    half = len(results) // 2
    for mine, other in zip(results[half:], results[:half], strict=True):
        assert_same_bits(mine, other, "meddled")


def test_the_model_sees_old_weights_until_the_step(stage: int):
    for apart in (False, True):
        run_ranks(1, look, stage, apart)


def look(stage: int, apart: bool) -> None:
    case = CASES["stack"]
    with host_beside_device():
        model, optimizer = sharded(case, stage, offload=AHEAD)
    x = case.inputs(0, 0)
    with torch.no_grad():
        before = model(x)
    model(x).square().mean().backward()
    optimizer._host_step.wait()
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert optimizer.memory()["undo"] > 0
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(x), before)
    optimizer.close()


def test_memory_says_what_an_undo_takes():
    assert run_ranks(1, undo_bytes)[0] == (3, 3)


def undo_bytes() -> tuple[float, float]:
    found = []
    for precision in ("fp32", "bf16"):
        _, optimizer = train("stack", 1, AHEAD, steps=1, precision=precision)
        memory = optimizer.memory()
        weights = memory["parameters"] if precision == "fp32" else memory["master"]
        rounded = 0 if precision == "fp32" else memory["parameters"]
        found.append((memory["undo"] - rounded) / weights)
    return round(found[0]), round(found[1])


def test_an_error_in_the_host_step_reaches_the_program():
    run_ranks(1, fail)


def fail() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no such luck")

    case = CASES["stack"]
    with host_beside_device():
        model, optimizer = sharded(case, 1, lambda p: Broken(p, lr=0.1), offload=AHEAD)
    case.loss(model, case.inputs(0, 0), 0, 0).backward()
    with pytest.raises(RuntimeError, match="no such luck"):
        optimizer.step()


def test_what_cannot_be_taken_back_is_refused():
    for home in ("device", "nvme"):
        with pytest.raises(DsError, match=r"speculative: got True with optimizer="):
            Offload(optimizer=home, folder="/tmp", speculative=True)
    run_ranks(1, refuse)


class RoundsAtRandom(torch.optim.SGD):
    """Says that it rounds at random."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["stochastic_rounding"] = True


class KeepsCount(torch.optim.SGD):
    """Keeps a number for all parameters together."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def refuse() -> None:
    from ds_core.optim import Muon

    case = CASES["stack"]
    with pytest.raises(DsError, match="RoundsAtRandom rounds at random by the order"):
        sharded(case, 1, RoundsAtRandom, offload=AHEAD)
    with pytest.raises(DsError, match="Muon puts matrices together"):
        sharded(case, 1, lambda p: Muon((f"blocks.{i}", x) for i, x in enumerate(p)), offload=AHEAD)
    with pytest.raises(DsError, match="keeps gradients to step again"):
        sharded(case, 1, offload=AHEAD, update_in_backward=True)
    model, optimizer = sharded(case, 1, lambda p: KeepsCount(p, lr=0.1), offload=AHEAD)
    case.loss(model, case.inputs(0, 0), 0, 0).backward()
    with pytest.raises(DsError, match="KeepsCount keeps 'k' in its parameter groups"):
        optimizer.step()


def test_the_config_says_super_offload():
    section = {"stage": 1, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    assert ZeroSection.model_validate(section).offload().speculative
    section["offload_optimizer"]["device"] = "none"
    with pytest.raises(Exception, match='super_offload: got true with device "none"'):
        ZeroSection.model_validate(section)
    assert isinstance(ds_zero.Offload(), Offload)
