"""Offload by the config, with the optimizers of ds-ops, through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import ConfigError
from ds_core.testing import run_ranks
from ds_zero.offload import homes

#: What is updated element by element, whose bits do not depend on where that happens.
OPTIMIZERS = ("CPUAdam", "FusedAdam", "FusedLion", "CPUAdagrad", "FusedSGD", "Muon", "SGD")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 61)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits = self.head(x[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def config(stage: int, tier: str, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage, "sub_group_size": 1000}
    if tier != "none":
        section["offload_optimizer"] = {"device": tier, "nvme_path": str(folder)}
        if stage == 3:
            where = {"device": tier, "nvme_path": str(folder), "max_in_cpu": 0}
            section["offload_param"] = where
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": name, "params": {"lr": 0.01}},
        "zero_optimization": section,
        "gradient_clipping": 0.0,
        "progress": False,
        **changes,
    }


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    rank = comm.Mesh.world().group("dp").rank
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        batches = [torch.randint(61, (2, 9), generator=generator) for _ in range(2)]
        losses.append(float(engine.train_batch(iter(batches))))
    return losses


def losses_of(settings: dict[str, Any], host: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    with mock.patch.object(homes, "is_host", return_value=not host):
        engine = ds_core.initialize(Net(), settings)
        losses = train(engine, 4)
        state = engine.sharding.full_state_dict()
        engine.close()
    return losses, state


def compare(settings: dict[str, Any], plain: dict[str, Any], host: bool) -> None:
    found, expected = losses_of(settings, host), losses_of(plain, False)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_every_optimizer_has_the_bits_of_training_in_place(name: str, tier: str, tmp_path: Path):
    for stage in (2, 3):
        settings = [config(stage, where, tmp_path, name) for where in (tier, "none")]
        run_ranks(2, compare, *settings, False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_low_precision_and_clipping(dtype: str, stage: int, tmp_path: Path):
    more = {dtype: {"enabled": True}, "gradient_clipping": 0.1}
    settings = [config(stage, where, tmp_path, "CPUAdam", **more) for where in ("nvme", "none")]
    run_ranks(2, compare, *settings, True)


def test_adam8bit_trains_on_disk(tmp_path: Path):
    run_ranks(2, train_8bit, config(3, "nvme", tmp_path, "Adam8bit"))


def train_8bit(settings: dict[str, Any]) -> None:
    """Its random rounding depends on where pieces begin, so the bits may differ: it learns."""
    torch.manual_seed(0)
    engine = ds_core.initialize(Net(), settings)
    losses = [train(engine, 1)[0] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    engine.close()


def test_updates_in_backward_have_the_same_bits(tmp_path: Path):
    early = config(2, "nvme", tmp_path, "CPUAdam")
    early["zero_optimization"]["update_in_backward"] = True
    # Both average the gradients of all micro-batches once.
    run_ranks(2, compare, early, config(1, "none", tmp_path, "CPUAdam"), False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping: gradients cannot be scaled"),
        ({"fp16": {"enabled": True}}, "fp16: gradients cannot be scaled"),
    ],
)
def test_what_updates_in_backward_exclude(change: dict[str, Any], message: str, tmp_path: Path):
    settings = config(2, "none", tmp_path, "CPUAdam", **change)
    settings["zero_optimization"]["update_in_backward"] = True
    run_ranks(1, refuse, settings, message)


def refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ds_core.initialize(Net(), settings)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_on_disk_resumes_anywhere(asynchronous: bool, tmp_path: Path):
    run_ranks(2, save, config(3, "nvme", tmp_path, "CPUAdam"), tmp_path / "saved", asynchronous)
    for stage, tier in ((3, "nvme"), (1, "nvme"), (2, "cpu")):
        found, expected = (
            run_ranks(2, resume, config(stage, where, tmp_path, "CPUAdam"), tmp_path / "saved")
            for where in (tier, "none")
        )
        assert found == expected


def save(settings: dict[str, Any], folder: Path, asynchronous: bool) -> None:
    torch.manual_seed(0)
    engine = ds_core.initialize(Net(), settings)
    train(engine, 2)
    engine.save_checkpoint(str(folder), asynchronous=asynchronous)
    train(engine, 1, first=2)  # what is saved is of before
    engine.close()


def resume(settings: dict[str, Any], folder: Path) -> list[float]:
    torch.manual_seed(1)
    engine = ds_core.initialize(Net(), settings)
    engine.load_checkpoint(str(folder))
    losses = train(engine, 2, first=2)
    engine.close()
    return losses
