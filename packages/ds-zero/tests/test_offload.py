"""Shards that live elsewhere: on disk, and in a host memory that is not the device's.

A CPU's memory is the host's, so what crosses between them is made to: `elsewhere` gives the host
side tensors of its own, and copies move what an accelerator's would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from offload_loops import assert_same_bits, everything
from torch import nn
from zero_loops import adamw, compare, sharded, sharded_steps
from zero_models import CASES, COMPARED

import ds_zero
from ds_core import tensor_files
from ds_core.optim import Muon
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_zero.offload import homes
from ds_zero.offload.buffers import BufferPool
from ds_zero.offload.swap import Swap

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)
SGD = ("momentum_buffer",)


@contextmanager
def elsewhere(host: bool) -> Iterator[None]:
    """Whether "cpu" is another memory than the device's, inside the block."""
    with mock.patch.object(homes, "is_host", return_value=False) if host else mock.MagicMock():
        yield


def offload(tier: str, stage: int, folder: Path, **options: Any) -> ds_zero.Offload:
    """States, and at stage 3 parameters too, in one tier; in small pieces."""
    options.setdefault("piece_numel", 100)
    return ds_zero.Offload(
        optimizer=tier,  # type: ignore[arg-type]
        parameters=tier if stage == 3 else "device",  # type: ignore[arg-type]
        folder=str(folder),
        **options,
    )


def compared(name: str, stage: int, tier: str, folder: Path, *, host: bool, **options: Any) -> None:
    """In a rank: offloaded training equals one process in fp64."""
    with elsewhere(host):
        compare(name, stage, offload=offload(tier, stage, folder), **options)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARED)
def test_all_on_disk_equals_one_process(name: str, tmp_path: Path):
    run_ranks(2, compared, name, 3, "nvme", tmp_path, host=False, timeout_s=30)


@pytest.mark.parametrize("name", ["tied", "unused", "branches", "groups", "frozen"])
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_every_stage_equals_one_process(name: str, tier: str, stage: int, tmp_path: Path):
    run_ranks(2, compared, name, stage, tier, tmp_path, host=True, timeout_s=30)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_any_world_size(tier: str, world_size: int, stage: int, tmp_path: Path):
    run_ranks(world_size, compared, "odd-sizes", stage, tier, tmp_path, host=True, timeout_s=30)


@pytest.mark.parametrize("no_sync", [False, True], ids=["reduce-each", "no-sync"])
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_accumulation_and_clipping(tier: str, no_sync: bool, stage: int, tmp_path: Path):
    run_ranks(
        2,
        compared,
        "lora",
        stage,
        tier,
        tmp_path,
        host=True,
        accumulate=3,
        steps=3,
        no_sync=no_sync,
        max_norm=0.05,
        tolerance=1e-6,
    )


def bits(
    stage: int, tier: str, folder: Path, precision: Precision | None, early: bool, host: bool
) -> None:
    """In a rank: offloaded training has the bits of training in place."""
    case = CASES["tied"]
    found = []
    for off in (None, offload(tier, stage, folder)):
        with elsewhere(host and off is not None):
            model, optimizer = sharded(
                case,
                stage,
                offload=off,
                precision=precision,
                update_in_backward=early and off is not None,
            )
            losses = sharded_steps(model, optimizer, case, 4)
            names = [name for name, _ in model.named_parameters()]
            values = [optimizer.full_parameter(name) for name in names]
            values += [optimizer.full_optimizer_state(name, "exp_avg_sq") for name in names]
            found.append((losses, values))
            optimizer.close()
            whole = [param.detach().clone() for param in model.parameters()]
            found[-1][1].extend(whole)
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("early", [False, True], ids=["step", "in-backward"])
@pytest.mark.parametrize("host", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_the_bits_of_training_in_place(
    tier: str, precision: Precision | None, host: bool, early: bool, stage: int, tmp_path: Path
):
    run_ranks(2, bits, stage, tier, tmp_path, precision, early, host)


def test_one_rank_has_the_bits_of_training_in_place(stage: int, tmp_path: Path):
    run_ranks(1, bits, stage, "nvme", tmp_path, BF16, True, True)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_part_of_the_states_leaves(ratio: float, tmp_path: Path):
    run_ranks(2, partly, ratio, tmp_path)


def partly(ratio: float, folder: Path) -> None:
    case = CASES["stack"]
    off = ds_zero.Offload(optimizer="nvme", folder=str(folder), ratio=ratio)
    _, optimizer = sharded(case, 2, offload=off)
    away = [unit.layout.numel for unit in optimizer.units if unit.states == "nvme"]
    total = sum(unit.layout.numel for unit in optimizer.units)
    assert abs(sum(away) / total - ratio) <= max(u.layout.numel for u in optimizer.units) / total
    compare("stack", 2, offload=off)


# --- What moves -----------------------------------------------------------------------------------


def test_a_step_moves_24_bytes_per_parameter(tmp_path: Path):
    run_ranks(2, count_bytes, tmp_path)


def count_bytes(folder: Path) -> None:
    """bf16 with fp32 master, Adam: 12 read, 12 written; parameters 2 per gather and 2 per step."""
    case = CASES["tied"]
    model, optimizer = sharded(
        case,
        3,
        # With more buffers, a shard may be taken from the one that it is written from.
        offload=offload("nvme", 3, folder, max_numel_in_cpu=0, buffers=3, parameter_buffers=3),
        precision=BF16,
    )
    sharded_steps(model, optimizer, case, 2)
    swap = optimizer._homes.swap
    assert swap is not None
    before, all_before = (swap.bytes_read, swap.bytes_written), optimizer.swap_bytes()
    sharded_steps(model, optimizer, case, 1, first=2)
    numel = sum(p.stop - p.start for unit in optimizer.units for p in unit.optimizer_pieces)
    moved = (swap.bytes_read - before[0], swap.bytes_written - before[1])
    assert moved == (12 * numel, 12 * numel)
    read, written = (
        after - first for after, first in zip(optimizer.swap_bytes(), all_before, strict=True)
    )
    shards = sum(unit.layout.shard_numel for unit in optimizer.units)
    assert written - moved[1] == 2 * shards
    assert (read - moved[0]) % 2 == 0
    # Gathered for forward, and for backward unless it was kept.
    assert 2 * shards <= read - moved[0] <= 4 * shards


def test_states_are_read_while_a_backward_runs(tmp_path: Path):
    run_ranks(1, count_reads_ahead, tmp_path)


def count_reads_ahead(folder: Path) -> None:
    """As many records as there are buffers; none of a backward that no step follows."""
    case = CASES["stack"]
    model, optimizer = sharded(case, 2, offload=offload("nvme", 2, folder, buffers=3))
    sharded_steps(model, optimizer, case, 2)
    swap = optimizer._homes.swap
    assert swap is not None
    records = [sum(field.nbytes for field in record.fields) for record in swap._records.values()]
    assert len(records) > 3
    optimizer.settle()  # or writes of the last step may hold the buffers still
    before = swap.bytes_read
    with optimizer.no_sync():
        case.loss(model, case.inputs(0, 2), 0, 2).backward()
    assert swap.bytes_read == before
    case.loss(model, case.inputs(0, 2), 0, 2).backward()
    assert swap.bytes_read - before == sum(records[:3])
    optimizer.step()
    assert swap.bytes_read - before == sum(records)


def test_nothing_is_left_in_the_folder(tmp_path: Path):
    run_ranks(1, train_and_leave, tmp_path, tmp_path / "new" / "folder")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def train_and_leave(root: Path, folder: Path) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, 3, offload=offload("nvme", 3, folder))
    sharded_steps(model, optimizer, case, 1)
    assert [p for p in root.rglob("*") if p.is_file()] == []
    assert sum(optimizer.swap_bytes()) > 0


def test_buffers_are_bounded(tmp_path: Path):
    run_ranks(1, count_buffers, tmp_path)


def count_buffers(folder: Path) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, 2, offload=offload("nvme", 2, folder, buffers=2))
    sharded_steps(model, optimizer, case, 2)
    swap = optimizer._homes.swap
    assert swap is not None
    largest = max(record.size for record in swap._records.values())
    assert len(swap._records) > 4
    assert swap.pool.nbytes <= 2 * largest


# --- Access ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_reading_and_writing(tier: str, host: bool, stage: int, tmp_path: Path):
    run_ranks(2, read_and_write, stage, tier, tmp_path, host)


def read_and_write(stage: int, tier: str, folder: Path, host: bool) -> None:
    case, name = CASES["stack"], "blocks.0.inner.weight"
    with elsewhere(host):
        model, optimizer = sharded(
            case, stage, offload=offload(tier, stage, folder, max_numel_in_cpu=0)
        )
        name = next(name for name, p in model.named_parameters() if p.dim() == 2)
        shape = optimizer.full_parameter(name).shape
        sharded_steps(model, optimizer, case, 1)
        value = torch.arange(shape.numel(), dtype=torch.get_default_dtype()).view(shape)
        for kind in ("exp_avg", "exp_avg_sq"):
            optimizer.set_full_optimizer_state(name, kind, value)
            assert torch.equal(optimizer.full_optimizer_state(name, kind), value)
        optimizer.set_full_parameter(name, value / 100)
        assert torch.equal(optimizer.full_parameter(name), value / 100)
        param = dict(model.named_parameters())[name]
        with ds_zero.GatheredParameters(param, modifier_rank=0):
            assert torch.equal(param, value / 100)
            param.data.mul_(2)
        assert torch.equal(optimizer.full_parameter(name), value / 50)
        assert torch.equal(optimizer.full_state_dict()[name], value / 50)
        part = optimizer.local_value(name, "parameter")
        assert set(part.tolist()) <= set((value / 50).flatten().tolist())
        sharded_steps(model, optimizer, case, 1, first=1)


# --- Updates in backward --------------------------------------------------------------------------


#: Where no rank may use a parameter, which then is stepped with a gradient of zero; two backwards.
_NOT_IN_BACKWARD = {"unused", "two-losses", "early-exits", "inner-asymmetric", "inner-branches"}


@pytest.mark.parametrize(
    "name",
    sorted(name for name in set(COMPARED) - _NOT_IN_BACKWARD if not name.startswith("branches")),
)
def test_updates_in_backward_equal_one_process(name: str, stage: int):
    run_ranks(2, compare, name, stage, update_in_backward=True, timeout_s=30)


@pytest.mark.parametrize("name", ["unused", "branches", "tied"])
def test_updates_in_backward_on_one_rank(name: str, stage: int):
    run_ranks(1, compare, name, stage, update_in_backward=True, timeout_s=30)


def test_updates_in_backward_accumulate_under_no_sync(stage: int):
    run_ranks(
        2, compare, "tied", stage, update_in_backward=True, accumulate=3, steps=3, no_sync=True
    )


def test_gradients_have_no_memory_between_backwards(stage: int):
    run_ranks(2, early_memory, stage)
    run_ranks(1, early_memory, stage)


def early_memory(stage: int) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, stage, update_in_backward=True)
    sharded_steps(model, optimizer, case, 1)
    assert optimizer.memory()["gradients"] == 0
    for unit in optimizer.units:
        assert unit.grad.untyped_storage().size() == 0
        assert unit.twin.flat.untyped_storage().size() == 0


@pytest.mark.parametrize("what", ["second", "clip", "muon", "nan"])
def test_what_updates_in_backward_cannot_do(what: str):
    run_ranks(1, refuse_early, what)


def refuse_early(what: str) -> None:
    case = CASES["stack"]
    if what == "clip":
        with pytest.raises(ds_zero.ShardError, match="max_grad_norm=1"):
            sharded(case, 2, update_in_backward=True, max_grad_norm=1.0)
        return
    if what == "muon":
        model = case.build()
        with pytest.raises(ds_zero.ShardError, match="Muon puts matrices together"):
            ds_zero.shard(model, Muon(model.named_parameters()), 2, update_in_backward=True)
        return
    model, optimizer = sharded(case, 2, update_in_backward=True)
    if what == "nan":
        before = optimizer.full_state_dict()
        (case.loss(model, case.inputs(0, 0), 0, 0) * float("nan")).backward()
        assert torch.isnan(optimizer.grad_norm())
        with pytest.raises(ds_zero.ShardError, match="norm is nan; no unit was updated"):
            optimizer.step()
        after = optimizer.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return
    case.loss(model, case.inputs(0, 0), 0, 0).backward()
    with pytest.raises(ds_zero.ShardError, match="another gradient after it was updated"):
        case.loss(model, case.inputs(0, 1), 0, 1).backward()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "disk"}, "optimizer: got 'disk', expected one of 'device', 'cpu', 'nvme'"),
        ({"optimizer": "nvme"}, '"nvme" needs a folder'),
        ({"parameters": "nvme"}, '"nvme" needs a folder'),
        ({"optimizer": "cpu", "ratio": 1.5}, "ratio: got 1.5, expected 0 to 1"),
        ({"ratio": 0.5}, "nothing of the optimizer leaves the device"),
        ({"buffers": 1}, "buffers: got 1, expected at least 2"),
        ({"piece_numel": 0}, "piece_numel: got 0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str):
    with pytest.raises(ds_zero.ShardError, match=message):
        ds_zero.Offload(**options)


def test_parameters_leave_at_stage_3_only():
    model = nn.Linear(2, 2)
    with pytest.raises(ds_zero.ShardError, match="at stage 2, where every rank computes with all"):
        ds_zero.shard(
            model, adamw(model.parameters()), 2, offload=ds_zero.Offload(parameters="cpu")
        )


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("not a folder")
    run_ranks(1, refuse_folder, path)


def refuse_folder(path: Path) -> None:
    with pytest.raises(ds_zero.ShardError, match=r"offload: folder .*file.*nvme_path"):
        sharded(CASES["stack"], 2, offload=offload("nvme", 2, path))
    assert os.path.isfile(path)


def damped(params: Any) -> torch.optim.Optimizer:
    """Its first step differs from all others."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1)


@pytest.mark.parametrize("optimizer", [adamw, damped], ids=["adamw", "dampening"])
@pytest.mark.parametrize("name", ["unused", "inner-branches"])
def test_what_never_stepped_is_not_saved_and_steps_for_the_first_time(
    name: str, optimizer: Any, stage: int, tmp_path: Path
):
    run_ranks(2, begin_at_different_steps, name, stage, optimizer, tmp_path)


def begin_at_different_steps(name: str, stage: int, make: Any, folder: Path) -> None:
    """In a rank: what a checkpoint has, after every step, is what it has without offload."""
    left = []
    for off in (None, offload("nvme", stage, folder)):
        model, optimizer = sharded(CASES[name], stage, make, offload=off)
        left.append([everything(optimizer)])
        for step in range(4):
            sharded_steps(model, optimizer, CASES[name], 1, first=step)
            left[-1].append(everything(optimizer))
        optimizer.close()
    for step, (found, expected) in enumerate(zip(left[1], left[0], strict=True)):
        assert_same_bits(found, expected, f"after {step} steps")


def test_a_state_that_was_set_is_kept(stage: int, tmp_path: Path):
    run_ranks(1, set_before_the_first_step, stage, tmp_path)


def set_before_the_first_step(stage: int, folder: Path) -> None:
    case, name = CASES["unused"], "blocks.2.up.weight"
    for off in (None, offload("nvme", stage, folder)):
        model, optimizer = sharded(case, stage, offload=off)
        sharded_steps(model, optimizer, case, 1)
        spec = next(each for unit in optimizer.units for each in unit.specs if each.name == name)
        value = torch.randn(spec.param.shape, generator=torch.Generator().manual_seed(7))
        assert name not in optimizer.state_dict()["state"]["exp_avg"]
        optimizer.set_full_optimizer_state(name, "exp_avg", value)
        assert torch.equal(optimizer.full_optimizer_state(name, "exp_avg"), value)
        assert name in optimizer.state_dict()["state"]["exp_avg"]
        optimizer.close()


def test_a_record_that_grows_leaves_its_place_to_others(tmp_path: Path):
    files = tensor_files.ThreadedFiles()
    pool = BufferPool(files, 2)
    swap = Swap(files.open(str(tmp_path / "swap")), pool)
    growing, other = torch.ones(1000), torch.zeros(1000)
    held = {"a": growing}
    swap.adopt(growing, lambda: held)
    swap.bring(growing)
    held["b"] = torch.full((4000,), 2.0)
    swap.put_back(growing)
    swap.settle()
    size = (tmp_path / "swap").stat().st_size
    swap.adopt(other, lambda: {"a": other})
    swap.settle()
    assert (tmp_path / "swap").stat().st_size == size, "where the first one was"
    with swap.present(growing, edits=False), swap.present(other, edits=False):
        assert bool((growing == 1).all())
        assert bool((held["b"] == 2).all())
        assert bool((other == 0).all())
    swap.close()
    files.close()
