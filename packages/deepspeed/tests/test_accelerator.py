"""`get_accelerator()` on a CPU, by every method that programs call."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed._errors import NotProvidedError
from deepspeed.accelerator import DeepSpeedAccelerator, get_accelerator, set_accelerator
from deepspeed.accelerator.real_accelerator import _chosen
from ds_core.accelerator import Accelerator


@pytest.fixture
def cpu(monkeypatch):
    found = DeepSpeedAccelerator(Accelerator("cpu"))
    monkeypatch.setattr("deepspeed.accelerator.real_accelerator._chosen", [found])
    return get_accelerator()


def test_there_is_one_for_all_callers():
    assert get_accelerator() is deepspeed.get_accelerator()
    assert deepspeed.accelerator.get_accelerator() is get_accelerator()


def test_another_can_be_set():
    other = DeepSpeedAccelerator(Accelerator("cpu"))
    set_accelerator(other)
    try:
        assert get_accelerator() is other
    finally:
        _chosen.clear()


def test_what_a_cpu_is(cpu):
    assert cpu.is_available()
    assert (cpu.device_name(), cpu.device_name(0), cpu.current_device_name()) == ("cpu",) * 3
    assert (cpu.current_device(), cpu.device_count()) == (0, 1)
    assert cpu.communication_backend_name() == "gloo"
    assert cpu.is_synchronized_device()
    assert cpu.use_host_timers()
    assert cpu.resolves_data_dependency()
    assert cpu.handles_memory_backpressure()
    assert cpu.on_accelerator(torch.ones(1))
    assert torch.float32 in cpu.supported_dtypes()
    assert cpu.is_bf16_supported() == (torch.bfloat16 in cpu.supported_dtypes())
    assert not cpu.is_triton_supported()
    assert cpu.Stream is cpu.Event is cpu.current_stream() is cpu.default_stream() is None


def test_what_makes_no_difference_on_a_cpu(cpu):
    cpu.set_device(0)
    cpu.synchronize()
    cpu.empty_cache()
    cpu.reset_peak_memory_stats()
    cpu.range_push("a")
    cpu.range_pop()
    with cpu.device(0), cpu.stream(None), cpu.capture_to_graph(cpu.create_graph()):
        assert cpu.lazy_call(lambda: 3) == 3
    assert cpu.memory_allocated() == cpu.max_memory_allocated() == cpu.memory_cached() == 0
    assert cpu.memory_stats() == {}
    assert 0 < cpu.available_memory() <= cpu.total_memory()
    tensor = torch.ones(2)
    assert cpu.pin_memory(tensor) is tensor
    assert not cpu.is_pinned(tensor)


def test_random_numbers(cpu):
    cpu.manual_seed(3)
    state = cpu.get_rng_state()
    first = torch.rand(2)
    cpu.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)
    cpu.manual_seed_all(3)
    assert cpu.initial_seed() == 3
    assert cpu.default_generator(0) is torch.default_generator


def test_environment_of_other_processes(cpu):
    environment = {}
    cpu.set_visible_devices_envs(environment, [0, 2])
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,2"}
    assert cpu.get_compile_backend() == "inductor"


def test_op_builders_say_what_to_use(cpu):
    with pytest.raises(NotProvidedError, match="ds ops report"):
        cpu.create_op_builder("CPUAdamBuilder")
    builder = cpu.get_op_builder("CPUAdamBuilder")
    with pytest.raises(NotProvidedError, match="ds ops report"):
        builder().load()
