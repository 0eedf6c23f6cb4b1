"""ZenFlow: the important part at once, the rest every few steps, and nothing lost on the way."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from offload_loops import assert_same_bits, everything, host_beside_device, train
from zero_loops import sharded, sharded_steps
from zero_models import CASES

from ds_core.checkpoint import load, save
from ds_core.errors import DsError
from ds_core.testing import run_ranks
from ds_zero import Offload, ZenFlow
from ds_zero.config import ZeroSection
from ds_zero.host_steps import zenflow
from ds_zero.host_steps.zenflow import IMPORTANT, WAITING, important

PLAIN = Offload(optimizer="cpu")


def compare_all_important(stage: int, precision: str, name: str) -> None:
    expected, _ = train(name, stage, PLAIN, precision=precision)
    for overlap in (False, True):
        all_of_it = ZenFlow(topk_ratio=1.0, overlap_step=overlap, full_warm_up_rounds=2)
        found, optimizer = train(name, stage, PLAIN, precision=precision, zenflow=all_of_it)
        for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
            mine = {k: v for k, v in mine.items() if not k.startswith("zenflow_")}
            assert_same_bits(mine, other, f"step {step}")
        optimizer.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_with_all_blocks_important_it_is_the_plain_step(precision: str, stage: int):
    run_ranks(2, compare_all_important, stage, precision, "groups")


def test_parameters_that_a_step_does_not_use(stage: int):
    run_ranks(1, compare_all_important, stage, "fp32", "unused")


@pytest.mark.parametrize("overlap", [False, True], ids=["at-once", "overlapped"])
def test_no_gradient_is_lost(overlap: bool, stage: int):
    run_ranks(2, add_up, stage, overlap)


def add_up(stage: int, overlap: bool) -> None:
    """With SGD, and gradients that do not depend on weights, every gradient arrives once."""
    zenflow.BLOCK = 4
    torch.manual_seed(0)
    model = torch.nn.Linear(24, 8, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = _sgd(model, stage, ZenFlow(topk_ratio=0.3, select_interval=8, overlap_step=overlap))
    rank, total, masks = dist.get_rank(), torch.zeros_like(before), []
    for step in range(16):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
        y = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
        (model(x[rank]) * y[rank]).sum().backward()
        total += sum(y[i].T @ x[i] for i in range(2)) / 2
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 2:
            masks.append(optimizer.full_optimizer_state("weight", IMPORTANT).bool())
    assert 0.2 < masks[0].double().mean() < 0.4
    assert not torch.equal(masks[0], masks[1])
    found = optimizer.full_parameter("weight")
    # What waits is in fp32.
    torch.testing.assert_close(found, before - 0.01 * total, rtol=0, atol=1e-5)
    assert not optimizer.full_optimizer_state("weight", WAITING).any()


def _sgd(model: torch.nn.Module, stage: int, choice: ZenFlow) -> Any:
    import ds_zero

    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    return ds_zero.shard(model, inner, stage, offload=PLAIN, zenflow=choice)


def test_the_rest_is_seen_after_its_interval_or_one_later():
    assert run_ranks(1, changes, False)[0] == [3, 7, 11]
    assert run_ranks(1, changes, True)[0] == [7, 11]


def changes(overlap: bool) -> list[int]:
    """Steps after which the model sees another value of an unimportant element."""
    zenflow.BLOCK = 1
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = _sgd(model, 1, ZenFlow(topk_ratio=0.25, select_interval=100, overlap_step=overlap))
    found = []
    for step in range(13):
        before = model.weight.detach().clone()
        model(torch.tensor([[5.0, 1.0, 1.0, 1.0]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (model.weight.detach() != before)[0].tolist()
        assert moved[0]
        found += [step] if moved[1] else []
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overlap", [False, True], ids=["at-once", "overlapped"])
def test_a_run_resumes_exactly_in_the_middle_of_an_interval(
    overlap: bool, precision: str, stage: int, tmp_path: Path
):
    run_ranks(2, resume, stage, overlap, precision, tmp_path)


def resume(stage: int, overlap: bool, precision: str, folder: Path) -> None:
    from offload_loops import PRECISIONS

    zenflow.BLOCK = 8
    case = CASES["tied"]
    choice = ZenFlow(topk_ratio=0.2, select_interval=8, overlap_step=overlap)
    options: dict[str, Any] = {"precision": PRECISIONS[precision], "zenflow": choice}
    model, optimizer = sharded(case, stage, offload=PLAIN, **options)
    sharded_steps(model, optimizer, case, 6)
    held = optimizer.state_dict()
    state = {"model": optimizer.model_state(), "optimizer": held["state"], "groups": held["groups"]}
    save(folder, "tag", state)
    losses = sharded_steps(model, optimizer, case, 12, first=6)
    other, unsaved = sharded(case, stage, offload=PLAIN, **options)
    sharded_steps(other, unsaved, case, 6)
    assert sharded_steps(other, unsaved, case, 12, first=6) == losses, "saving changes nothing"
    assert_same_bits(everything(unsaved), everything(optimizer), "not saved")
    again, resumed = sharded(case, stage, offload=PLAIN, **options)
    resumed.prepare_load()
    held = resumed.state_dict()
    state = {"model": resumed.model_state(), "optimizer": held["state"], "groups": held["groups"]}
    loaded = load(folder, state=state, strict=False)
    resumed.load_state_dict({"state": loaded["optimizer"], "groups": loaded["groups"]})
    assert sharded_steps(again, resumed, case, 12, first=6) == losses
    assert_same_bits(everything(resumed), everything(optimizer), "resumed")


def test_what_the_model_sees_is_resumed_where_shards_live_on_disk(tmp_path: Path):
    run_ranks(1, resume_on_disk, tmp_path)


def resume_on_disk(folder: Path) -> None:
    """And beside a device, where rounded weights wait on the host."""
    zenflow.BLOCK = 8
    choice = ZenFlow(topk_ratio=0.2, select_interval=8, overlap_step=True)
    disk = Offload(optimizer="cpu", parameters="nvme", folder=str(folder / "swap"))
    for offload, apart in ((disk, False), (disk, True), (PLAIN, True)):
        losses = []
        for saves in (False, True):
            with host_beside_device() if apart else nullcontext():
                model, optimizer = sharded(CASES["tied"], 3, offload=offload, zenflow=choice)
            found = sharded_steps(model, optimizer, CASES["tied"], 6)
            if saves:
                save(folder, "tag", _state_of(optimizer))
                optimizer.close()
                with host_beside_device() if apart else nullcontext():
                    model, optimizer = sharded(CASES["tied"], 3, offload=offload, zenflow=choice)
                optimizer.prepare_load()
                loaded = load(folder, state=_state_of(optimizer), strict=False)
                optimizer.load_state_dict(
                    {"state": loaded["optimizer"], "groups": loaded["groups"]}
                )
            losses.append(found + sharded_steps(model, optimizer, CASES["tied"], 12, first=6))
            optimizer.close()
        assert losses[0] == losses[1], (offload.parameters, apart)


def _state_of(optimizer: Any) -> dict[str, Any]:
    held = optimizer.state_dict()
    return {"model": optimizer.model_state(), "optimizer": held["state"], "groups": held["groups"]}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_loads_with_and_without_zenflow(
    stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """By an engine, strictly; what has no place in the other run is told."""
    told = run_ranks(1, change_sides, stage, tmp_path, initialized=False)[0]
    there, back = told
    assert "dropped are the gradients of 3 steps" in there
    assert "zenflow_important, zenflow_shown, zenflow_steps, zenflow_waiting of its" in there
    assert "has no zenflow_important, zenflow_shown, zenflow_steps, zenflow_waiting: they " in back


def change_sides(stage: int, folder: Path) -> list[str]:
    told = []
    for number, stages in enumerate(((2, stage), (stage, 2))):
        first = _engine(stages[0], zenflow=number == 0)
        for step in range(7):
            _engine_step(first, step)
        first.save_checkpoint(folder / str(number))
        whole = first.state_dict() if number else None
        first.close()
        records = list[str]()
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ds_core.passing_state").addHandler(handler)
        second = _engine(stages[1], zenflow=number == 1)
        second.load_checkpoint(folder / str(number))
        logging.getLogger("ds_core.passing_state").removeHandler(handler)
        assert second.global_step == 7
        for name, value in (whole or {}).items():
            assert torch.equal(second.state_dict()[name], value), name
        for step in range(7, 16):
            _engine_step(second, step)
        second.close()
        told.append("\n".join(records))
    return told


def _engine(stage: int, *, zenflow: bool) -> Any:
    import ds_core

    torch.manual_seed(0)
    zero: dict[str, Any] = {"stage": stage}
    if zenflow:
        zero["offload_optimizer"] = {"device": "cpu"}
        zero["zenflow"] = {"overlap_step": True}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
    }
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 1))
    return ds_core.initialize(model, config)


def _engine_step(engine: Any, step: int) -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(step))
    engine.backward(engine(x).square().mean())
    engine.step()


def test_blocks_with_the_largest_gradients_are_important(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zenflow, "BLOCK", 4)
    gradient = torch.tensor([0.0, 3, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 9, 9])
    found = important(gradient, 0.5).tolist()
    assert found == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert important(gradient, 0.01).tolist() == [0] * 12 + [1, 1]


def test_clipping_and_steps_left_out(stage: int):
    run_ranks(2, clipped, stage)


def clipped(stage: int) -> None:
    """A run repeated is the same, in a thread too; some steps are clipped, some left out."""
    zenflow.BLOCK = 8
    for overlap in (False, True):
        choice = ZenFlow(topk_ratio=0.2, update_interval=2, select_interval=4, overlap_step=overlap)
        first, _ = train("groups", stage, PLAIN, steps=9, precision="fp16", zenflow=choice)
        again, _ = train("groups", stage, PLAIN, steps=9, precision="fp16", zenflow=choice)
        assert_same_bits(again[-1], first[-1], "again")
        assert all(torch.isfinite(v).all() for v in first[-1].values() if torch.is_tensor(v))


def test_it_learns():
    first, plain, ours, overlapped = run_ranks(1, learn)[0]
    assert plain < ours < 0.1 * first
    assert overlapped < 0.3 * first


def learn() -> list[float]:
    zenflow.BLOCK = 8
    found = []
    for choice in (None, ZenFlow(), ZenFlow(overlap_step=True)):
        case = CASES["overfit"]
        model, optimizer = sharded(case, 2, offload=PLAIN, zenflow=choice)
        losses = sharded_steps(model, optimizer, case, 60)
        found += losses[-1:] if found else [losses[0], losses[-1]]
    return found


def test_adam_is_as_written_in_the_docstring():
    run_ranks(1, against_reference)


def against_reference() -> None:
    """Element by element, in fp64: blocks change sides with their averages."""
    import ds_zero

    zenflow.BLOCK, n, rate, betas = 4, 4, 0.01, (0.9, 0.99)
    torch.manual_seed(0)
    model = torch.nn.Linear(24, 8, bias=False).double()
    weight = model.weight.detach().clone()
    inner = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.1)
    choice = ZenFlow(topk_ratio=0.3, update_interval=n, select_interval=8)
    optimizer = ds_zero.shard(model, inner, 2, offload=PLAIN, zenflow=choice)
    mean, square, waiting = (torch.zeros_like(weight) for _ in range(3))

    def update(where: torch.Tensor, gradient: torch.Tensor, step: int, many: int) -> None:
        m = mean.lerp(gradient, 1 - betas[0] ** many)
        v = square.lerp(gradient.square(), 1 - betas[1] ** many)
        mean[where], square[where] = m[where], v[where]
        lr = rate * many**0.5
        root = (v / (1 - betas[1] ** step)).sqrt() + 1e-8
        new = weight * (1 - lr * 0.1) - lr * m / (1 - betas[0] ** step) / root
        weight[where] = new[where]

    for step in range(1, 25):
        x = torch.randn(5, 24, dtype=torch.float64)
        y = torch.randn(5, 8, dtype=torch.float64)
        (model(x) * y).sum().backward()
        gradient = y.T @ x
        if step % 8 == 1:
            now = important(gradient.flatten(), 0.3).bool().view_as(weight)
        optimizer.step()
        optimizer.zero_grad()
        update(now, gradient, step, 1)
        waiting += gradient
        if step % n == 0:
            update(~now, waiting / n, step, n)
            waiting.zero_()
        torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"topk_ratio": 0.0}, "topk_ratio: got 0.0, expected more than 0"),
        ({"update_interval": 0}, "update_interval: got 0, expected at least 1"),
        ({"full_warm_up_rounds": -1}, "full_warm_up_rounds: got -1"),
        ({"select_interval": 6}, "select_interval: got 6, expected a multiple of update_interval"),
    ],
)
def test_choices_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(DsError, match=message):
        ZenFlow(**wrong)


def test_what_it_cannot_divide_is_refused():
    run_ranks(1, refuse)


def refuse() -> None:
    from ds_core.optim import Muon

    case = CASES["stack"]
    for offload, more, message in (
        (None, {}, 'the optimizer\'s states are on "device"'),
        (Offload(optimizer="cpu", ratio=0.5), {}, "ratio leaves some of them on the device"),
        (Offload(optimizer="cpu", speculative=True), {}, "offload.speculative steps everything"),
        (PLAIN, {"update_in_backward": True}, "update_in_backward steps everything"),
    ):
        with pytest.raises(DsError, match=message):
            sharded(case, 1, offload=offload, zenflow=ZenFlow(), **more)

    def muon(params: Any) -> torch.optim.Optimizer:
        return Muon((f"blocks.{i}", param) for i, param in enumerate(params))

    with pytest.raises(DsError, match="zenflow: Muon does not keep one number per element"):
        sharded(case, 1, muon, offload=PLAIN, zenflow=ZenFlow())


def section(**keys: Any) -> Any:
    whole = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": keys}
    return ZeroSection.model_validate(whole).zenflow.choice()


def test_the_config_has_deepspeeds_keys():
    assert section() == ZenFlow()
    assert section(update_interval=2, select_interval="auto") == ZenFlow(
        update_interval=2, select_interval=8
    )
    epochs = section(select_strategy="epoch", steps_per_epoch=10, overlap_step=True)
    assert epochs == ZenFlow(select_interval=12, overlap_step=True)
    unused = section(offload=True, auto_ratio=0.5, pt_reserved_cores_perc=0.2)
    assert unused == ZenFlow()
    for keys, message in (
        ({"select_strategy": "epoch"}, 'got "epoch" without steps_per_epoch'),
        ({"select_interval": 3}, "select_interval: got 3, which is no multiple"),
    ):
        with pytest.raises(Exception, match=message):
            section(**keys)
    with pytest.raises(Exception, match="zenflow: it divides a step that the host takes"):
        ZeroSection.model_validate({"stage": 2, "zenflow": {}})
