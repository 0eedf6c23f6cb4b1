"""The engine at several ranks: averages, skips and errors are the same everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core.errors import NonFiniteError
from ds_core.testing import run_ranks

BASE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "progress": False,
}


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.hidden, self.head = nn.Linear(3, width), nn.Linear(width, 1)

    def forward(self, x):
        x = x.to(self.hidden.weight.dtype)
        return self.head(torch.tanh(self.hidden(x))).float().square().mean()


def make(**changes):
    torch.manual_seed(dist.get_rank())  # rank 0's values must win
    return ds_core.initialize(Net(), {**BASE, **changes})


def data(step, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + rank))


def weights(engine):
    return {name: p.detach().float() for name, p in engine.module.named_parameters()}


def plain(world_size, steps, accumulation):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(steps):
        for part in range(accumulation):
            for rank in range(world_size):
                loss = model(data(step * accumulation + part, rank))
                (loss / world_size / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def train(accumulation, way):
    engine = make(gradient_accumulation_steps=accumulation)
    for step in range(3 * accumulation):
        loss = engine(data(step))
        if way == "plain":
            loss.backward()
        elif way == "no_sync" and not engine.is_boundary:
            with engine.no_sync():
                engine.backward(loss)
        else:
            engine.backward(loss)
        engine.step()
    return weights(engine), engine.grad_norm


@pytest.mark.parametrize("way", ["engine", "plain", "no_sync"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_training_equals_plain_pytorch(world_size, accumulation, way):
    results = run_ranks(world_size, train, accumulation, way)
    expected = plain(world_size, 3, accumulation)
    for got, norm in results:
        assert norm == results[0][1]
        for name, value in expected.items():
            assert torch.allclose(got[name], value, atol=1e-5), name
            assert torch.equal(got[name], results[0][0][name]), "ranks must not drift apart"


def bytes_of_accumulation():
    engine = make(gradient_accumulation_steps=4)
    for step in range(4):
        engine.backward(engine(data(step)))
        engine.step()
    with engine.mesh.ledger.measure() as sent:
        for step in range(4):
            engine.backward(engine(data(step)))
            engine.step()
    return sent.sent_bytes(op="all_reduce", caller="hidden.weight"), sent.num_calls()


def test_gradients_are_sent_once_per_step():
    numel = sum(p.numel() for p in Net().parameters())
    for sent, _ in run_ranks(2, bytes_of_accumulation):
        assert sent == 4 * numel


def step_ending_in_no_sync():
    engine = make()
    with engine.no_sync():
        engine.backward(engine(data(0)))
        engine.step()
    return weights(engine)


def test_a_step_inside_no_sync_averages_all_the_same():
    first, second = run_ranks(2, step_ending_in_no_sync)
    expected = plain(2, 1, 1)
    for name, value in expected.items():
        assert torch.allclose(first[name], value, atol=1e-6)
        assert torch.equal(first[name], second[name])


def overflow_on_rank_1():
    engine = make(fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    before = weights(engine)
    x = data(0)
    engine.backward(engine(x * (1e4 if dist.get_rank() == 1 else 1.0)) * 1e3)
    updated = engine.step()
    kept = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    after = engine.scaler.scale
    engine.backward(engine(data(1)))
    engine.step()
    return updated, kept, after, engine.scaler.scale, engine.skipped_steps, weights(engine)


def test_overflow_on_one_rank_skips_on_all():
    first, second = run_ranks(2, overflow_on_rank_1)
    assert first[:5] == second[:5] == (False, True, 128.0, 128.0, 1)
    assert all(torch.equal(value, second[5][name]) for name, value in first[5].items())


def nan_on_rank_1():
    engine = make()
    engine.train_batch(iter([data(0)]))
    before = weights(engine)
    engine.backward(engine(data(1) * (float("nan") if dist.get_rank() == 1 else 1.0)))
    with pytest.raises(NonFiniteError) as error:
        engine.step()
    kept = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    engine.train_batch(iter([data(2)]))
    return str(error.value), kept, weights(engine)


def test_nan_on_one_rank_is_an_error_on_all():
    (message, kept, first), (other, kept_too, second) = run_ranks(2, nan_on_rank_1)
    assert message == other
    assert kept
    assert kept_too
    assert "step 1: the gradient norm is nan, so the step was not taken" in message
    assert "rank 1: loss nan, first gradient 'h" in message
    assert "rank 0: loss nan" not in message
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def unused_on_rank_1():
    torch.manual_seed(0)
    engine = make()
    engine.module.extra = nn.Linear(3, 1)
    engine = ds_core.initialize(engine.module, BASE)
    x = data(0)
    loss = engine(x)
    if dist.get_rank() == 0:
        loss = loss + engine.module.extra(x).square().mean()
    engine.backward(loss)
    engine.step()
    return weights(engine)


def test_ranks_may_use_different_parameters():
    first, second = run_ranks(2, unused_on_rank_1)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def buffers_differ():
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_mean.fill_(float(dist.get_rank()))
    engine = ds_core.initialize(model, BASE)
    return engine.state_dict()["1.running_mean"].tolist()


def test_buffers_start_from_rank_0():
    assert run_ranks(2, buffers_differ) == [[0.0] * 4] * 2


def models_differ(kind):
    rank = dist.get_rank()
    model = Net(8 + rank if kind == "shape" else 8)
    if kind == "name" and rank == 1:
        model.more = nn.Linear(1, 1)
    if kind == "frozen" and rank == 1:
        model.head.bias.requires_grad_(False)
    ds_core.initialize(model, BASE)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"first difference is at 'hidden.weight': rank 0: .*\[8, 3\].*1: .*\[9, 3\]"),
        ("name", r"first difference is at 'more.weight': rank 0: no further parameter; rank 1"),
        ("frozen", r"first difference is at 'head.bias'.*rank 1: .*frozen"),
    ],
)
def test_models_that_differ_between_ranks_are_an_error_on_all(kind, message):
    import re

    from ds_core.testing import Raised, RankFailure

    with pytest.raises(RankFailure) as failure:
        run_ranks(2, models_differ, kind, timeout_s=20)
    for outcome in failure.value.outcomes:
        assert isinstance(outcome, Raised)
        assert outcome.type == "ds_core.errors.ModelMismatchError"
        assert re.search(message, outcome.message), outcome.message
