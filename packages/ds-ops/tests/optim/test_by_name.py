"""What a config's optimizer section builds when ds-ops is installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
import ds_ops
from ds_core import ops, optimizers, plugins
from ds_core.decisions import _optimizer as told
from ds_core.errors import ConfigError, OpError
from ds_core.ops import registry
from ds_core.planning.optimizer_state import OptimizerState
from ds_ops.implementations import Cpp

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries of this source tree, whatever was installed last."""
    groups = tomllib.loads(_PROJECT.read_text())["project"]["entry-points"]
    made = [
        EntryPoint(name, value, "ds_core.optimizers")
        for name, value in groups["ds_core.optimizers"].items()
    ]
    found = plugins.entry_points
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: made if group == "ds_core.optimizers" else found(group=group),
    )


def build(name: str, params: dict[str, Any] | None = None, over: Any = None, **options: Any) -> Any:
    given = [("layer.weight", nn.Parameter(torch.ones(3, 3)))] if over is None else over
    return optimizers.build(SimpleNamespace(type=name, params=params or {}), given, **options)


@pytest.mark.parametrize(
    ("name", "params", "cls"),
    [
        ("Adam", {}, ds_ops.FusedAdam),
        ("AdamW", {"lr": 0.1}, ds_ops.FusedAdam),
        ("adam", {"torch_adam": True}, torch.optim.AdamW),
        ("adam", {"fused": True}, torch.optim.AdamW),
        ("adamw", {"amsgrad": True}, torch.optim.AdamW),
        ("FusedAdam", {}, ds_ops.FusedAdam),
        ("DeepSpeedCPUAdam", {"adamw_mode": False}, ds_ops.CPUAdam),
        ("CPUAdam", {}, ds_ops.CPUAdam),
        ("Lion", {}, ds_ops.FusedLion),
        ("FusedLion", {}, ds_ops.FusedLion),
        ("DeepSpeedCPULion", {}, ds_ops.CPULion),
        ("Lamb", {}, ds_ops.FusedLamb),
        ("FusedLamb", {}, ds_ops.FusedLamb),
        ("Adagrad", {}, ds_ops.CPUAdagrad),
        ("DeepSpeedCPUAdagrad", {}, ds_ops.CPUAdagrad),
        ("Muon", {}, ds_ops.Muon),
        ("Adam8bit", {}, ds_ops.Adam8bit),
        ("FusedSGD", {"momentum": 0.9}, ds_ops.FusedSGD),
        ("SGD", {}, torch.optim.SGD),
    ],
)
def test_type_names_a_class(name: str, params: dict[str, Any], cls: type):
    assert type(build(name, params)) is cls


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "lamb", "adagrad"])
def test_hyperparameters_do_not_depend_on_what_is_installed(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    with_ops = build(name).param_groups[0]
    monkeypatch.setattr(plugins, "registered", lambda seam: {})
    without = build(name).param_groups[0]
    for key in ("lr", "betas", "eps", "weight_decay", "lr_decay", "max_coeff"):
        assert with_ops.get(key) == without.get(key), key


def test_switches_that_torchs_adam_has_not_are_honoured():
    group = build("adam", {"bias_correction": False, "fp32_optimizer_states": False}).param_groups[
        0
    ]
    assert group["bias_correction"] is False
    assert group["fp32_optimizer_states"] is False
    assert build("adam", {"adam_w_mode": False}).param_groups[0]["decoupled_weight_decay"] is False


def test_what_a_kernel_does_not_take_goes_to_torch():
    double = [nn.Parameter(torch.ones(2, dtype=torch.float64))]
    assert type(build("adam", over=double)) is torch.optim.AdamW
    assert type(build("adam", over=[{"params": double[0]}])) is torch.optim.AdamW
    assert type(build("adam", fuse=False)) is torch.optim.AdamW
    meta = [nn.Parameter(torch.ones(2, device="meta"))]
    assert type(build("adam", over=meta)) is torch.optim.AdamW
    with pytest.raises(
        ConfigError, match=r"they need FusedAdam, but a parameter is torch\.float64"
    ):
        build("adam", {"stochastic_rounding": True}, double)


def test_torchs_is_built_where_only_the_reference_could_run(monkeypatch: pytest.MonkeyPatch):
    why = {"cpp": "no compiler", "reference": None}
    monkeypatch.setattr(ops, "available", lambda name, device_type: why)
    assert type(build("adamw")) is torch.optim.AdamW
    assert type(build("FusedAdam")) is ds_ops.FusedAdam
    assert type(build("adamw", {"bias_correction": False})) is ds_ops.FusedAdam


def test_torchs_in_place_of_a_kernel_that_is_missing_is_told_or_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Cpp, "unavailable", lambda self, device_type: "no compiler at all")
    registry._selected.cache_clear()
    registry._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="slower than they could: cpp: no compiler at all"):
            assert type(build("adamw")) is torch.optim.AdamW
        monkeypatch.setenv("DS_OPS_FALLBACK", "error")
        with pytest.raises(OpError, match="no compiler at all; DS_OPS_FALLBACK=error"):
            build("adamw")
    finally:
        registry._selected.cache_clear()
        registry._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("adam", {"set_grad_none": False}, "set_grad_none: got false: gradients are views"),
        ("fusedadam", {"set_grad_none": False}, "set_grad_none: got false"),
        ("fusedadam", {"amsgrad": True}, "FusedAdam refuses its arguments"),
        ("adam", {"stochastic_rouding": True}, "did you mean stochastic_rounding?"),
        ("fusedlamb", {"max_grad_norm": 1.0}, "use the top-level gradient_clipping"),
        ("fusedadm", {}, "did you mean fusedadam?"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, params: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        build(name, params)
    assert message in str(caught.value)


def test_the_choice_is_logged_and_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="ds_core.optimizers"):
        optimizer = build("adamw")
    assert "optimizer adamw: FusedAdam of ds_ops (one pass over memory)" in caplog.text
    chosen = ops.select("adam_step_", "cpu").name
    assert told(optimizer).startswith(f"FusedAdam ({chosen} kernel, betas 0.9/0.999")


def test_defaults_are_shown_completed():
    shown = optimizers.effective_params("adam", {"lr": 0.5})
    assert (shown["lr"], shown["weight_decay"], shown["stochastic_rounding"]) == (0.5, 0.0, False)
    assert optimizers.effective_params("Adam8bit", {})["stochastic_rounding"] is True


def test_plans_know_what_an_optimizer_keeps():
    def per_element(name: str, **params: Any) -> float:
        state = OptimizerState(SimpleNamespace(type=name, params=params))
        return state.flat_bytes(2560, torch.float32) / 2560

    assert per_element("adam") == 8
    assert per_element("adam", fp32_optimizer_states=False) == 4
    assert per_element("lion") == 4
    assert per_element("Adam8bit") == 2 + 8 / 256


def losses(optimizer: str, params: dict[str, Any], bf16: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": optimizer, "params": {"lr": 0.01, **params}},
    }
    engine = ds_core.initialize(model, config)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(20):
        loss = (engine(x.bfloat16() if bf16 else x).float() - x[:, :1]).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_losses_of_the_engine_are_those_with_torchs(bf16: bool):
    ours, torchs = losses("adam", {}, bf16), losses("adam", {"fused": True}, bf16)
    assert ours == pytest.approx(torchs, rel=2e-2 if bf16 else 1e-4)
    assert ours[-1] < ours[0] / 2


def test_the_engine_writes_bf16_weights_in_the_pass_of_the_step(monkeypatch: pytest.MonkeyPatch):
    from ds_core.alone import Alone
    from ds_ops.optim import adam

    calls, scaled = [], []
    kernel = adam.adam_step_

    def counted(param: torch.Tensor, grad: torch.Tensor, *args: Any, **options: Any) -> None:
        calls.append((param.dtype, grad.dtype, options["copy"].dtype))
        scaled.append(options["grad_scale"] is not None)
        kernel(param, grad, *args, **options)

    def refused(self: Any) -> None:
        raise AssertionError("a second pass over the weights")

    monkeypatch.setattr(adam, "adam_step_", counted)
    monkeypatch.setattr(Alone, "_publish", refused)
    losses("adam", {}, bf16=True)
    low = torch.bfloat16
    assert set(calls) == {(torch.float32, low, low)}
    assert any(scaled)
    assert len(calls) == 20 * 4


def engine_of(optimizer: str, params: dict[str, Any]) -> ds_core.Engine:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": optimizer, "params": {"lr": 0.01, **params}},
    }
    return ds_core.initialize(nn.Linear(8, 8), config)


def stepped(engine: ds_core.Engine, seed: int) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    engine.backward((engine(x) - x).square().mean())
    engine.step()
    return engine.module.weight.detach().clone()


@pytest.mark.parametrize("name", ["Adam", "Lion", "Lamb", "Adagrad", "Muon"])
@pytest.mark.parametrize("first", ["with", "without"])
def test_checkpoints_do_not_depend_on_what_is_installed(
    name: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = plugins.registered

    def installed(*, ops: bool) -> None:
        shown = found if ops else lambda seam: {} if seam == "optimizers" else found(seam)
        monkeypatch.setattr(plugins, "registered", shown)

    installed(ops=first == "with")
    engine = engine_of(name, {})
    stepped(engine, 0)
    engine.save_checkpoint(tmp_path)
    expected = stepped(engine, 1)
    installed(ops=first != "with")
    other = engine_of(name, {})
    other.load_checkpoint(tmp_path)
    assert torch.allclose(stepped(other, 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("narrow_first", [False, True])
def test_a_checkpoint_goes_on_with_states_in_another_format(narrow_first: bool, tmp_path: Path):
    engine = engine_of("Adam", {"fp32_optimizer_states": not narrow_first})
    stepped(engine, 0)
    engine.save_checkpoint(tmp_path)
    expected = stepped(engine, 1)
    other = engine_of("Adam", {"fp32_optimizer_states": narrow_first})
    other.load_checkpoint(tmp_path)
    assert torch.allclose(stepped(other, 1), expected, atol=1e-3)
    assert other.sharding.param_groups[0]["fp32_optimizer_states"] is narrow_first
