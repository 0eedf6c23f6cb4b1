"""State that is parked has no memory, and comes back bit for bit."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from test_memory import live_bytes
from torch import nn
from zero_loops import sharded, sharded_steps
from zero_models import CASES, Stack, vectors

import ds_core
import ds_zero
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_zero.offload import Offload, homes
from ds_zero.parking import KINDS

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)
REST = ("optim_states", "hp_params", "lp_grads", "contiguous_grad_buffer")


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_bit_for_bit(tmp_path, world_size: int, stage: int):
    run_ranks(world_size, park_between_steps, stage, str(tmp_path))


def park_between_steps(stage: int, folder: str) -> None:
    case = CASES["untied"]
    for precision, early in ((None, False), (BF16, False), (BF16, True)):
        kwargs = {"precision": precision, "update_in_backward": early}
        model, optimizer = sharded(case, stage, **kwargs)
        expected = sharded_steps(model, optimizer, case, 4)
        truth = optimizer.full_state_dict()
        optimizer.close()

        model, optimizer = sharded(case, stage, offload=Offload(folder=folder), **kwargs)
        found = sharded_steps(model, optimizer, case, 2)
        before = live_bytes()
        held = sum_of(optimizer)
        optimizer.offload_states(device="nvme")
        assert before - live_bytes() == held
        optimizer.reload_states()
        assert live_bytes() == before
        found += sharded_steps(model, optimizer, case, 1, first=2)
        for kind in KINDS:
            optimizer.offload_states([kind], device="nvme", folder=folder)
            optimizer.reload_states()
        optimizer.reload_states()  # nothing is parked: nothing happens
        found += sharded_steps(model, optimizer, case, 1, first=3)
        assert found == expected
        whole = optimizer.full_state_dict()
        assert all(torch.equal(whole[name], truth[name]) for name in truth)
        optimizer.close()


def sum_of(optimizer: ds_zero.ZeroOptimizer) -> int:
    memory = optimizer.memory()
    return sum(memory.values()) - memory["padding"]


def test_gradients_between_micro_batches_come_back(tmp_path, stage: int):
    run_ranks(2, park_gradients, stage, str(tmp_path))


def park_gradients(stage: int, folder: str) -> None:
    case, found = CASES["stack"], []
    for parks in (False, True):
        model, optimizer = sharded(case, stage)
        for micro in range(3):
            case.loss(model, case.inputs(dist.get_rank(), micro), 0, 0).backward()
            if parks:
                optimizer.offload_states(["lp_grads"], "nvme", folder=folder)
                with pytest.raises(ds_zero.ShardError, match=r"grad_norm: .*lp_grads.* are parked"):
                    optimizer.grad_norm()
                optimizer.reload_states()
        norm = optimizer.grad_norm()
        optimizer.step()
        found.append((norm, optimizer.full_state_dict()))
        optimizer.close()
    (norm, truth), (other, whole) = found
    assert torch.equal(norm, other)
    assert all(torch.equal(whole[name], truth[name]) for name in truth)


def test_the_model_works_on_while_the_rest_is_parked(tmp_path, stage: int):
    run_ranks(2, use_meanwhile, stage, str(tmp_path))


def use_meanwhile(stage: int, folder: str) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 1)
    with torch.no_grad():
        expected = model(vectors(0, 0))
    optimizer.offload_states(REST, "nvme", folder=folder)
    with torch.no_grad():
        assert torch.equal(model(vectors(0, 0)), expected)
    for name, call in (
        ("backward", lambda: model(vectors(0, 0)).sum().backward()),
        ("update", lambda: optimizer.step()),
        ("state_dict", lambda: optimizer.state_dict()),
        ("full_optimizer_state", lambda: optimizer.full_optimizer_state("exit.bias", "exp_avg")),
        ("zero_grad", lambda: optimizer.zero_grad()),
        ("offload_states", lambda: optimizer.offload_states(device="nvme", folder=folder)),
    ):
        with pytest.raises(ds_zero.ShardError, match=rf"{name}: .* parked by offload_states"):
            call()
    optimizer.reload_states()
    optimizer.offload_states("lp_params", "nvme", folder=folder)
    for name, call in (
        ("forward", lambda: model(vectors(0, 0))),
        ("full_state_dict", lambda: optimizer.full_state_dict()),
        ("update", lambda: optimizer.step()),
        ("", lambda: model.exit.bias + 1),
    ):
        with pytest.raises(ds_zero.ShardError, match=name):
            call()
    optimizer.reload_states()
    with torch.no_grad():
        assert torch.equal(model(vectors(0, 0)), expected)
    assert not any(type(p) is not nn.Parameter for p in model.parameters()) or stage == 3
    sharded_steps(model, optimizer, case, 1, first=1)
    optimizer.offload_states(device="nvme", folder=folder)
    optimizer.close()  # the model is whole again
    assert torch.isfinite(model(vectors(0, 0))).all()


def test_beside_a_device_state_goes_to_the_host(stage: int):
    run_ranks(2, park_on_host, stage)


def park_on_host(stage: int) -> None:
    """The CPU's memory plays both parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(homes, "is_host", lambda device: False)
        case = CASES["untied"]
        model, optimizer = sharded(case, stage, precision=BF16)
        expected = sharded_steps(model, optimizer, case, 2)
        optimizer.close()
        model, optimizer = sharded(case, stage, precision=BF16)
        found = sharded_steps(model, optimizer, case, 1)
        for non_blocking in (False, True):
            optimizer.offload_states(non_blocking=non_blocking, pin_memory=False)
            assert all(unit.shard.untyped_storage().size() == 0 for unit in optimizer.units)
            optimizer.reload_states(non_blocking=non_blocking)
        assert found + sharded_steps(model, optimizer, case, 1, first=1) == expected
        optimizer.close()


def test_on_a_cpu_the_host_is_no_other_memory_and_a_warning_says_so():
    (text,) = run_ranks(1, park_on_a_cpu)
    assert 'device="cpu" moves nothing' in text


def park_on_a_cpu() -> str:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("ds_zero.parking")
    logger.addHandler(handler)
    model, optimizer = sharded(CASES["stack"], 2)
    optimizer.offload_states()
    logger.removeHandler(handler)
    sharded_steps(model, optimizer, CASES["stack"], 1)
    return "\n".join(records)


def test_if_one_rank_has_no_room_nothing_moves_on_any(tmp_path):
    run_ranks(2, park_without_room, str(tmp_path))


def park_without_room(folder: str) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, 2)
    sharded_steps(model, optimizer, case, 1)
    place = "/dev/null/none" if dist.get_rank() == 1 else folder
    with pytest.raises(ds_zero.ShardError, match=r"nothing was moved, on any rank: .*/dev/null"):
        optimizer.offload_states(device="nvme", folder=place)
    sharded_steps(model, optimizer, case, 1, first=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ["optim_state"]}, "include: got 'optim_state', expected some of optim_states"),
        ({"device": "disk"}, "device: got 'disk', expected one of 'device', 'cpu', 'nvme'"),
        ({"device": "nvme"}, 'device="nvme" needs a folder'),
    ],
)
def test_what_cannot_be_parked_is_refused(arguments: dict, message: str):
    run_ranks(1, refused, arguments, message)


def refused(arguments: dict, message: str) -> None:
    _, optimizer = sharded(CASES["stack"], 1)
    with pytest.raises(ds_zero.ShardError, match=message):
        optimizer.offload_states(**arguments)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_the_engine_parks_too(tmp_path, zero_stage: int):
    run_ranks(2, engine_parks, zero_stage, str(tmp_path))


def engine_parks(stage: int, folder: str) -> None:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    engine = ds_core.initialize(Stack(), config)

    def step() -> float:
        loss = engine(vectors(0, 0)).square().mean()
        engine.backward(loss)
        engine.step()
        return loss.item()

    step()
    if stage == 0:
        with pytest.raises(ds_core.DsError, match="parks nothing"):
            engine.offload_states()
        engine.close()
        return
    engine.offload_states(include=["optim_states", "lp_params"], device="nvme", folder=folder)
    with pytest.raises(ds_zero.ShardError, match="parked by offload_states"):
        step()
    engine.reload_states()
    assert step() < 10
    engine.close()
