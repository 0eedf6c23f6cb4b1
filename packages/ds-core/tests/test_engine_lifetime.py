"""Engines come and go: two in one process, and nothing left behind by one that is dropped."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.seams import EventKind

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "gradient_clipping": 0,
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).square().mean()


def batch(step=0):
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(step))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_engines_do_not_disturb_each_other():
    alone = ds_core.initialize(Net(), CONFIG)
    one, other = ds_core.initialize(Net(), CONFIG), ds_core.initialize(Net(), CONFIG)
    for step in range(3):
        alone.train_batch(iter([batch(step)]))
        loss, other_loss = one(batch(step)), other(batch(step))
        one.backward(loss)
        other.backward(other_loss)
        other.step(), one.step()
    assert torch.equal(weights(one.module), weights(alone.module))
    assert torch.equal(weights(other.module), weights(alone.module))


def test_two_engines_may_share_one_loss():
    """As a generator and a discriminator do."""
    one, other = ds_core.initialize(Net(), CONFIG), ds_core.initialize(Net(), CONFIG)
    before = weights(one.module), weights(other.module)
    one.backward(one(batch(1)) * other(batch(2)))
    one.step(), other.step()
    assert not torch.equal(weights(one.module), before[0])
    assert not torch.equal(weights(other.module), before[1])


def hooks_of(model):
    found = []
    for module in model.modules():
        found += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    for param in model.parameters():
        found += [*(param._backward_hooks or {}).values()]
        found += [*(getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()]
    return found


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_a_dropped_engine_frees_model_and_optimizer(close):
    engine = ds_core.initialize(Net(), CONFIG)
    engine.train_batch(iter([batch()]))
    engine(batch())  # a graph that is never used
    moment = next(iter(engine.sharding.optimizer.state.values()))["exp_avg"]
    watched = [
        weakref.ref(thing)
        for thing in (engine, engine.module, engine.module.first.weight, engine.sharding, moment)
    ]
    if close:
        engine.close()
    del engine, moment
    gc.collect()
    assert [ref() for ref in watched] == [None] * 5


def test_a_dropped_engine_frees_its_optimizer_while_the_model_lives():
    model = Net()
    engine = ds_core.initialize(model, CONFIG)
    engine.train_batch(iter([batch()]))
    watched = [weakref.ref(engine), weakref.ref(engine.sharding)]
    del engine
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    model(batch()).backward()  # the hooks that stay do no harm
    assert model.first.weight.grad is not None


def test_a_closed_engine_leaves_a_plain_model():
    model = Net()
    engine = ds_core.initialize(model, CONFIG)
    engine.train_batch(iter([batch()]))
    engine.close()
    assert hooks_of(model) == []
    model(batch()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_closed_engine_may_be_followed_by_another_on_the_same_model():
    model, expected = Net(), Net()
    once = ds_core.initialize(expected, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = torch.optim.SGD(expected.parameters(), lr=0.1)
    ds_core.initialize(model, CONFIG).close()
    once.close()
    engine = ds_core.initialize(model, CONFIG, optimizer=optimizer)
    engine.train_batch(iter([batch()]))
    expected(batch()).backward()
    reference.step()
    assert torch.allclose(weights(model), weights(expected))


def test_close_may_be_called_twice():
    engine = ds_core.initialize(Net(), CONFIG)
    engine.close()
    engine.close()


@pytest.mark.parametrize("settings", [{}, {"wall_clock_breakdown": True}], ids=["plain", "watched"])
def test_outputs_are_freed_at_once_not_when_python_looks_for_cycles(settings):
    engine = ds_core.initialize(Net(), {**CONFIG, **settings}, observers=(Idle(),))
    gc.disable()
    try:
        loss = engine(batch())
        watched = weakref.ref(loss), weakref.ref(engine)
        engine.backward(loss)
        engine.step()
        engine(batch())  # a graph that is never used
        del loss, engine
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


class Idle:
    def on_event(self, engine, event):
        pass


def test_a_micro_batch_that_fails_is_not_in_the_loss_of_its_step():
    seen = []

    class Seen:
        def on_event(self, engine, event):
            if event.kind is EventKind.STEP_END:
                seen.append(float(event.values["loss"]))

    engine = ds_core.initialize(Net(), CONFIG, observers=(Seen(),))
    loss = engine(batch())
    broken = loss * 1.0
    broken.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        engine.backward(broken * 100)
    engine.zero_grad()
    loss = engine(batch())
    engine.backward(loss)
    engine.step()
    assert seen == [loss.item()]


def fail(gradient):
    raise RuntimeError("broken")


def test_an_observer_that_fails_at_the_end_leaves_a_plain_model():
    class Failing:
        def on_event(self, engine, event):
            if event.kind is EventKind.CLOSE:
                raise OSError("disk full")

    engine = ds_core.initialize(Net(), CONFIG, observers=(Failing(),))
    with pytest.raises(OSError, match="disk full"):
        engine.close()
    assert hooks_of(engine.module) == []


def test_a_closed_engine_gives_back_a_forward_that_was_there_before():
    model = Net()
    model.forward = model.forward
    before = model.__dict__["forward"]
    engine = ds_core.initialize(model, CONFIG)
    engine.compile(backend="eager")
    assert model.__dict__["forward"] is not before
    engine.close()
    assert model.__dict__["forward"] is before
    assert not engine.is_compiled
