"""Progressive layer dropping: how often, alike on all ranks, right on average, no trace left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_core
from ds_core import comm
from ds_core.efficiency import ProgressiveLayerDrop, theta_at
from ds_core.errors import ConfigError, DsError
from ds_core.testing import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
    "seed": 11,
}
DROPS = {"progressive_layer_drop": {"enabled": True, "theta": 0.4, "gamma": 2.0}}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Block(nn.Module):
    def __init__(self, returns_tuple=False):
        super().__init__()
        self.inner, self.calls, self.returns_tuple = nn.Linear(6, 6), 0, returns_tuple

    def forward(self, x):
        self.calls += 1
        found = x + torch.tanh(self.inner(x))
        return (found,) if self.returns_tuple else found


class Net(nn.Module):
    def __init__(self, depth=4, recomputes=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head, self.recomputes = nn.Linear(6, 1), recomputes

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.head(x).square().mean()


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 6, generator=generator) for _ in range(count)]


def train(steps, make=Net, seed=0, config=None, **changes):
    torch.manual_seed(0)
    engine = ds_core.initialize(make(), {**CONFIG, **(config or DROPS)}, **changes)
    losses = [float(engine.train_batch(iter([batch]))) for batch in batches(steps, seed)]
    return engine, losses


def test_theta_falls_from_one_to_its_limit():
    assert theta_at(0, 0.5, 0.01) == 1.0
    assert theta_at(100, 0.5, 0.01) == pytest.approx(0.5 * math.exp(-1) + 0.5)
    assert theta_at(10**6, 0.5, 0.01) == pytest.approx(0.5)


def test_deeper_blocks_are_dropped_more_often():
    drop = ProgressiveLayerDrop(0.4, 2.0)
    assert drop.keep_probabilities(0, 4) == [1.0] * 4
    assert drop.keep_probabilities(10**6, 4) == pytest.approx([0.85, 0.7, 0.55, 0.4])


def test_blocks_are_kept_as_often_as_they_should():
    engine, _ = train(400)
    kept = [block.calls / 400 for block in engine.module.blocks]
    assert kept == pytest.approx([0.85, 0.7, 0.55, 0.4], abs=0.08)
    engine.close()
    assert all(type(block) is Block for block in engine.module.blocks)


def test_evaluation_and_a_theta_of_one_keep_all():
    engine, _ = train(20)
    calls = [block.calls for block in engine.module.blocks]
    engine.eval()
    engine(batches(1)[0])
    assert [block.calls for block in engine.module.blocks] == [n + 1 for n in calls]
    same = {"progressive_layer_drop": {"enabled": True}}
    assert train(5, config=same)[1] == train(5, config={"steps_per_print": 1})[1]


class Linear(nn.Module):
    """A residual block that is linear, so that averages can be compared."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return x + self.gain * x


def test_a_kept_block_adds_more_so_that_the_average_is_right():
    model = nn.Sequential(Linear(), Linear())
    drop = ProgressiveLayerDrop(0.5, 100.0)
    engine = ds_core.initialize(model, CONFIG, observers=(drop,))
    engine.global_step = 50
    drawn = [float(engine(torch.ones(1)).detach()) for _ in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(1.3**2, abs=0.05)


def test_activation_checkpointing_drops_the_same_again():
    assert train(12)[1] == train(12, lambda: Net(recomputes=True))[1]


def test_accumulated_micro_batches_draw_anew():
    torch.manual_seed(0)
    engine = ds_core.initialize(Net(), {**CONFIG, **DROPS, "gradient_accumulation_steps": 8})
    engine.train_batch(iter(batches(8)))
    before = [block.calls for block in engine.module.blocks]
    engine.train_batch(iter(batches(8)))
    kept = [block.calls - n for block, n in zip(engine.module.blocks, before, strict=True)]
    assert before == [8] * 4, "nothing is dropped in the first step"
    assert 0 < sum(kept) < 32
    assert set(kept) != {0, 8}


def test_a_run_resumes_with_the_same_draws(tmp_path):
    first, _ = train(5)
    first.save_checkpoint(tmp_path)
    expected = [float(first.train_batch(iter([batch]))) for batch in batches(10)]
    second, _ = train(2, seed=3)
    second.load_checkpoint(tmp_path)
    assert [float(second.train_batch(iter([batch]))) for batch in batches(10)] == expected


def calls_on_rank():
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    engine, _ = train(15, seed=rank)
    return [block.calls for block in engine.module.blocks]


def test_ranks_drop_the_same_blocks():
    found = run_ranks(2, calls_on_rank)
    assert found[0] == found[1]
    assert min(found[0]) < 15


class SelfDropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.told = nn.Parameter(torch.ones(())), []

    def forward(self, x, progressive_layer_drop=False, pld_theta=1.0):
        self.told.append((progressive_layer_drop, round(pld_theta, 3)))
        return (self.weight * x).mean()


def test_a_model_that_drops_for_itself_is_told_theta():
    engine, _ = train(2, SelfDropping)
    engine.eval()
    engine(batches(1)[0])
    expected = round(0.6 * math.exp(-2) + 0.4, 3)
    assert engine.module.told == [(True, 1.0), (True, expected), (False, 1.0)]


class Tuples(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(returns_tuple=True) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            (x,) = block(x)
        return self.head(x).mean()


def test_blocks_that_return_tuples_have_to_be_told():
    with pytest.raises(DsError, match=r"returned tuple .*returns_tuple=True"):
        train(1, Tuples)
    comm.shutdown()
    model = Tuples()
    drop = ProgressiveLayerDrop(0.4, 2.0, blocks=list(model.blocks), returns_tuple=True)
    train(30, lambda: model, config={"steps_per_print": 1}, observers=(drop,))
    assert model.blocks[1].calls < 30


def test_a_model_without_a_stack_is_an_error():
    with pytest.raises(ConfigError, match="progressive_layer_drop: Linear: expected one repeated"):
        train(1, lambda: nn.Linear(2, 2))


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.1, 1.0), (0.5, -1.0)])
def test_probabilities_out_of_range_are_an_error(values):
    with pytest.raises(DsError, match="expected 0 < theta <= 1 and gamma >= 0"):
        ProgressiveLayerDrop(*values)
