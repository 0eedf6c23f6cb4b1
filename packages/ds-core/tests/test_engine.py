"""The engine in one process: what it makes of configs, batches, outputs, losses and schedules."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ds_core
from ds_core import comm, config
from ds_core.errors import DsError, NonFiniteError

BASE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Net(nn.Module):
    """Returns its loss in the container that `form` names."""

    def __init__(self, form="loss", dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.hidden, self.head = nn.Linear(3, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)

    def forward(self, x, y):
        logits = self.head(torch.tanh(self.hidden(x.to(self.hidden.weight.dtype))))
        loss = F.mse_loss(logits.float(), y)
        return FORMS[self.form](loss, logits)


Named = collections.namedtuple("Named", "loss logits")


@dataclasses.dataclass(frozen=True)
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    note: str = "untouched"


class ModelOutput(collections.OrderedDict):
    """As the popular model library's outputs: a dict with attributes that forbids update()."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def update(self, *args, **kwargs):
        raise TypeError("update is forbidden")


def model_output(loss, logits):
    output = ModelOutput()
    output["loss"], output["logits"] = loss, logits
    return output


FORMS = {
    "loss": lambda loss, logits: loss,
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "namedtuple": Named,
    "dataclass": Output,
    "model output": model_output,
    "logits": lambda loss, logits: logits,
    "vector": lambda loss, logits: (logits - logits).sum(1),
}


def data(step=0, size=4):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)


def make(form="loss", model=None, **changes):
    given = {
        name: changes.pop(name)
        for name in ("optimizer", "lr_scheduler", "training_data", "observers", "collate_fn")
        if name in changes and not isinstance(changes[name], dict)
    }
    return ds_core.initialize(model or Net(form), {**BASE, **changes}, **given)


def weights(engine):
    return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])


def plain_training(steps, accumulation=1, clip=None):
    """Parameters after training with nothing but torch on the same batches."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    norms = []
    for step in range(steps):
        for part in range(accumulation):
            (model(*data(step * accumulation + part)) / accumulation).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)))
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), norms


# ---------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", ["dict", "path", "text path", "Config"])
def test_a_config_comes_in_any_form(tmp_path, kind):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASE))
    forms = {"dict": BASE, "path": path, "text path": str(path)}
    given = config.load(BASE, world_size=1) if kind == "Config" else forms[kind]
    engine = ds_core.initialize(Net(), given)
    engine.train_batch(iter([data()]))
    assert engine.global_step == 1
    assert engine.micro_batch_size == 4


def test_a_config_dict_is_left_as_it_was():
    before = copy.deepcopy(BASE)
    make()
    assert before == BASE


def test_the_given_optimizer_is_used(caplog):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = ds_core.initialize(model, BASE, optimizer=optimizer)
    assert engine.sharding.param_groups is optimizer.param_groups


def test_a_seed_makes_runs_equal():
    draws = []
    for _ in range(2):
        make(seed=7)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


# ---------------------------------------------------------------------------- training


def test_the_loop_of_three_calls_equals_plain_pytorch():
    engine = make()
    for step in range(4):
        engine.backward(engine(*data(step)))
        assert engine.step() is True
    assert torch.allclose(weights(engine), plain_training(4)[0], atol=1e-6)
    assert engine.global_step == 4


def test_accumulation_equals_plain_pytorch():
    engine = make(gradient_accumulation_steps=3)
    updated = []
    for step in range(6):
        assert engine.is_boundary == (step % 3 == 2)
        engine.backward(engine(*data(step)))
        updated.append(engine.step())
    assert updated == [False, False, True] * 2
    assert engine.global_step == 2
    assert torch.allclose(weights(engine), plain_training(2, accumulation=3)[0], atol=1e-6)


def test_accumulation_equals_one_large_batch():
    small = make(gradient_accumulation_steps=4, optimizer=sgd())
    large = make(train_micro_batch_size_per_gpu=16, optimizer=sgd())
    parts = [data(step) for step in range(4)]
    small.train_batch(iter(parts))
    large.train_batch(iter([tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))]))
    assert torch.allclose(weights(small), weights(large), atol=1e-6)


def sgd(lr=0.1):
    return {"type": "SGD", "params": {"lr": lr}}


@pytest.mark.parametrize("clip", [0.05, 100.0], ids=["clips", "does-not"])
def test_clipping_equals_torch(clip):
    engine = make(gradient_clipping=clip)
    norms = []
    for step in range(3):
        engine.train_batch(iter([data(step)]))
        norms.append(engine.grad_norm)
    expected, expected_norms = plain_training(3, clip=clip)
    assert torch.allclose(weights(engine), expected, atol=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("logits", "vector")])
def test_train_batch_finds_the_loss_in(form):
    engine, plain = make(form), make("loss")
    loss = engine.train_batch(iter([data()]))
    assert float(loss) == float(plain.train_batch(iter([data()])))
    assert not loss.requires_grad
    assert torch.equal(weights(engine), weights(plain))


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x).square().mean()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Net, data()),
        (Net, list(data())),
        (Net, dict(zip("xy", data(), strict=True))),
        (Single, data()[0]),
    ],
    ids=["tuple", "list", "dict", "tensor"],
)
def test_a_batch_may_be(model, batch):
    engine = make(model=model())
    assert torch.isfinite(engine.train_batch(iter([batch])))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("logits", r"scalar loss, or an object.*got Tensor with a tensor of shape \[4, 2\]"),
        ("vector", r"got Tensor with a tensor of shape \[4\]"),
    ],
)
def test_a_model_without_a_scalar_loss_is_told_so(form, message):
    with pytest.raises(DsError, match=message):
        make(form).train_batch(iter([data()]))


# ---------------------------------------------------------------------------- plain backward


def outputs_loss(form, output):
    if form == "loss":
        return output
    return output[0] if isinstance(output, tuple | list) else output.loss


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("form", ["loss", "tuple", "namedtuple", "dataclass", "model output"])
def test_plain_backward_equals_engine_backward(form, accumulation):
    told, plain = (make(form, gradient_accumulation_steps=accumulation) for _ in range(2))
    for step in range(2 * accumulation):
        told.backward(outputs_loss(form, told(*data(step))))
        outputs_loss(form, plain(*data(step))).backward()
        assert told.step() == plain.step()
    assert torch.allclose(weights(told), weights(plain), atol=1e-7)
    assert plain.grad_norm == pytest.approx(told.grad_norm, rel=1e-6)


def test_plain_backward_may_start_from_logits_beside_a_loss():
    """The loss is computed from the logits, which are an output too: scaled once, not twice."""
    told, plain = (make("tuple", gradient_accumulation_steps=2) for _ in range(2))
    for step in range(2):
        x, y = data(step)
        loss, logits = told(x, y)
        told.backward(loss + logits.sum())
        loss, logits = plain(x, y)
        (loss + logits.sum()).backward()
        told.step(), plain.step()
    assert plain.grad_norm == pytest.approx(told.grad_norm, rel=1e-6)


@pytest.mark.parametrize("form", ["loss", "tuple"])
def test_plain_backward_equals_engine_backward_in_fp16(form):
    fp16 = {"enabled": True, "initial_scale_power": 8}
    told, plain = (make(form, fp16=fp16, gradient_accumulation_steps=2) for _ in range(2))
    for step in range(4):
        told.backward(outputs_loss(form, told(*data(step))))
        outputs_loss(form, plain(*data(step))).backward()
        told.step(), plain.step()
    assert plain.grad_norm == pytest.approx(told.grad_norm, rel=2e-3)
    assert torch.allclose(weights(told), weights(plain), atol=2e-3)


def test_plain_backward_is_scaled_in_eval_mode_too():
    """Fine-tuning with dropout off is training all the same."""
    fp16 = {"enabled": True, "initial_scale_power": 8}
    engine, reference = make(fp16=fp16), make()
    engine.eval()
    for either in (engine, reference):
        either(*data()).backward()
        either.step()
    assert engine.grad_norm == pytest.approx(reference.grad_norm, rel=1e-2)


def test_engine_backward_takes_a_loss_made_outside_the_model():
    engine = make("logits")
    x, y = data()
    engine.backward(F.mse_loss(engine(x, y), y))
    engine.step()
    expected, _ = plain_training(1)
    assert torch.allclose(weights(engine), expected, atol=1e-6)


def test_outputs_are_returned_with_their_types_and_values():
    engine = make("dataclass", gradient_accumulation_steps=2)
    output = engine(*data())
    expected = Net("dataclass")(*data())
    assert isinstance(output, Output)
    assert output.note == "untouched"
    assert torch.equal(output.logits, expected.logits)


# ---------------------------------------------------------------------------- schedules


def test_the_configured_schedule_steps_once_per_optimizer_step():
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4}}
    engine = make(scheduler=schedule, gradient_accumulation_steps=2)
    rates = []
    for step in range(12):
        engine.backward(engine(*data(step)))
        if engine.step():
            rates.append(engine.sharding.param_groups[0]["lr"])
    assert len(rates) == 6
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("form", ["object", "callable"])
def test_a_given_schedule_is_stepped(form):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def make_schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    given = make_schedule(optimizer) if form == "object" else make_schedule
    engine = ds_core.initialize(model, BASE, optimizer=optimizer, lr_scheduler=given)
    for step in range(3):
        engine.train_batch(iter([data(step)]))
    assert engine.sharding.param_groups[0]["lr"] == 0.125


def test_a_skipped_step_does_not_move_the_schedule():
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4}}
    engine = make(fp16=fp16, scheduler=schedule)
    before = engine.sharding.param_groups[0]["lr"]
    engine.backward(engine(*data()))
    assert engine.step() is False
    assert not engine.was_step_applied
    assert engine.sharding.param_groups[0]["lr"] == before
    assert engine.skipped_steps == 1


# ---------------------------------------------------------------------------- evaluation


def test_evaluation_disturbs_nothing():
    engine, undisturbed = make(gradient_accumulation_steps=2), make(gradient_accumulation_steps=2)
    for step in range(4):
        with torch.no_grad():
            engine(*data(50 + step))
        engine.eval()
        with torch.inference_mode():
            engine(*data(60 + step))
        engine.train()
        loss = engine(*data(step))
        with torch.no_grad():
            engine(*data(70 + step))  # between forward and backward
        engine.backward(loss)
        undisturbed.backward(undisturbed(*data(step)))
        assert engine.step() == undisturbed.step()
    assert torch.equal(weights(engine), weights(undisturbed))
    assert engine.global_step == undisturbed.global_step == 2


# ---------------------------------------------------------------------------- fp16, bf16, autocast


@pytest.mark.parametrize(
    ("changes", "parameters", "tolerance"),
    [
        ({"bf16": {"enabled": True}}, torch.bfloat16, 3e-2),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, torch.float16, 3e-3),
        ({"torch_autocast": {"enabled": True, "dtype": "bf16"}}, torch.float32, 3e-2),
    ],
    ids=["bf16", "fp16", "autocast"],
)
def test_low_precision_follows_full_precision(changes, parameters, tolerance):
    engine = make(**changes)
    for step in range(5):
        engine.train_batch(iter([data(step)]))
    assert {p.dtype for p in engine.module.parameters()} == {parameters}
    assert (weights(engine) - plain_training(5)[0]).abs().max() < tolerance


@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad"])
def test_bf16_keeps_a_master_copy_of_a_model_that_was_built_in_bf16(optimizer):
    section = {"type": optimizer, "params": {"lr": 0.01}}
    rounded = Net().bfloat16()
    wide = make(model=copy.deepcopy(rounded).float(), bf16={"enabled": True}, optimizer=section)
    narrow = make(model=rounded, bf16={"enabled": True}, optimizer=section)
    for step in range(3):
        for engine in (wide, narrow):
            engine.train_batch(iter([data(step)]))
    for name, _ in narrow.module.named_parameters():
        value = narrow.sharding.full_parameter(name)
        assert value.dtype == torch.float32
        assert torch.equal(value, wide.sharding.full_parameter(name))


class Nested(Net):
    """Takes its input inside a list and a dict, and does not cast it."""

    def forward(self, pairs, extra):
        x, count = pairs
        assert x.dtype == extra["y"].dtype == torch.float16
        assert count.dtype == torch.int64
        return F.mse_loss(self.head(torch.tanh(self.hidden(x))), extra["y"])


def test_fp16_casts_inputs_if_asked_to():
    x, y = data()
    engine = make(model=Nested(), fp16={"enabled": True, "auto_cast": True})
    loss = engine([x, torch.tensor(1)], extra={"y": y})
    with torch.no_grad():
        engine.eval()
        assert torch.equal(engine([x, torch.tensor(1)], extra={"y": y}), loss)


def test_inputs_are_left_alone_without_fp16():
    engine = make(fp16={"auto_cast": True})
    assert engine.precision.inputs is None


def test_overflow_halves_the_scale_and_skips_until_it_fits():
    engine = make(fp16={"enabled": True, "initial_scale_power": 32, "hysteresis": 1})
    before, steps = weights(engine), 0
    while True:
        engine.train_batch(iter([data(steps)]))
        if engine.skipped_steps <= steps:
            break
        assert torch.equal(weights(engine), before), "a skipped step changes nothing"
        steps += 1
    assert steps > 3
    assert engine.scaler.scale < 2.0**29
    assert not torch.equal(weights(engine), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    engine = make()
    engine.train_batch(iter([data()]))
    before = weights(engine)
    x, y = data(1)
    engine.backward(engine(x * bad, y))
    with pytest.raises(NonFiniteError, match=r"step 1: .*rank 0: loss (nan|inf), first gradient '"):
        engine.step()
    assert torch.equal(weights(engine), before)
    engine.train_batch(iter([data(2)]))  # and it can go on
    assert engine.global_step == 2


def test_a_plain_loss_that_is_not_finite_is_an_error_too():
    engine = make()
    x, y = data(1)
    engine(x * float("nan"), y).backward()
    with pytest.raises(NonFiniteError, match="rank 0: loss not known, first gradient"):
        engine.step()


# ---------------------------------------------------------------------------- state


def test_state_dict_is_whole_and_a_copy():
    engine = make()
    state = engine.state_dict()
    assert sorted(state) == sorted(dict(Net().named_parameters()))
    before = state["head.weight"].clone()
    engine.train_batch(iter([data()]))
    assert torch.equal(state["head.weight"], before)
    Net().load_state_dict(engine.state_dict())


def test_state_dict_round_trips_through_the_engine():
    trained, fresh = make(), make(model=Net().requires_grad_(True))
    trained.train_batch(iter([data()]))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(weights(fresh), weights(trained))


def test_state_dict_has_every_name_of_a_tied_parameter():
    model = Net()
    model.twin = nn.Linear(3, 8)
    model.twin.weight = model.hidden.weight
    engine = make(model=model)
    assert sorted(engine.state_dict()) == sorted(model.state_dict())
    engine.load_state_dict(engine.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), "the model has, but the state lacks: head.bias"),
        (lambda state: state.update(more=torch.ones(1)), "the model lacks: more"),
        (lambda state: state.update({"head.bias": torch.ones(3)}), r"head.bias: .*\[3\].*\[2\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_state_of_another_model_is_refused(change, message):
    engine = make()
    state = engine.state_dict()
    change(state)
    with pytest.raises(DsError, match=message):
        engine.load_state_dict(state)


def test_memory_is_told_by_kind():
    engine = make()
    engine.train_batch(iter([data()]))
    numel = sum(p.numel() for p in engine.module.parameters())
    memory = engine.memory()
    assert memory["parameters"] == memory["gradients"] == 4 * numel
    assert memory["optimizer"] == 8 * numel


def test_unused_parameters_are_left_alone():
    model = Net()
    model.extra = nn.Parameter(torch.ones(3))
    engine = make(model=model)
    engine.train_batch(iter([data()]))
    assert torch.equal(model.extra, torch.ones(3)), "no weight decay without a gradient"


def test_step_without_backward_changes_nothing():
    engine = make()
    engine.train_batch(iter([data()]))
    before = weights(engine)
    engine.step()
    assert engine.grad_norm == 0.0
    assert torch.equal(weights(engine), before)


def test_an_exception_in_backward_does_not_poison_the_next_step():
    engine, expected = make(), make()

    def fail(gradient):
        raise ValueError("from a hook")

    loss = engine(*data(9))
    handle = engine.module.hidden.weight.register_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        engine.backward(loss)
    handle.remove()
    engine.sharding.zero_grad()
    for either in (engine, expected):
        either.train_batch(iter([data()]))
    assert torch.equal(weights(engine), weights(expected))


def test_a_step_that_an_error_ended_counts_as_not_begun():
    engine = make("loss", gradient_accumulation_steps=2)
    plain = make("loss", gradient_accumulation_steps=2)

    with pytest.raises(DsError, match="ended after 1 of 2 micro-batches"):
        engine.train_batch(iter([data()]))
    engine.train_batch(iter([data(), data()]))
    plain.train_batch(iter([data(), data()]))

    assert engine.global_step == 1
    assert torch.equal(weights(engine), weights(plain))


# ---------------------------------------------------------------------- as the caller wants it


def quadratic():
    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight)
    return model


def test_backward_leaves_a_loss_undivided_and_keeps_its_graph():
    engine = ds_core.initialize(quadratic(), {**BASE, "gradient_accumulation_steps": 4})
    loss = engine(torch.ones(2, 3)).mean()
    engine.backward(loss, divides_by_accumulation=False, retain_graph=True)
    whole = engine.module.weight.grad.clone()
    engine.zero_grad()
    engine.backward(loss)
    assert torch.equal(engine.module.weight.grad * 4, whole)


def test_a_step_that_is_not_finite_is_left_out_if_that_is_asked_for():
    engine = ds_core.initialize(quadratic(), BASE)
    engine.skips_nonfinite = True
    before = engine.module.weight.detach().clone()
    engine.backward(engine(torch.full((2, 3), torch.inf)).mean())
    assert engine.step() is False
    assert torch.equal(engine.module.weight, before)
    assert (engine.global_step, engine.skipped_steps) == (1, 1)
    engine.backward(engine(torch.ones(2, 3)).mean())
    assert engine.step() is True


def test_an_engine_that_does_not_train_only_runs_the_model():
    model = quadratic()
    settings = {key: value for key, value in BASE.items() if key != "optimizer"}
    engine = ds_core.initialize(model, {**settings, "bf16": {"enabled": True}}, training=False)
    assert engine(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert engine.memory() == {
        **dict.fromkeys(engine.memory(), 0),
        "parameters": 2 * sum(p.numel() for p in model.parameters()),
    }
    with pytest.raises(DsError, match="does not depend on a parameter"):
        engine.backward(engine(torch.ones(1, 3, dtype=torch.bfloat16)).mean())
    with pytest.raises(DsError, match="training=False"):
        engine.step()
    assert not model.weight.requires_grad
    engine.close()
    assert model.weight.requires_grad


def test_the_optimizer_of_a_config_takes_groups():
    model = quadratic()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    engine = ds_core.initialize(model, BASE, param_groups=groups)
    assert [group["lr"] for group in engine.sharding.param_groups] == [0.01, 0.5]
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DsError, match="param_groups"):
        ds_core.initialize(quadratic(), BASE, optimizer=given, param_groups=groups)
