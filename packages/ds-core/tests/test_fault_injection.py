"""Faults that wait for their moment: they strike there, on their rank alone."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ds_core
from ds_core import checkpoint
from ds_core.errors import CheckpointError
from ds_core.testing import Died, Fault, FaultInjector, Raised, run_ranks
from ds_core.testing.faults import DAMAGES, KINDS, Strike, draw, fill_disk, small_disk

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "comm": {"timeout_s": 4},
    "progress": False,
}


def train(
    fault: Fault | None, folder: str, fills_disk: bool = False, asynchronous: bool = False
) -> int:
    """Load, then four steps, each with a save; returns how many were done."""
    rank = dist.get_rank()
    injector = FaultInjector(
        fault, rank=rank, record=Path(folder, "strike.json"), fills_disk=fills_disk
    )
    torch.manual_seed(1)
    x = torch.randn(16, 4)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    config = {**CONFIG, "checkpoint": {"asynchronous": asynchronous}}
    engine = ds_core.initialize(model, config, training_data=data, observers=(injector,))
    checkpoints = Path(folder, "checkpoints")
    if (checkpoints / "latest").exists():
        engine.load_checkpoint(checkpoints)
    batches = engine.dataloader.forever()
    while engine.global_step < 4:
        inputs, targets = next(batches)
        engine.backward((engine(inputs) - targets).square().mean())
        engine.step()
        engine.save_checkpoint(checkpoints)
    engine.close()
    return engine.global_step


def begun(folder: Path) -> None:
    """A first step and its checkpoint."""
    assert run_ranks(2, train, None, str(folder)) == [4, 4]


@pytest.mark.parametrize("point", ["forward", "backward", "step", "save"])
def test_a_kill_strikes_in_its_part_of_training(tmp_path, point):
    fault = Fault("kill", point, rank=1, step=3, nth=10**9)  # at its end: there are fewer calls

    outcomes = run_ranks(2, train, fault, str(tmp_path), deaths={1: signal.SIGKILL})

    assert outcomes[1] == Died(signal.SIGKILL)
    assert isinstance(outcomes[0], Raised)
    assert "rank 1 stopped answering" in outcomes[0].message
    assert Strike.read(tmp_path / "strike.json") is not None
    done = {"save": "step3"}.get(point, "step2")
    assert checkpoint.latest(tmp_path / "checkpoints") == done
    checkpoint.verify(tmp_path / "checkpoints")


@pytest.mark.parametrize("point", ["load", "save"])
def test_a_checkpoint_that_loses_a_rank_names_it(tmp_path, point):
    if point == "load":
        begun(tmp_path)
    fault = Fault("kill", point, rank=1, step=2, nth=100)  # past the exchange before it

    outcomes = run_ranks(2, train, fault, str(tmp_path), deaths={1: signal.SIGKILL})

    assert outcomes[0].type == "ds_core.errors.CheckpointError"
    assert "rank 1 stopped answering" in outcomes[0].message
    assert Strike.read(tmp_path / "strike.json").where


def test_a_stuck_loader_is_told_of_by_the_others(tmp_path):
    fault = Fault("stuck loader", "load", rank=1, step=2)

    with pytest.raises(ds_core.testing.RankFailure) as caught:
        run_ranks(2, train, fault, str(tmp_path))

    told = str(caught.value)
    assert "rank 1 stopped answering: it waits for its data loader" in told
    assert "no batch of TensorDataset for more than 3 s and is in injector.py" in told


def test_a_rank_that_is_stopped_in_its_writing_thread_is_named(tmp_path):
    fault = Fault("stopped writer", "save", rank=1, step=3, nth=150)

    with pytest.raises(ds_core.testing.RankFailure, match="rank 1 stopped answering"):
        run_ranks(2, train, fault, str(tmp_path), asynchronous=True)

    strike = Strike.read(tmp_path / "strike.json")
    assert strike is not None
    assert checkpoint.latest(tmp_path / "checkpoints") == "step2"
    checkpoint.verify(tmp_path / "checkpoints")


def test_a_full_disk_fails_the_save_on_all_ranks_and_the_one_before_loads(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    fault = Fault("full disk", "save", rank=1, step=3, fraction=0.5)

    with small_disk(tmp_path / "checkpoints", 2**20) as is_mounted:
        with pytest.raises(ds_core.testing.RankFailure) as caught:
            run_ranks(2, train, fault, str(tmp_path), is_mounted)
        assert checkpoint.newest_intact(tmp_path / "checkpoints") == "step2"

    assert ("No space left on device" if is_mounted else "File too large") in str(caught.value)


def test_without_a_fault_nothing_happens(tmp_path):
    assert run_ranks(2, train, None, str(tmp_path)) == [4, 4]
    assert not (tmp_path / "strike.json").exists()


# --- Drawing faults, damaging files ---------------------------------------------------------------


def test_a_seed_draws_the_same_faults_of_every_kind():
    once, twice = (
        [draw(random.Random(seed), num_ranks=4, steps=range(2, 5)) for seed in range(200)]
        for _ in range(2)
    )

    assert once == twice
    assert {(fault.kind, fault.point) for fault in once} == {
        (kind, point) for kind, points in KINDS.items() for point in points
    }
    assert all(0 <= fault.rank < 4 and fault.step in (2, 3, 4) for fault in once)
    assert [Fault.from_json(fault.to_json()) for fault in once] == once


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_intact_checkpoint_is_the_one_before_a_damaged_one(tmp_path, kind, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, f"step{step}", {"model": {"weight": torch.ones(9) * step}})

    damaged = Fault(kind, "file", nth=1, fraction=0.9).damage(tmp_path / "step2")

    assert damaged.name == "rank_00000.safetensors"
    assert checkpoint.newest_intact(tmp_path) == "step1"
    assert "checkpoint 'step2' is passed over" in caplog.text
    assert damaged.name in caplog.text


def test_without_an_intact_checkpoint_every_problem_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="it holds no complete checkpoint"):
        checkpoint.newest_intact(tmp_path)
    for step in (1, 2):
        checkpoint.save(tmp_path, f"step{step}", {"model": {"weight": torch.ones(9)}})
        Fault("missing", "file", nth=1).damage(tmp_path / f"step{step}")

    with pytest.raises(CheckpointError, match=r"(?s)can be gone on from: .*step2.*step1"):
        checkpoint.newest_intact(tmp_path)


def test_a_checkpoint_that_lost_its_index_is_saved_anew(tmp_path):
    state = {"model": {"weight": torch.ones(9)}}
    checkpoint.save(tmp_path, "step1", state)
    (tmp_path / "step1" / "index.json").unlink()

    checkpoint.save(tmp_path, "step1", state)

    assert checkpoint.newest_intact(tmp_path) == "step1"


def test_a_fault_that_befalls_no_file_damages_none(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(ValueError, match="kind 'kill' does not befall files"):
        Fault("kill", "step").damage(tmp_path)


def test_a_small_disk_is_full_after_its_bytes(tmp_path):
    with small_disk(tmp_path, 2**20) as is_mounted:
        if not is_mounted:
            pytest.skip("this process may not mount a file system")
        filler = fill_disk(tmp_path, 8192)
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "data").write_bytes(bytes(3 * 8192))
        filler.unlink()
        (tmp_path / "data").write_bytes(bytes(3 * 8192))

    assert not (tmp_path / "data").exists()
