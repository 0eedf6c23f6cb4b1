"""`deepspeed.checkpointing`: gradients of a plain call, settings, and random states."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import checkpointing
from deepspeed._errors import NotProvidedError
from ds_core.errors import ConfigError, DsError
from ds_core.testing import run_ranks


@pytest.fixture(autouse=True)
def unconfigured():
    yield
    checkpointing.configure(None)
    checkpointing._state.is_configured = False
    checkpointing._state.mpu = None


def gradients(call, dropout=0.5):
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 4))
    x = torch.randn(3, 4, requires_grad=True)
    call(layer, x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def plain(layer, x):
    return layer(x)


def test_gradients_are_those_of_a_plain_call():
    expected = gradients(plain)
    for call in (checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint):
        assert all(map(torch.equal, gradients(call), expected))


def test_configure_as_lightning_does_it():
    assert not checkpointing.is_configured()
    deepspeed.checkpointing.configure(
        mpu_=None,
        partition_activations=False,
        contiguous_checkpointing=False,
        checkpoint_in_cpu=True,
        profile=False,
    )
    assert checkpointing.is_configured()
    assert all(map(torch.equal, gradients(checkpointing.checkpoint), gradients(plain)))
    checkpointing.reset()
    assert all(map(torch.equal, gradients(checkpointing.checkpoint), gradients(plain)))


def test_a_config_says_what_arguments_do_not(tmp_path):
    section = {"cpu_checkpointing": True, "number_checkpoints": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"activation_checkpointing": section}))
    for config in (str(path), {"activation_checkpointing": section}):
        checkpointing.configure(None, deepspeed_config=config, synchronize=True)
        assert checkpointing._state.offloads
        assert checkpointing._state.policy.synchronize
        checkpointing.configure(None, deepspeed_config=config, checkpoint_in_cpu=False)
        assert not checkpointing._state.offloads


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="without partition_activations"):
        checkpointing.configure(None, contiguous_checkpointing=True)
    with pytest.raises(ConfigError, match="unknown key 'cpu'"):
        checkpointing.configure(None, {"activation_checkpointing": {"cpu": True}})


def test_what_makes_no_difference_is_told(monkeypatch, caplog):
    monkeypatch.setattr(deepspeed.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        checkpointing.configure(None, partition_activations=True, profile=True)
    assert "profile makes no difference" in caplog.text
    assert "partition_activations makes no difference" in caplog.text


class Mpu:
    def __init__(self):
        self.group = deepspeed.comm.get_world_group()

    def get_model_parallel_group(self):
        return self.group

    def get_model_parallel_rank(self):
        return deepspeed.comm.get_rank(self.group)


def partitioned():
    checkpointing.configure(Mpu(), partition_activations=True, contiguous_checkpointing=True)
    assert all(map(torch.equal, gradients(checkpointing.checkpoint), gradients(plain)))
    checkpointing.model_parallel_cuda_manual_seed(5)
    alike = torch.rand(3)
    with checkpointing.get_cuda_rng_tracker().fork():
        apart = torch.rand(3)
    checkpointing.model_parallel_reconfigure_tp_seed(5)
    with checkpointing.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(3), apart)
    return alike.tolist(), apart.tolist()


def test_activations_are_split_and_seeds_differ_over_the_model_parallel_group():
    (alike, first), (same, second) = run_ranks(2, partitioned)
    assert alike == same
    assert first != second


def test_named_random_states():
    tracker = checkpointing.CudaRNGStatesTracker()
    tracker.add("a", 1)
    with pytest.raises(DsError, match="has seed 1 too"):
        tracker.add("b", 1)
    states = tracker.get_states()
    with tracker.fork("a"):
        first = torch.rand(2)
    tracker.set_states(states)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(2), first)
    tracker.reset()
    with pytest.raises(DsError, match="no state is called 'a'"), tracker.fork("a"):
        pass


def test_inner_parts_say_what_to_use():
    with pytest.raises(NotProvidedError, match="Policy"):
        checkpointing.CheckpointFunction.apply(print)
