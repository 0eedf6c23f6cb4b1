"""Checkpoints of others under ZeRO: what DeepSpeed saved at one stage goes on at any of ours."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ds_core
from ds_core.checkpoint import export_dcp, full_state_dict, import_checkpoint
from ds_core.testing import run_ranks

DATA = Path(__file__).parent.parent / "packages" / "ds-core" / "tests" / "data" / "deepspeed"
TRAINED = ["embed.weight", "gain", "hidden.bias", "hidden.weight", "out.weight"]


class Tiny(nn.Module):
    """The model of scripts/make_deepspeed_checkpoints.py."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.hidden = nn.Linear(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(5.0))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.frozen(self.embed(ids)) + self.offset.to(self.gain.dtype)
        x = self.out(torch.tanh(self.hidden(x))) * self.gain
        return nn.functional.cross_entropy(self.head(x).float(), ids)


def engine_at(stage):
    torch.manual_seed(9)
    model = Tiny()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]}]
    groups.append({"params": [p for p in trained if p.dim() <= 1]})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "progress": False,
    }
    return ds_core.initialize(model, config, optimizer=torch.optim.AdamW(groups, lr=9.0))


def one_more_step(folder, stage):
    engine = engine_at(stage)
    engine.load_checkpoint(f"{folder}/ours")
    rank = engine.mesh.group("dp").rank
    engine.backward(engine((torch.arange(4) * 3 + 3 * 2 + rank) % 7))
    engine.step()
    engine.save_checkpoint(f"{folder}/stage{stage}")


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_training_goes_on_at_every_stage(tmp_path, stage):
    with tarfile.open(DATA / "stage1-fp32-w2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = load_file(tmp_path / "stage1-fp32-w2" / "expected.safetensors")
    import_checkpoint(tmp_path / "stage1-fp32-w2", tmp_path / "ours", model=Tiny())

    run_ranks(2, one_more_step, str(tmp_path), stage)

    weights = full_state_dict(tmp_path / f"stage{stage}")
    for name in TRAINED:
        torch.testing.assert_close(weights[name], expected[f"next.{name}"], rtol=0, atol=1e-6)
    # What was saved under ZeRO by two ranks is whole for others, and comes back.
    export_dcp(tmp_path / f"stage{stage}", tmp_path / "dcp", optimizer=True)
    again = import_checkpoint(tmp_path / "dcp", tmp_path / "again", aliases=weights.aliases)
    for name, value in full_state_dict(again.path).items():
        assert torch.equal(value, weights[name]), name
