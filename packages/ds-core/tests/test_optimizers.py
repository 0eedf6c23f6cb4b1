"""Building the optimizer that a config names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_core import optim, optimizers, plugins
from ds_core.errors import ConfigError
from ds_core.optimizer_state import devices_of_state


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch):
    """ds-ops may be: what it changes is tested with it."""
    found = plugins.entry_points
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: () if group == "ds_core.optimizers" else found(group=group),
    )


def build(name: str, params: dict | None = None, over=None) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(3))] if over is None else over
    return optimizers.build(SimpleNamespace(type=name, params=params or {}), parameters)


def refusal(name: str, params: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build(name, params)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "params", "cls"),
    [
        pytest.param("Adam", {}, torch.optim.AdamW, id="adam-is-adamw"),
        pytest.param("adam", {"adam_w_mode": False}, torch.optim.Adam, id="plain-adam"),
        pytest.param("AdamW", {}, torch.optim.AdamW, id="adamw"),
        pytest.param("SGD", {"lr": 0.1}, torch.optim.SGD, id="sgd"),
        pytest.param("adagrad", {}, torch.optim.Adagrad, id="adagrad"),
        pytest.param("rmsprop", {}, torch.optim.RMSprop, id="any-of-torch"),
        pytest.param("NAdam", {"lr": 1}, torch.optim.NAdam, id="integer-rate"),
        pytest.param("lion", {"lr": 1e-4}, optim.Lion, id="lion"),
        pytest.param("Lamb", {"max_coeff": 5}, optim.Lamb, id="lamb"),
        pytest.param("SparseAdam", {}, torch.optim.SparseAdam, id="sparse"),
    ],
)
def test_type_names_a_class_in_any_case(name, params, cls):
    assert type(build(name, params)) is cls


@pytest.mark.parametrize(
    ("params", "weight_decay"),
    [
        pytest.param({}, 0.0, id="deepspeed-default"),
        pytest.param({"torch_adam": True}, 0.01, id="torch-default"),
        pytest.param({"weight_decay": 0.3}, 0.3, id="given"),
    ],
)
def test_adam_decays_no_weights_unless_told_to(params, weight_decay):
    optimizer = build("adamw", params)

    assert optimizer.defaults["weight_decay"] == weight_decay
    assert optimizers.effective_params("adamw", params)["weight_decay"] == weight_decay


def test_lists_of_the_config_become_tuples():
    assert build("adamw", {"betas": [0.8, 0.95]}).defaults["betas"] == (0.8, 0.95)


def test_fused_is_the_default_where_it_runs():
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    assert build("adamw").defaults["fused"] is True
    assert build("adamw", over=[{"params": [half]}]).defaults["fused"] is True
    assert build("adamw", over=iter([("name", half)])).defaults["fused"] is True


@pytest.mark.parametrize(
    ("params", "over"),
    [
        pytest.param({"fused": False}, None, id="told-not-to"),
        pytest.param({"foreach": True}, None, id="foreach"),
        pytest.param({}, [torch.nn.Parameter(torch.ones(2, device="meta"))], id="no-device"),
        pytest.param({}, [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], id="complex"),
    ],
)
def test_fused_is_left_out_elsewhere(params, over):
    assert not build("adamw", params, over).defaults["fused"]


def test_class_without_a_fused_kernel_is_built_without():
    assert "fused" not in build("adadelta").defaults


def test_parameter_groups_keep_their_own_options():
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5},
        {"params": torch.nn.Parameter(torch.ones(1))},
    ]

    optimizer = build("adamw", {"lr": 0.1}, groups)

    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        pytest.param("adamm", {}, "did you mean adam?", id="misspelt-type"),
        pytest.param("OneBitAdam", {}, "pip install ds-comm", id="ds-comm"),
        pytest.param("FusedLion", {}, 'pip install ds-ops; or use "lion"', id="ds-ops"),
        pytest.param("DeepSpeedCPUAdam", {}, 'pip install ds-ops; or use "adamw"', id="cpu-adam"),
        pytest.param("Adam8bit", {}, "not installed: pip install ds-ops", id="adam8bit"),
        pytest.param("MuAdam", {}, "pip install mup", id="mup"),
        pytest.param("LBFGS", {}, "needs a closure", id="closure"),
        pytest.param("sgd", {"momentun": 0.9}, "did you mean momentum?", id="misspelt-param"),
        pytest.param("sgd", {"adam_w_mode": True}, "adam_w_mode: unknown key", id="foreign-switch"),
        pytest.param("adam", {"bias_correction": False}, "always corrects", id="bias-correction"),
        pytest.param(
            "adam", {"fp32_optimizer_states": False}, "pip install ds-ops", id="bf16-states"
        ),
        pytest.param("adam", {"torch_adam": 1}, "got 1, expected true or false", id="switch-type"),
        pytest.param("adamw", {"adam_w_mode": False}, 'use type "adam"', id="contradiction"),
        pytest.param("adamw", {"max_grad_norm": 1.0}, "use the top-level", id="max-grad-norm"),
        pytest.param("adamw", {"lr": True}, "lr: got true, expected a number", id="bool"),
        pytest.param("adamw", {"lr": 10**400}, "expected a number", id="huge"),
        pytest.param("adamw", {"lr": float("nan")}, "lr: got NaN", id="nan"),
        pytest.param("adamw", {"betas": [0.9]}, "expected a list of 2 numbers", id="length"),
        pytest.param("adamw", {"lr": -1.0}, "AdamW refuses its arguments: Invalid", id="range"),
        pytest.param("adamw", {"fused": True, "foreach": True}, "refuses its arguments", id="both"),
    ],
)
def test_what_cannot_be_built_says_why(name, params, message):
    assert message in refusal(name, params)


def test_all_problems_are_listed():
    found = optimizers.problems("adamw", {"a": 1, "lr": "x", "max_grad_norm": 1})

    assert [key for key, _ in found] == ["params.max_grad_norm", "params.a", "params.lr"]


def test_muon_is_given_the_names_of_parameters():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    named = [("hidden", weight), ("embed", torch.nn.Parameter(torch.ones(2, 2)))]

    optimizer = build("Muon", {"momentum": 0.9}, named)

    assert [group["params"] for group in optimizer.param_groups] == [[weight], [named[1][1]]]


def test_no_kernel_is_fused_where_gradients_may_be_sparse():
    choice = SimpleNamespace(type="sgd", params={"lr": 0.1})

    optimizer = optimizers.build(choice, [torch.nn.Parameter(torch.ones(2))], fuse=False)

    assert not optimizer.defaults["fused"]


def test_model_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="empty parameter list"):
        build("adamw", over=[])


@pytest.mark.parametrize("which", ["Adam", "NAdam", "Adagrad", "RMSprop"])
def test_where_an_optimizer_keeps_what_beside_its_parameters(which: str):
    # "meta" stands for an accelerator: counts of steps are on the CPU beside it.
    params = [torch.nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "meta")]
    optimizer = getattr(torch.optim, which)(params, lr=0.1)
    before = len(optimizer.state)
    for param in params:
        places = devices_of_state(optimizer, optimizer.param_groups[0], param)
        counts = {key: place for key, place in places.items() if key in ("step", "mu_product")}
        assert set(counts.values()) == {torch.device("cpu")}
        moments = {place for key, place in places.items() if key not in counts}
        assert moments == {param.device}
    assert len(optimizer.state) == before
