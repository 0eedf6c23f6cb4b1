"""DeepSpeed, as it is installed, trains and saves; ours goes on with the losses that it has.

Run as a script, this file is what DeepSpeed's processes do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_core.testing import free_port
from ds_core.testing.original import original_deepspeed

STAGES = (1, 2, 3)
BEFORE, AFTER = 3, 5


class Net(nn.Module):
    """Odd sizes for padding, a tied head, a frozen layer, a scalar and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 9)
        self.frozen = nn.Linear(9, 9).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(9.0) / 9)
        self.head = nn.Linear(9, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.frozen(self.embed(ids)) + self.offset
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return nn.functional.cross_entropy(self.head(x * self.gain), (ids + 1) % 13)


def batch_of(step, rank):
    """`[8]` token ids, other ones for every step and rank."""
    return (torch.arange(8) * 5 + step * 2 + rank * 3) % 13


def optimizer_of(model, lr=0.02):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95))


def config_of(stage):
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.7,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def losses_of(engine, rank, first, count):
    told = []
    for step in range(first, first + count):
        loss = engine(batch_of(step, rank))
        engine.backward(loss)
        engine.step()
        told.append(float(loss))
    return told


def deepspeed_trains(folder):
    """What each of DeepSpeed's processes does: train, save, and train on."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank, told = dist.get_rank(), {}
    for stage in STAGES:
        torch.manual_seed(0)
        model = Net()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer_of(model), config=config_of(stage)
        )
        losses_of(engine, rank, 0, BEFORE)
        engine.save_checkpoint(f"{folder}/stage{stage}", tag="three")
        told[stage] = losses_of(engine, rank, BEFORE, AFTER)
        engine.destroy()
    Path(f"{folder}/losses{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Checkpoints of DeepSpeed of each stage, and the losses that it went on with, by rank."""
    if original_deepspeed() is None:
        pytest.skip(
            "DeepSpeed itself is not installed; its committed checkpoints are tested all the same"
        )
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=250)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-3000:]
    losses = [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(2)]
    return folder, losses


def go_on(folder, stage):
    import ds_core

    torch.manual_seed(7)
    model = Net()
    engine = ds_core.initialize(
        model, {**config_of(stage), "progress": False}, optimizer=optimizer_of(model, lr=9.0)
    )
    engine.load_checkpoint(folder)
    assert engine.global_step == BEFORE
    told = losses_of(engine, dist.get_rank(), BEFORE, AFTER)
    engine.close()
    return told


# The same stage, and stages and numbers of ranks crossed.
@pytest.mark.parametrize(("saved", "ours"), [(1, 1), (2, 2), (3, 3), (1, 3), (3, 0)])
def test_training_goes_on_with_deepspeeds_losses(theirs, tmp_path, saved, ours):
    from ds_core.checkpoint import import_checkpoint
    from ds_core.testing import run_ranks

    folder, losses = theirs
    names = {path.name for path in (folder / f"stage{saved}" / "three").iterdir()}
    assert any("zero_pp_rank_1_mp_rank_00_optim_states" in name for name in names)
    report = import_checkpoint(folder / f"stage{saved}", tmp_path / "ours", model=Net())
    assert (report.missing, report.unexpected) == ((), ())
    found = run_ranks(2, go_on, str(tmp_path / "ours"), ours)
    for rank in range(2):
        expected = losses[rank][str(saved)]
        assert len(expected) == AFTER
        assert found[rank] == pytest.approx(expected, rel=1e-6, abs=0)


def test_the_command_imports_it_too(theirs, tmp_path):
    folder, _ = theirs
    command = [sys.executable, "-m", "ds_core.cli", "checkpoint", "import"]
    done = subprocess.run(
        [*command, str(folder / "stage3"), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ours" / "three" / "index.json").exists()


if __name__ == "__main__":
    deepspeed_trains(sys.argv[1])
