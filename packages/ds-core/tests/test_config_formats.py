"""Which number formats a config asks for."""

from __future__ import annotations

import pytest

from ds_core import config, plugins
from ds_core.config import NumberFormats
from ds_core.errors import ConfigError


def load(extra: dict) -> config.Config:
    return config.load({"train_batch_size": 1, **extra}, sections={})


def formats(extra: dict, *, fast: str = "") -> NumberFormats:
    loaded = load(extra)
    return loaded.resolve_precision(bf16_is_fast="bf16" in fast, fp16_is_fast="fp16" in fast)


AUTO = {"enabled": "auto"}
ON = {"enabled": True}


def test_nothing_enabled_leaves_the_model_as_it_is():
    assert formats({}, fast="bf16 fp16") == NumberFormats()


def test_bf16_keeps_an_fp32_master_and_no_loss_scale():
    assert formats({"bf16": ON}) == NumberFormats(compute="bf16", master="fp32")


def test_fp16_scales_the_loss_as_its_section_says():
    resolved = formats({"fp16": {**ON, "initial_scale_power": 8, "loss_scale_window": 50}})

    assert (resolved.compute, resolved.master) == ("fp16", "fp32")
    assert resolved.loss_scale.static is None
    assert (resolved.loss_scale.initial, resolved.loss_scale.window) == (256.0, 50)


def test_constant_loss_scale():
    assert formats({"fp16": {**ON, "loss_scale": 128}}).loss_scale.static == 128.0


@pytest.mark.parametrize(
    ("extra", "fast", "compute", "reason"),
    [
        pytest.param({"bf16": AUTO}, "bf16", "bf16", "bf16 is on", id="fast"),
        pytest.param({"bf16": AUTO}, "", None, "bf16 is off", id="slow"),
        pytest.param({"bf16": AUTO, "fp16": AUTO}, "bf16 fp16", "bf16", "bf16 is on", id="both"),
        pytest.param({"bf16": AUTO, "fp16": AUTO}, "fp16", "fp16", "bf16 is off", id="fp16-left"),
        pytest.param({"bf16": AUTO, "fp16": ON}, "bf16", "fp16", "", id="explicit-fp16-wins"),
        pytest.param({"bf16": ON, "fp16": AUTO}, "fp16", "bf16", "", id="explicit-bf16-wins"),
    ],
)
def test_auto_is_decided_by_the_device(extra, fast, compute, reason):
    resolved = formats(extra, fast=fast)

    assert resolved.compute == compute
    assert reason in resolved.reason
    assert bool(resolved.reason) == bool(reason)


@pytest.mark.parametrize(
    ("grad", "fast", "expected"),
    [
        pytest.param("fp32", "bf16", "fp32", id="fp32"),
        pytest.param("torch.bfloat16", "bf16", "bf16", id="same-as-compute"),
        pytest.param("bf16", "", None, id="auto-off-does-not-round"),
    ],
)
def test_gradient_accumulation_format(grad, fast, expected):
    extra = {"bf16": AUTO, "data_types": {"grad_accum_dtype": grad}}

    assert formats(extra, fast=fast).grad == expected


def test_autocast_keeps_the_parameters():
    assert formats({"torch_autocast": ON}) == NumberFormats(autocast="bf16")
    half = formats({"torch_autocast": {**ON, "dtype": "torch.float16"}})
    assert (half.autocast, half.compute) == ("fp16", None)
    assert half.loss_scale.initial == 65536.0


def test_autocast_wins_over_auto():
    assert formats({"torch_autocast": ON, "bf16": AUTO}, fast="bf16").compute is None


@pytest.mark.parametrize(
    ("extra", "fragment"),
    [
        pytest.param({"bf16": ON, "fp16": ON}, "fp16.enabled: got true, but bf16", id="two-halves"),
        pytest.param(
            {"torch_autocast": ON, "bf16": ON}, "torch_autocast.enabled: got true", id="autocast"
        ),
        pytest.param(
            {"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype: got", id="rounding"
        ),
        pytest.param(
            {"fp16": {**ON, "fp16_master_weights_and_grads": True}},
            "use bf16 and its bf16_master_weights_and_grads",
            id="fp16-master",
        ),
        pytest.param(
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads: got true, but the parameters are not bf16",
            id="no-master",
        ),
        pytest.param(
            {"torch_autocast": ON, "bf16": {**AUTO, "bf16_optimizer_states": True}},
            "bf16.bf16_optimizer_states: got true, but the parameters are not bf16",
            id="low-states",
        ),
        pytest.param({"data_types": {"param_dtype": "bf16"}}, '"bf16" or "fp16"', id="param-dtype"),
    ],
)
def test_formats_that_no_device_can_honour_are_refused(extra, fragment):
    with pytest.raises(ConfigError) as caught:
        load(extra)

    assert fragment in str(caught.value)


def test_without_master_copy_gradients_are_bf16_too():
    low = {**ON, "bf16_master_weights_and_grads": True}
    resolved = formats({"bf16": low})

    assert (resolved.compute, resolved.master, resolved.grad) == ("bf16", None, "bf16")
    accumulated = {"bf16": low, "data_types": {"grad_accum_dtype": "fp32"}}
    assert formats(accumulated).grad == "fp32"


def test_no_master_copy_is_asked_of_bf16_only_where_it_is_on():
    low = {**AUTO, "bf16_master_weights_and_grads": True}

    assert formats({"bf16": low}, fast="bf16").master is None
    assert formats({"bf16": low, "fp16": AUTO}, fast="fp16").master == "fp32"


@pytest.mark.parametrize(
    ("section", "fragment"),
    [
        pytest.param(
            {"bf16_master_weights_and_grads": True},
            "AdamW here rounds to nearest; pip install ds-ops, or set bf16.stochastic_rounding to "
            "false",
            id="rounding",
        ),
        pytest.param(
            {"bf16_optimizer_states": True},
            "the states of AdamW here are fp32; pip install ds-ops, or remove the key",
            id="states",
        ),
    ],
)
def test_low_precision_without_ds_ops_says_to_install_it(monkeypatch, section, fragment):
    found = plugins.entry_points
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: () if group == "ds_core.optimizers" else found(group=group),
    )
    with pytest.raises(ConfigError) as caught:
        load({"bf16": {**ON, **section}, "optimizer": {"type": "AdamW"}})
    assert fragment in str(caught.value)

    nearest = {**ON, "bf16_master_weights_and_grads": True, "stochastic_rounding": False}
    loaded = load({"bf16": nearest, "optimizer": {"type": "AdamW"}})
    assert loaded.optimizer.params == {}
