"""Host and device step their parts at the same time, with the bits of a step on either alone."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from offload_loops import assert_same_bits, everything, host_beside_device, train
from torch import nn
from zero_loops import sharded, sharded_steps
from zero_models import CASES

import ds_zero
from ds_core.errors import DsError
from ds_core.optimizer_state import devices_of_state
from ds_core.testing import run_ranks
from ds_zero import Offload
from ds_zero.host_steps import twin_flow
from ds_zero.host_steps.speculative import Speculation
from ds_zero.host_steps.twin_flow import TwinFlow, best_split

RATIOS: tuple[Any, ...] = (0.0, 0.3, 0.7, "auto")


def compare(name: str, stage: int, **options: Any) -> list[float]:
    """Every ratio leaves the bits of 1.0; the share of elements on the host at the end."""
    expected, _ = train(name, stage, Offload(optimizer="cpu"), steps=9, **options)
    shares = []
    for ratio in RATIOS:
        offload = Offload(optimizer="cpu", ratio=ratio)
        found, optimizer = train(name, stage, offload, steps=9, **options)
        for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(mine, other, f"ratio {ratio}, step {step}")
        shares.append(optimizer.host_ratio)
        optimizer.close()
    return shares


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("apart", [False, True], ids=["one-memory", "two-memories"])
def test_any_ratio_leaves_the_same_bits(apart: bool, precision: str, stage: int):
    name = "unused" if apart else "groups"
    for shares in run_ranks(2, compare, name, stage, precision=precision, apart=apart):
        assert shares[0] == 0.0
        assert 0.1 < shares[1] < 0.5 < shares[2] < 0.95


def test_a_step_ahead_and_beside(stage: int):
    run_ranks(2, both, stage)


def both(stage: int) -> None:
    expected, _ = train("stack", stage, Offload(optimizer="cpu"))
    offload = Offload(optimizer="cpu", ratio=0.5, speculative=True)
    found, optimizer = train("stack", stage, offload)
    for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(mine, other, f"step {step}")
    assert isinstance(optimizer._host_step, Speculation)
    assert optimizer._host_step.taken > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_split_is_the_best_one(seed: int):
    chance = random.Random(seed)
    sizes = [chance.randint(900, 1100) for _ in range(100)]
    for _ in range(20):
        host, device = chance.uniform(0.1, 10), chance.uniform(0.1, 10)

        def needed(share: float, host: float = host, device: float = device) -> float:
            return max(host * share, device * (1 - share)) * sum(sizes)

        leaves = best_split(sizes, host, device)
        found = sum(size for size, leave in zip(sizes, leaves, strict=True) if leave) / sum(sizes)
        best = min(needed(share / 10_000) for share in range(10_001))
        assert needed(found) <= 1.02 * best


def test_units_that_are_too_large_to_share_stay_with_the_faster_side():
    assert best_split([100], 1.0, 3.0) == [True]
    assert best_split([100], 3.0, 1.0) == [False]
    assert best_split([100, 1], 200.0, 1.0) == [False, False]
    # A large one at the end stays, a small one before it leaves.
    assert best_split([50, 50, 10, 900], 30.0, 1.0) == [False, False, True, False]


@pytest.mark.parametrize("apart", [False, True], ids=["one-memory", "two-memories"])
@pytest.mark.parametrize("rates", [(1.0, 3.0), (3.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_auto_moves_states_once_to_where_both_sides_finish_together(
    rates: tuple[float, float], apart: bool
):
    shares = run_ranks(2, chosen, rates, apart)
    assert shares[0] == shares[1]
    wanted = rates[1] / sum(rates)
    assert abs(shares[0] - wanted) < 0.2


def chosen(rates: tuple[float, float], apart: bool) -> float:
    case, results, share = CASES["stack"], [], 0.0
    for offload in (Offload(optimizer="cpu"), Offload(optimizer="cpu", ratio="auto")):
        with host_beside_device() if apart else nullcontext():
            model, optimizer = sharded(case, 3, offload=offload)
            if isinstance(optimizer._host_step, TwinFlow):
                # The second rank measures something else; both decide alike.
                slower = 1.0 if torch.distributed.get_rank() == 0 else 0.5
                optimizer._host_step._rates = [(rates[0] * slower, rates[1] * slower)] * 99
            losses = sharded_steps(model, optimizer, case, 8)
        results.append({"losses": losses, **everything(optimizer)})
        share = optimizer.host_ratio
    assert_same_bits(results[1], results[0], "auto")
    return share


def test_auto_measures_and_decides_alike():
    shares = run_ranks(2, measured)
    assert shares[0] == shares[1]


def measured() -> float:
    case = CASES["stack"]
    model, optimizer = sharded(case, 2, offload=Offload(optimizer="cpu", ratio="auto"))
    assert 0.3 < optimizer.host_ratio < 0.7
    sharded_steps(model, optimizer, case, twin_flow.WARM_UP + twin_flow.MEASURED)
    twins = optimizer._host_step
    assert isinstance(twins, TwinFlow)
    assert not twins._measures
    assert len(twins._rates) == twin_flow.MEASURED
    assert all(host > 0 and device > 0 for host, device in twins._rates)
    share = optimizer.host_ratio
    sharded_steps(model, optimizer, case, 2)
    assert optimizer.host_ratio == share
    return share


def test_what_has_no_two_sides_is_refused():
    with pytest.raises(DsError, match='ratio: got "auto" with optimizer='):
        Offload(optimizer="nvme", folder="/tmp", ratio="auto")
    run_ranks(1, refuse)


class RoundsAtRandom(torch.optim.SGD):
    """Says that it rounds at random."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["stochastic_rounding"] = True


def refuse() -> None:
    case, auto = CASES["stack"], Offload(optimizer="cpu", ratio="auto")
    with pytest.raises(DsError, match="ratio: RoundsAtRandom rounds at random"):
        sharded(case, 1, RoundsAtRandom, offload=auto)
    with pytest.raises(DsError, match="measures a step after backward"):
        sharded(case, 1, offload=auto, update_in_backward=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("rates", [(1.0, 3.0), (3.0, 1.0)], ids=["to-the-host", "to-the-device"])
def test_auto_moves_all_that_a_step_on_an_accelerator_needs(rates: Any, fused: bool):
    run_ranks(1, step_after_a_move, rates, fused)


def step_after_a_move(rates: tuple[float, float], fused: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    results = []
    for ratio in (1.0, "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(device)
        # A fused kernel counts its steps on the device, a plain one on the CPU.
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused, foreach=False)
        offload = Offload(optimizer="cpu", ratio=ratio)  # type: ignore[arg-type]
        optimizer = ds_zero.shard(model, inner, 2, min_unit_numel=1, offload=offload)
        if isinstance(optimizer._host_step, TwinFlow):
            optimizer._host_step._rates = [rates] * 99
        for step in range(8):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(device)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for unit in optimizer.units:
            group = optimizer.param_groups[0]
            for piece in unit.optimizer_pieces:
                places = devices_of_state(optimizer._inner, group, piece.weights)
                state = optimizer.state[piece.weights]
                assert {key: value.device for key, value in state.items()} == places
        results.append(optimizer.full_state_dict())
        optimizer.close()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)
