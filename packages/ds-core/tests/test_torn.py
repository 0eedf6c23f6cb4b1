"""After an error in the middle of a step nothing is built on what it left, until a load."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import NonFiniteError, TornError
from ds_core.seams import tearing
from ds_core.testing import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


def make(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return ds_core.initialize(model, {**CONFIG, **changes})


def step(engine, number, *, plain=False):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(number))
    loss = engine(x).square().mean()
    loss.backward() if plain else engine.backward(loss)
    return engine.step()


def fail(*_):
    raise RuntimeError("the memory is full")


def tear(engine, number=50):
    """A step that ends when parameters have changed, with an error on this rank."""
    failing = engine.sharding.optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="the memory is full"):
        step(engine, number)
    failing.remove()


def same(one, other):
    assert all(torch.equal(one[name], other[name]) for name in other)


REFUSED = {
    "step": lambda engine, folder: step(engine, 1),
    "save_checkpoint": lambda engine, folder: engine.save_checkpoint(folder, "b"),
    "asynchronous save": lambda engine, folder: engine.save_checkpoint(
        folder, "b", asynchronous=True
    ),
    "save_model": lambda engine, folder: engine.save_model(folder / "model"),
    "state_dict": lambda engine, folder: engine.state_dict(),
    "load_state_dict": lambda engine, folder: engine.load_state_dict({}, strict=False),
    "load_pretrained": lambda engine, folder: engine.load_pretrained(folder / "model"),
    "load of weights": lambda engine, folder: engine.load_checkpoint(folder, load_module_only=True),
    "load without states": lambda engine, folder: engine.load_checkpoint(
        folder, load_optimizer_states=False
    ),
}


def test_a_torn_step_is_refused_everywhere_until_a_load(tmp_path):
    engine, undisturbed = make(), make()
    for each in (engine, undisturbed):
        step(each, 0)
    engine.save_checkpoint(tmp_path, "a")
    tear(engine)
    assert engine.global_step == 1
    for what, attempt in REFUSED.items():
        with pytest.raises(TornError, match=r"not belong to one step .*the memory is full") as told:
            attempt(engine, tmp_path)
        assert "engine.load_checkpoint" in str(told.value), what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]

    engine.load_checkpoint(tmp_path)

    for each in (engine, undisturbed):
        assert step(each, 1)
    same(engine.state_dict(), undisturbed.state_dict())
    engine.save_checkpoint(tmp_path, "b")


def test_a_train_batch_that_was_torn_is_not_begun_anew(tmp_path):
    engine = make()
    failing = engine.sharding.optimizer.register_step_post_hook(fail)
    engine.module.forward = lambda x: x.sum() * engine.module[0].weight.sum()
    batches = iter([torch.ones(2, 3)] * 3)
    with pytest.raises(RuntimeError, match="the memory is full"):
        engine.train_batch(batches)
    failing.remove()
    with pytest.raises(TornError, match="the memory is full"):
        engine.train_batch(batches)


def tear_on_rank_1(folder):
    engine = make()
    step(engine, 0)
    engine.save_checkpoint(folder, "a")
    if dist.get_rank() == 1:
        tear(engine)
    else:
        step(engine, 50)
    said = []
    for attempt in (
        lambda: engine.save_checkpoint(folder, "b"),
        lambda: engine.save_model(f"{folder}/model"),
        engine.state_dict,
    ):
        with pytest.raises(TornError) as told:
            attempt()
        said.append(str(told.value))
    engine.load_checkpoint(folder)
    step(engine, 1)
    engine.save_checkpoint(folder, "b")
    return said


def test_one_torn_rank_ends_a_save_on_all(tmp_path):
    for said in run_ranks(2, tear_on_rank_1, str(tmp_path)):
        assert len(said) == 3
        assert all("rank 1: the optimizer's step ended in the middle" in text for text in said)


def step_into_infinity():
    """Rank 1 has updated a part when it finds that the rest is not finite, as ds-zero may."""
    engine = make()
    step(engine, 0)
    if dist.get_rank() == 1:
        engine.sharding.torn = "the gradient of unit '2' is not finite, 1 of 2 are updated"
    engine.backward(engine(torch.full((2, 3), float("nan"))).square().mean())
    said = []
    for expected, attempt in (
        (NonFiniteError, engine.step),
        (TornError, lambda: step(engine, 1)),
    ):
        with pytest.raises(expected) as told:
            attempt()
        said.append(str(told.value))
    return said


def test_a_step_that_was_partly_taken_before_it_was_not_finite_says_so():
    for nonfinite, torn in run_ranks(2, step_into_infinity):
        assert "the step was not taken" not in nonfinite
        assert "part of the step was taken before that was known: rank 1: the grad" in nonfinite
        assert "1 of 2 are updated" in nonfinite
        assert "load_checkpoint" in nonfinite
        assert "1 of 2 are updated" in torn


def test_where_backward_updates_it_is_refused_as_well():
    engine = make()
    engine.sharding.updates_in_backward = True
    loss = engine(torch.ones(2, 3)).square().mean()
    engine.sharding.torn = "it is broken"
    with pytest.raises(TornError, match=r"backward: .*it is broken"):
        engine.backward(loss)
    with pytest.raises(TornError, match=r"backward: .*it is broken"):
        engine(torch.ones(2, 3))  # a plain loss.backward() would follow


def test_the_first_error_counts_and_an_interrupt_does():
    class Held:
        torn = None

    held = Held()
    with tearing(held, "nothing"):
        pass
    assert held.torn is None
    with pytest.raises(KeyboardInterrupt), tearing(held, "the step"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="later"), tearing(held, "the step"):
        raise ValueError("later")
    assert held.torn == "the step ended in the middle: KeyboardInterrupt: "
