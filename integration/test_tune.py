"""`ds tune` end to end: real trials of a real model, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ds_core.config import load

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])

    def forward(self, x, y):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x, y)

def example(micro_batch_size):
    return Net(), (torch.zeros(micro_batch_size, 24), torch.ones(micro_batch_size, 24))
"""
CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "autotuning": {
        "start_profile_step": 1,
        "end_profile_step": 3,
        "num_tuning_micro_batch_sizes": 9,
    },
}


@pytest.fixture
def tune(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    (tmp_path / "net.py").write_text(MODEL)

    def run(*words):
        command = [sys.executable, "-m", "ds_core.cli", "tune", "net.py:example", "ds.json", *words]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_search_runs_trials_and_writes_a_config_that_trains(tune, tmp_path):
    told = tune("--nproc", "2", "--set", "zero_optimization.stage=0,2", "--max-runs", "2", "--json")
    assert len(told["runs"]) == 2
    assert all(row["samples_per_second"] > 0 for row in told["runs"])
    best = json.loads((tmp_path / told["config"]).read_text())
    assert best == told["best"]
    micro, steps = best["train_micro_batch_size_per_gpu"], best["gradient_accumulation_steps"]
    assert micro * steps * 2 == best["train_batch_size"] == 8
    assert "autotuning" not in best
    assert load(tmp_path / told["config"], world_size=2).train_batch_size == 8
