"""Names of ZeRO and of optimizers: signatures, arithmetic, estimates, and what is not provided."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed
import ds_ops.optim
from deepspeed._errors import NotProvidedError
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime.zero import TiledLinear, TiledLinearReturnBias
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.stage3 import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from deepspeed.runtime.zero.stage_1_and_2 import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)
from deepspeed.runtime.zero.tiling import split_tensor_along_last_dim

PLAIN = {
    "cpu-adamw": (
        lambda p: DeepSpeedCPUAdam(p, lr=0.1, weight_decay=0.1, adamw_mode=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ),
    "cpu-adam": (
        lambda p: DeepSpeedCPUAdam(p, 0.1, True, (0.8, 0.9), 1e-6, 0.1, False, False),
        lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.9), 1e-6, 0.1),
    ),
    "fused-adam": (
        lambda p: FusedAdam(p, 0.1, adam_w_mode=False, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    ),
    "cpu-adagrad": (
        lambda p: DeepSpeedCPUAdagrad(p, 0.1, 1e-10, 0.1),
        lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_optimizers_step_as_torchs(name: str):
    params = [nn.Parameter(torch.arange(1.0, 6.0)) for _ in range(2)]
    for param, make in zip(params, PLAIN[name], strict=True):
        optimizer = make([{"params": [param]}])
        for step in range(3):
            param.grad = torch.sin(torch.arange(5.0) + step)
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)


def test_lion_and_lamb_are_those_of_ds_ops():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, -1.0, 2.0])
    DeepSpeedCPULion([param], 0.5, (0.9, 0.99), 0.0).step()
    assert param.tolist() == [0.5, 1.5, 0.5]
    assert issubclass(DeepSpeedCPULion, ds_ops.optim.CPULion)
    assert FusedLion is ds_ops.optim.FusedLion
    assert FusedLamb is ds_ops.optim.FusedLamb
    assert deepspeed.ops.adam.DeepSpeedCPUAdam is DeepSpeedCPUAdam


def test_host_optimizers_take_parameters_that_are_elsewhere_for_now():
    elsewhere = nn.Parameter(torch.empty(3, device="meta"))
    for cls in (DeepSpeedCPUAdam, DeepSpeedCPULion, DeepSpeedCPUAdagrad):
        assert cls([elsewhere]).param_groups[0]["params"][0] is elsewhere


def test_tiles_take_arguments_by_position():
    whole = nn.Linear(6, 4)
    tiled = TiledLinear(6, 4, True, 2, 3, False, True, nn.Linear, whole)
    x = torch.randn(2, 6)
    torch.testing.assert_close(tiled(x), whole(x))
    assert TiledLinearReturnBias(6, 4, True, 2, 2).in_sizes == [3, 3]
    parts = split_tensor_along_last_dim(x, [2, 4], True)
    assert [part.shape[-1] for part in parts] == [2, 4]
    assert all(part.is_contiguous() for part in parts)


def test_enumerations_and_sections():
    assert ZeroStageEnum.weights == 3
    assert OffloadDeviceEnum.cpu == "cpu"
    assert {each.value for each in OffloadStateTypeEnum} == {
        *("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")
    }
    assert DeepSpeedZeroConfig(stage=2).stage == 2


# ---------------------------------------------------------------------- estimates


def test_estimates_are_the_formulas():
    numel, largest = 1_000_000, 100_000
    assert estimate_zero2_model_states_mem_needs(numel, 4, 2, cpu_offload=False) == (
        int(4 * numel * 4 * 1.5),
        2 * numel + 14 * numel // 8,
    )
    host, device = estimate_zero2_model_states_mem_needs(numel, 4, 1, True, 1.0)
    assert (host, device) == (16 * numel, 2 * numel)
    assert estimate_zero3_model_states_mem_needs(numel, largest, 4, 1, False, False) == (
        int(4 * largest * 4 * 1.5),
        16 * numel // 4 + 8 * largest,
        8 * largest,
    )
    host, device, _ = estimate_zero3_model_states_mem_needs(numel, largest, 2, 2, True, True)
    assert (host, device) == (int(16 * numel / 2 * 1.5), 8 * largest)


def test_estimates_are_written_as_tables(capsys):
    model = nn.Sequential(nn.Linear(1000, 2000), nn.Linear(2000, 1000))
    estimate_zero3_model_states_mem_needs_all_live(model, 8, 1)
    live = capsys.readouterr().out
    assert "HW: Setup with 1 node, 8 GPUs per node." in live
    assert "SW: Model with 4M total params, 2M largest layer params." in live
    assert live.count("GB |") == 12
    assert "offload_param=cpu , offload_optimizer=cpu , zero_init=1" in live
    estimate_zero3_model_states_mem_needs_all_cold(4_003_000, 2_002_000, 8, 1)
    assert capsys.readouterr().out == live
    estimate_zero2_model_states_mem_needs_all_live(model)
    live = capsys.readouterr().out
    assert "1 node, 1 GPU per node" in live
    estimate_zero2_model_states_mem_needs_all_cold(4_003_000)
    assert capsys.readouterr().out == live


# ---------------------------------------------------------------------- not provided


@pytest.mark.parametrize(
    ("use", "instead"),
    [
        (lambda: MuonWithAuxAdam([]), r"use ds_ops\.optim\.Muon"),
        (lambda: deepspeed.zero.MiCS_Init(), "use Init with data_parallel_group"),
        (lambda: deepspeed.ops.adam.ZenFlowCPUAdam([]), 'set "zenflow"'),
        (lambda: deepspeed.ops.transformer.DeepSpeedTransformerInference(), "ds-inference"),
    ],
    ids=["muon", "mics", "zenflow", "transformer"],
)
def test_what_is_not_provided_says_what_to_use(use, instead: str):
    with pytest.raises(NotProvidedError, match=instead):
        use()
