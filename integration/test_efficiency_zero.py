"""Layers that see fewer tokens, or are left out, at every ZeRO stage and under recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_core
from ds_core.testing import run_ranks

LTD = {
    "data_efficiency": {
        "enabled": True,
        "data_routing": {
            "enabled": True,
            "random_ltd": {
                "enabled": True, "total_layer_num": 4, "random_ltd_layer_id": [1, 2],
                "random_ltd_schedule": {
                    "min_value": 4, "max_value": 12,
                    "schedule_config": {"require_steps": 5, "seq_per_step": 2},
                },
            },
        },
    }
}  # fmt: skip
DROPS = {"progressive_layer_drop": {"enabled": True, "theta": 0.4, "gamma": 1.0}}
SHORT = {
    "curriculum_learning": {
        "enabled": True, "min_difficulty": 4, "max_difficulty": 12, "schedule_type": "fixed_root",
        "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 4, "root_degree": 2},
    }
}  # fmt: skip
FEATURES = {"random-ltd": LTD, "layer-drop": DROPS, "seqlen": SHORT}


#: A block is more than 2^18 parameters, so each is a unit that is gathered by itself.
WIDTH = 260


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner, self.out = (
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.out(torch.tanh(self.inner(self.norm(x))))


class Net(nn.Module):
    def __init__(self, recomputes, width=WIDTH):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head, self.recomputes = nn.Linear(width, 32), recomputes

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        logits = self.head(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train(stage, features, recomputes, steps=6):
    torch.manual_seed(0)
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        # Plain SGD: a block that is left out has a gradient of zero, or none, which is the same.
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "seed": 3,
        **features,
    }
    engine = ds_core.initialize(Net(recomputes), document)
    torch.manual_seed(100 + dist.get_rank())
    data = iter([torch.randint(0, 32, (2, 12)) for _ in range(2 * steps)])
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    state = engine.state_dict()
    engine.close()
    assert all(type(block) is Block for block in engine.module.blocks)
    return losses, state


def at_stages(stages, features, recomputes):
    expected, expected_state = train(0, features, False)
    for stage in stages:
        losses, state = train(stage, features, recomputes)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert sorted(state) == sorted(expected_state)
        for name, value in state.items():
            torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_full_sharding_learns_the_same_with_fewer_tokens_and_layers(features):
    run_ranks(2, at_stages, (3,), features, False)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_stages_learn_the_same_with_all_of_them_at_once(recomputes):
    features = {**LTD, **DROPS, **SHORT}
    run_ranks(2, at_stages, (1, 2, 3) if recomputes else (1, 2), features, recomputes)
