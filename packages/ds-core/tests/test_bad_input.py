"""What a user gets wrong, through the front door, and what the message says about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm, plugins
from ds_core.accelerator import Accelerator
from ds_core.errors import ConfigError, DsError

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        return super().forward(x).square().mean()


def make(**changes):
    return ds_core.initialize(Net(), {**CONFIG, **changes})


def without(key):
    return {name: value for name, value in CONFIG.items() if name != key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean gradient_clip"),
        ({"fp16": {"enable": True}}, "fp16.enable: unknown key; did you mean enabled"),
        ({"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}, "optimizer.params.lrr"),
        ({"optimizer": {"type": "AdamX"}}, "optimizer.type: .*AdamX"),
        ({"gradient_clipping": "much"}, 'gradient_clipping: got "much", expected a number'),
        ({"train_batch_size": 7}, "train_batch_size"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.*bf16|bf16.*fp16"),
    ],
    ids=["top", "section", "params", "type", "value", "triangle", "both"],
)
def test_a_wrong_key_or_value_is_named_by_its_path(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_a_config_that_is_no_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        ds_core.initialize(Net(), tmp_path / "nowhere.json")


def test_a_section_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    with pytest.raises(ConfigError, match=r"zero_optimization: .*pip install ds-zero"):
        make(zero_optimization={"stage": 1})


def test_no_optimizer_is_an_error():
    with pytest.raises(DsError, match='there is no optimizer; add an "optimizer" section'):
        ds_core.initialize(Net(), without("optimizer"))


@pytest.mark.parametrize("given", [True, False], ids=["given-optimizer", "config"])
def test_no_trainable_parameter_is_an_error(given):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if given else None
    model.requires_grad_(False)
    with pytest.raises(DsError, match="model: Net has no trainable parameter"):
        ds_core.initialize(model, CONFIG, optimizer=optimizer)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda model: nn.Linear(3, 1).parameters(), r"parameter 0 of group 0, of shape \[1, 3\], "
         "is not a parameter of the model"),
        (lambda model: [model.weight], "lacks 1 trainable parameters of the model, the first is "
         "'bias'"),
    ],
    ids=["foreign", "missing"],
)  # fmt: skip
def test_an_optimizer_on_other_parameters_is_an_error(params, message):
    model = Net()
    optimizer = torch.optim.SGD(params(model), lr=0.1)
    with pytest.raises(DsError, match=message):
        ds_core.initialize(model, CONFIG, optimizer=optimizer)


def test_an_optimizer_that_is_none_is_told_so():
    with pytest.raises(DsError, match=r"optimizer: got float, expected a torch.optim.Optimizer"):
        ds_core.initialize(Net(), CONFIG, optimizer=0.1)


def test_a_model_that_is_none_is_told_so():
    with pytest.raises(DsError, match=r"model: got type, expected a torch.nn.Module"):
        ds_core.initialize(Net, CONFIG)


def test_a_model_wrapped_in_ddp_is_refused():
    comm.init()
    model = nn.parallel.DistributedDataParallel(Net())
    with pytest.raises(DsError, match=r"model: it is wrapped in DistributedDataParallel"):
        ds_core.initialize(model, CONFIG)


def test_parameters_without_values_are_refused():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(DsError, match="'weight' is on the meta device"):
        ds_core.initialize(model, CONFIG)


@pytest.mark.parametrize("section", ["fp16", "bf16"])
def test_a_dtype_that_the_device_lacks_is_an_error(monkeypatch, section):
    monkeypatch.setattr(Accelerator, "supports", lambda self, dtype: dtype is torch.float32)
    name = {"fp16": "float16", "bf16": "bfloat16"}[section]
    with pytest.raises(ConfigError, match=rf"{section}.enabled: .* cannot compute in {name}; use"):
        make(**{section: {"enabled": True}})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.ones(4), r"backward: expected a scalar loss, got a tensor of shape \[4\]; reduce"),
        (1.5, "backward: expected a scalar loss, got float"),
        ({"loss": 1}, "backward: expected a scalar loss, got dict"),
        (torch.ones(()), "backward: the loss does not depend on a parameter"),
    ],
    ids=["vector", "number", "dict", "constant"],
)
def test_a_loss_that_cannot_be_differentiated_is_an_error(loss, message):
    with pytest.raises(DsError, match=message):
        make().backward(loss)


def test_train_batch_without_data_is_an_error():
    with pytest.raises(DsError, match=r"no iterator was given, and .* had no training_data"):
        make().train_batch()


def test_train_batch_takes_an_iterator_not_a_list():
    with pytest.raises(DsError, match=r"train_batch: got list, expected an iterator.*iter\("):
        make().train_batch([torch.ones(4, 3)])


def test_data_that_ends_within_a_step_is_an_error():
    engine = make(gradient_accumulation_steps=2)
    with pytest.raises(DsError, match="ended after 1 of 2 micro-batches"):
        engine.train_batch(iter([torch.ones(4, 3)]))
