"""A run that was saved and resumed is, bit for bit, the run that was not interrupted."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import ds_core
from ds_core.testing import run_ranks

BEFORE, AFTER = 7, 20


class Samples(Dataset):
    """Shuffled anew in each epoch; what a sample is also depends on what is drawn for it."""

    def __len__(self):
        return 53  # 53 = 6 steps of 8 and a rest: the run is saved in the middle of an epoch

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 7) * (index + 1) / 53
        return x + 0.1 * random.random() + 0.1 * float(np.random.standard_normal())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = nn.Linear(7, 7)
        self.blocks = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])
        self.drop = nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = self.entry(x.to(self.entry.weight.dtype))
        for block in self.blocks:
            x = x + self.drop(torch.tanh(block(x)))
        return x.float().square().mean() * (1 + self.calls / 100)


FORMATS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # So high that steps are skipped before the save and after it, and the scale changes.
    "fp16": {
        "fp16": {
            "enabled": True,
            "initial_scale_power": 24,
            "loss_scale_window": 3,
            "hysteresis": 2,
        }
    },
}


def make(stage, changes):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5, "total_num_steps": 30},
        },
        "zero_optimization": {"stage": stage},
        "progress": False,
        **changes,
    }
    return ds_core.initialize(Net(), config, training_data=Samples())


def seed_all(seed):
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(seed + dist.get_rank())


def go_on(engine):
    """What is told of each of the next steps, and the state after them."""
    told = []
    for _ in range(AFTER):
        loss = float(engine.train_batch())
        lr = engine.sharding.param_groups[0]["lr"]
        told.append((loss, engine.grad_norm, lr, engine.scaler.scale, engine.skipped_steps))
    drawn = random.random(), float(np.random.random()), float(torch.rand(()))
    counts = engine.global_step, engine.dataloader.state_dict()
    return told, drawn, counts, engine.state_dict()


def uninterrupted(folder, stage, changes):
    seed_all(100)
    engine = make(stage, changes)
    for _ in range(BEFORE):
        engine.train_batch()
    random.gauss(0, 1)  # draws two numbers and keeps one, which is a part of the state
    np.random.standard_normal()
    engine.save_checkpoint(folder)
    result = go_on(engine), random.gauss(0, 1)
    engine.close()
    return result


def resumed(folder, stage, changes):
    seed_all(900)
    engine = make(stage, changes)
    for _ in range(2):
        engine.train_batch()  # a past of its own, which loading replaces
    engine.load_checkpoint(folder)
    result = go_on(engine), random.gauss(0, 1)
    engine.close()
    return result


@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_next_losses_are_those_of_the_uninterrupted_run(tmp_path, stage, changes):
    expected = run_ranks(2, uninterrupted, str(tmp_path), stage, changes)
    found = run_ranks(2, resumed, str(tmp_path), stage, changes)
    for rank in range(2):
        (told, drawn, counts, state), gauss = expected[rank]
        (told_again, drawn_again, counts_again, state_again), gauss_again = found[rank]
        assert repr(told_again) == repr(told)  # the norm of a skipped step is NaN
        assert len({loss for loss, *_ in told}) == AFTER  # they do differ from step to step
        assert (drawn_again, gauss_again) == (drawn, gauss)
        assert counts_again == counts
        assert counts[0] == BEFORE + AFTER
        assert counts[1]["samples_seen"] % 53 > 0
        for name, value in state.items():
            assert torch.equal(state_again[name], value), name
    if "fp16" in changes:
        scales = {scale for *_, scale, _ in told}
        skipped = [count for *_, count in told]
        assert len(scales) > 1
        assert 0 < skipped[0] < skipped[-1]
    # Each rank has its own numbers: they are not those of rank 0 on all.
    assert expected[0][0][1] != expected[1][0][1]
