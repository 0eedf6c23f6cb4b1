"""Checkpoints of the engine: what was saved goes on as if nothing had happened."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import ds_core
from ds_core import comm
from ds_core.checkpoint import full_state_dict, inspect
from ds_core.errors import CheckpointError, DsError
from ds_core.testing import flip_byte, run_ranks, truncate

BASE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 8}},
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Net(nn.Module):
    """With dropout, so that random states count, and a batch norm, so that buffers do."""

    def __init__(self, width=8):
        super().__init__()
        self.hidden, self.norm = nn.Linear(3, width), nn.BatchNorm1d(width)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(width, 1)

    def forward(self, x):
        x = x.to(self.hidden.weight.dtype)
        return self.head(self.drop(torch.tanh(self.norm(self.hidden(x))))).float().square().mean()


def samples():
    return TensorDataset(torch.randn(46, 3, generator=torch.Generator().manual_seed(1)))


def make(seed=0, model=None, **changes):
    torch.manual_seed(seed)
    return ds_core.initialize(
        Net() if model is None else model, {**BASE, **changes}, training_data=samples()
    )


def losses_of(engine, steps):
    return [float(engine.train_batch()) for _ in range(steps)]


def same(one, other):
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def resume(folder, changes):
    """Train, save, train on; and the same from the checkpoint in an engine with another past."""
    first = make(**changes)
    losses_of(first, 6)
    path = first.save_checkpoint(folder, client_state={"note": "six", "best": 0.5})
    expected = losses_of(first, 6)  # runs into the second epoch
    second = make(seed=9, **changes)
    losses_of(second, 2)
    assert second.load_checkpoint(folder) == {"note": "six", "best": 0.5}
    assert second.global_step == 6
    assert losses_of(second, 6) == expected
    same(without_statistics(second), without_statistics(first))
    assert second.lr_scheduler.state_dict() == first.lr_scheduler.state_dict()
    return path


def test_a_save_within_a_step_warns_and_a_load_forgets_what_was_begun(tmp_path):
    engine = make(gradient_accumulation_steps=2, train_micro_batch_size_per_gpu=2)
    losses_of(engine, 2)
    engine.save_checkpoint(tmp_path, "between")
    expected = losses_of(engine, 2)
    x = torch.full((2, 3), 100.0)
    engine.backward(engine(x))
    engine.step()
    with pytest.warns(UserWarning, match="1 micro-batches of the present step are done"):
        engine.save_checkpoint(tmp_path, "within")

    engine.load_checkpoint(tmp_path, "between")

    assert losses_of(engine, 2) == expected


def backward(engine, plain):
    loss = engine(torch.ones(2, 3))
    loss.backward() if plain else engine.backward(loss)


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("managed", [True, False])
def test_a_save_between_backward_and_step_warns(tmp_path, plain, accumulation, managed):
    engine = make(
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=accumulation,
        managed_gradient_accumulation=managed,
    )
    engine.save_checkpoint(tmp_path, "a")
    for _ in range(1 if managed else 2):
        backward(engine, plain)
    with pytest.warns(UserWarning, match="a backward of the present step has run"):
        engine.save_checkpoint(tmp_path, "b")
    engine.zero_grad()
    engine.save_checkpoint(tmp_path, "c")
    backward(engine, plain)
    while not engine.step():
        backward(engine, plain)
    engine.save_checkpoint(tmp_path, "d")
    backward(engine, plain)
    engine.load_checkpoint(tmp_path)
    engine.save_checkpoint(tmp_path, "e")


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
def test_a_save_is_refused_where_backward_has_updated_and_step_has_not_counted(tmp_path, plain):
    engine = make(train_micro_batch_size_per_gpu=2)
    engine.save_checkpoint(tmp_path, "a")
    engine.sharding.updates_in_backward = True
    engine.sharding.accumulate_locally = False
    backward(engine, plain)
    for _ in range(2):
        with pytest.raises(DsError, match="backward has updated parameters already"):
            engine.save_checkpoint(tmp_path, "b")
        engine.zero_grad()  # does not take the update back
    engine.step()
    engine.save_checkpoint(tmp_path, "b")
    backward(engine, plain)
    engine.load_checkpoint(tmp_path)
    engine.save_checkpoint(tmp_path, "c")


def test_what_a_model_returns_of_its_own_collects_no_hooks():
    class Tied(Net):
        def forward(self, x):
            return super().forward(x), self.head.weight

    engine = make(model=Tied(), train_micro_batch_size_per_gpu=2)
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 3))[0])
        engine.step()
    assert not engine.module.head.weight._backward_hooks


def without_statistics(engine):
    """Batch norms see their own rank's data, and a checkpoint holds those of rank 0."""
    return {name: v for name, v in engine.state_dict().items() if "running" not in name}


FORMATS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 3}},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_go_on_identically(tmp_path, world_size, changes):
    paths = run_ranks(world_size, resume, str(tmp_path), changes)
    assert set(paths) == {str(tmp_path / "step6")}


def save_at(folder):
    engine = make()
    losses_of(engine, 3)
    engine.save_checkpoint(folder)
    return without_statistics(engine)


def load_at(folder):
    engine = make(seed=9)
    engine.load_checkpoint(folder)
    state = without_statistics(engine)
    losses_of(engine, 2)
    return state, engine.global_step


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 1), (1, 2), (2, 3)])
def test_a_checkpoint_loads_at_another_world_size(tmp_path, saved_at, loaded_at):
    saved = run_ranks(saved_at, save_at, str(tmp_path))[0]
    for state, step in run_ranks(loaded_at, load_at, str(tmp_path)):
        same(state, saved)
        assert step == 5


def test_a_tag_names_a_checkpoint_and_latest_the_newest(tmp_path):
    engine = make()
    engine.save_checkpoint(tmp_path, tag="first", client_state={"n": 1})
    losses_of(engine, 1)
    engine.save_checkpoint(tmp_path, tag="second", client_state={"n": 2})
    assert engine.load_checkpoint(tmp_path) == {"n": 2}
    assert engine.global_step == 1
    assert engine.load_checkpoint(tmp_path, tag="first") == {"n": 1}
    assert engine.global_step == 0


def test_a_fresh_engine_can_be_saved_and_loaded(tmp_path, caplog):
    first = make()
    first.save_checkpoint(tmp_path)
    expected = losses_of(first, 3)
    second = make(seed=9)
    losses_of(second, 2)
    with caplog.at_level(logging.WARNING):
        second.load_checkpoint(tmp_path)
    assert "has no optimizer state for 6 parameters, such as head.bias: they start anew" in (
        caplog.text
    )
    assert losses_of(second, 3) == expected


def test_a_parameter_that_was_never_used_can_be_saved(tmp_path):
    models = [Net(), Net()]
    for model in models:
        model.unused = nn.Parameter(torch.ones(2))
    first = make(model=models[0])
    losses_of(first, 2)
    first.save_checkpoint(tmp_path)
    expected = losses_of(first, 2)
    second = make(seed=9, model=models[1])
    second.load_checkpoint(tmp_path)
    assert losses_of(second, 2) == expected


def test_buffers_are_saved_and_restored(tmp_path):
    first = make()
    losses_of(first, 3)
    first.save_checkpoint(tmp_path)
    second = make(seed=9)
    second.load_checkpoint(tmp_path)
    assert second.module.norm.num_batches_tracked == 3
    assert torch.equal(second.module.norm.running_var, first.module.norm.running_var)


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[2],
    ),
}


def given_schedule(name):
    torch.manual_seed(0)
    config = {k: v for k, v in BASE.items() if k != "scheduler"}
    return ds_core.initialize(Net(), config, training_data=samples(), lr_scheduler=SCHEDULES[name])


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_torch_resume(tmp_path, name):
    first = given_schedule(name)
    losses_of(first, 3)
    first.save_checkpoint(tmp_path)
    expected = losses_of(first, 3)
    second = given_schedule(name)
    second.load_checkpoint(tmp_path)
    assert losses_of(second, 3) == expected
    rates = [engine.sharding.param_groups[0]["lr"] for engine in (first, second)]
    assert rates[0] == rates[1]


def saved(tmp_path):
    engine = make()
    losses_of(engine, 1)
    return Path(engine.save_checkpoint(tmp_path))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        make().load_checkpoint(tmp_path / "nowhere")
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"step7.*step1"):
        make().load_checkpoint(tmp_path, tag="step7")


@pytest.mark.parametrize(
    "damage",
    [lambda path: truncate(path, 100), lambda path: flip_byte(path, -9), os.unlink],
    ids=["truncated", "flipped", "deleted"],
)
def test_a_damaged_checkpoint_is_an_error(tmp_path, damage):
    path = saved(tmp_path)
    damage(next(path.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors"):
        make().load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Net(9), r"shapes differ: .*hidden\.weight"),
        (lambda: nn.Linear(3, 1), r"the model has, but the checkpoint lacks: .*model\.weight"),
    ],
    ids=["shape", "names"],
)
def test_a_checkpoint_of_another_model_is_an_error(tmp_path, model, message):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        make(model=model()).load_checkpoint(tmp_path)


def test_client_state_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"client\.bad"):
        make().save_checkpoint(tmp_path, client_state={"bad": object()})


def save_with_rank_state(folder):
    engine = make()
    random_before = torch.rand(3)
    engine.save_checkpoint(folder)
    expected = torch.rand(3)
    torch.manual_seed(123)
    engine.load_checkpoint(folder)
    assert not torch.equal(random_before, expected)
    assert torch.equal(torch.rand(3), expected)
    return dist.get_rank()


def test_every_rank_gets_its_own_random_state_back(tmp_path):
    assert run_ranks(2, save_with_rank_state, str(tmp_path)) == [0, 1]


# --- What is loaded and saved of it ---------------------------------------------------------------


def saved_after(tmp_path, steps, **changes):
    engine = make()
    losses_of(engine, steps)
    engine.save_checkpoint(tmp_path, client_state={"n": steps}, **changes)
    return engine


def test_only_the_weights_are_loaded_when_asked(tmp_path):
    first = saved_after(tmp_path, 3)
    second = make(seed=9)
    losses_of(second, 2)
    rate = second.sharding.param_groups[0]["lr"]
    moments = second.sharding.state_dict()["state"]["exp_avg"]["head.weight"].clone()
    assert second.load_checkpoint(tmp_path, load_module_only=True) == {"n": 3}
    same(second.state_dict(), first.state_dict())
    assert (second.global_step, second.sharding.param_groups[0]["lr"]) == (2, rate)
    assert torch.equal(second.sharding.state_dict()["state"]["exp_avg"]["head.weight"], moments)


def test_the_optimizer_may_keep_its_own_state(tmp_path):
    saved_after(tmp_path, 3)
    second = make(seed=9)
    losses_of(second, 1)
    moments = second.sharding.state_dict()["state"]["exp_avg"]["head.weight"].clone()
    second.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert torch.equal(second.sharding.state_dict()["state"]["exp_avg"]["head.weight"], moments)
    assert (second.global_step, second.lr_scheduler.state_dict()) == (
        3,
        saved_after(tmp_path, 3).lr_scheduler.state_dict(),
    )


def test_the_schedule_may_keep_its_place(tmp_path):
    saved_after(tmp_path, 3)
    second = make(seed=9)
    before = second.lr_scheduler.state_dict()
    second.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert (second.global_step, second.lr_scheduler.state_dict()) == (3, before)


def test_names_may_differ_when_not_strict(tmp_path):
    saved_after(tmp_path, 3)
    other = Net()
    other.extra = nn.Parameter(torch.ones(2))
    engine = make(model=other)
    with pytest.raises(CheckpointError, match=r"lacks: .*model\.extra"):
        engine.load_checkpoint(tmp_path, load_module_only=True)
    engine.load_checkpoint(tmp_path, load_module_only=True, load_module_strict=False)
    assert torch.equal(engine.state_dict()["extra"], torch.ones(2))


def test_latest_may_stay_where_it_is(tmp_path):
    engine = saved_after(tmp_path, 1)
    losses_of(engine, 1)
    engine.save_checkpoint(tmp_path, save_latest=False)
    assert (tmp_path / "step2").is_dir()
    assert (tmp_path / "latest").read_text().strip() == "step1"


def frozen_net(fill):
    model = Net()
    model.hidden.requires_grad_(False)
    with torch.no_grad():
        model.hidden.weight.fill_(fill)
    return model


def test_frozen_parameters_may_be_left_out(tmp_path):
    first = make(model=frozen_net(1.0))
    losses_of(first, 2)
    path = Path(first.save_checkpoint(tmp_path, exclude_frozen_parameters=True))
    assert "model.hidden.weight" not in inspect(path).tensors
    assert inspect(path).frozen == ("hidden.weight", "hidden.bias")
    second = make(seed=9, model=frozen_net(2.0))
    second.load_checkpoint(tmp_path)
    assert torch.equal(second.state_dict()["hidden.weight"], torch.full((8, 3), 2.0))
    assert torch.equal(second.state_dict()["head.weight"], first.state_dict()["head.weight"])


def test_what_tools_need_to_know_is_saved(tmp_path):
    model = Net()
    model.again = model.head
    make(model=model, bf16={"enabled": True}).save_checkpoint(tmp_path)
    found = inspect(tmp_path)
    assert found.aliases == {"again.weight": "head.weight", "again.bias": "head.bias"}
    assert found.bytes_by_kind["buffers"] == sum(buffer.nbytes for buffer in model.buffers())
    assert "holds everything; parameters bfloat16, master float32" in found.sharding
    assert (found.step, found.writer["world_size"]) == (0, 1)
    whole = full_state_dict(tmp_path)
    assert torch.equal(whole["again.weight"], whole["head.weight"])
    assert set(whole) == set(model.state_dict())
