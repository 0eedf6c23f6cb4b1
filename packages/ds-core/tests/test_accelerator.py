"""The device of this process, whatever it is."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from ds_core import accelerator, plugins
from ds_core.accelerator import Accelerator
from ds_core.errors import DsError


@pytest.fixture
def without_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


def test_without_an_accelerator_it_is_the_cpu(without_accelerator):
    cpu = accelerator.current()
    assert (cpu.kind, cpu.device(), cpu.device_count()) == ("cpu", torch.device("cpu"), 1)
    cpu.synchronize()
    assert cpu.memory_allocated() == cpu.peak_memory() == 0


def test_the_cpu_computes_in_fp32():
    assert Accelerator("cpu").supports(torch.float32)
    assert Accelerator("cpu").computes_fast(torch.float32)
    assert not Accelerator("cpu").computes_fast(torch.float16)


def test_a_dtype_without_arithmetic_is_not_supported(monkeypatch):
    def refuse(*args):
        raise RuntimeError('"addmm_impl_cpu_" not implemented')

    monkeypatch.setattr(torch, "mm", refuse)
    assert not Accelerator("cpu").supports(torch.bfloat16)


def entry(monkeypatch, found):
    class Entry(importlib.metadata.EntryPoint):
        def load(self):
            return lambda: found

    made = Entry("ours", "ours:make", "ds_core.accelerators")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [made])


def test_a_package_may_bring_another_device(monkeypatch):
    ours = Accelerator("ours")
    entry(monkeypatch, ours)
    assert accelerator.current() is ours


def test_a_package_whose_device_is_absent_is_passed_over(monkeypatch, without_accelerator):
    entry(monkeypatch, None)
    assert accelerator.current().kind == "cpu"


def test_a_package_that_returns_something_else_is_an_error(monkeypatch):
    entry(monkeypatch, "cuda")
    with pytest.raises(DsError, match="accelerator 'ours' returned 'cuda', not an Accelerator"):
        accelerator.current()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_real_accelerator_counts_its_memory():
    device = accelerator.current()
    before = device.memory_allocated()
    held = torch.ones(1 << 20, device=device.device())
    device.synchronize()
    assert device.memory_allocated() - before >= held.nbytes
    assert device.supports(torch.float32)


def test_a_cpu_answers_for_what_it_has_not():
    cpu = Accelerator("cpu")
    cpu.reset_peak_memory()
    cpu.empty_cache()
    assert (cpu.free_memory(), cpu.stream(), cpu.event(timed=True)) == (None, None, None)
    assert (cpu.has_streams, cpu.visible_devices_variable, cpu.backend) == (False, None, "gloo")
    assert cpu.name() == "cpu:0"
    tensor = torch.ones(2)
    assert cpu.pin_memory(tensor) is tensor


def test_random_numbers_go_on_from_a_state():
    cpu = Accelerator("cpu")
    state = cpu.rng_state()
    first = torch.rand(3)
    cpu.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


class FakeModule:
    """What torch has for a kind of device, as `torch.cuda`."""

    state = torch.zeros(4, dtype=torch.uint8)

    @staticmethod
    def get_device_name(index):
        return f"Fake card {index}"

    @classmethod
    def get_rng_state(cls):
        return cls.state

    @classmethod
    def set_rng_state(cls, state):
        cls.state = state


class Fake(Accelerator):
    """A device of a package, which keeps its memory itself."""

    def device_count(self):
        return 2

    def memory_allocated(self):
        return 7


def make_fake():
    return Fake("fake")


def test_a_package_brings_a_device_by_its_entry_point(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_vendor", sys.modules[__name__])
    made = importlib.metadata.EntryPoint("fake", "a_vendor:make_fake", "ds_core.accelerators")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [made])
    monkeypatch.setattr(torch, "get_device_module", lambda kind: FakeModule)
    found = accelerator.current()
    assert (found.kind, found.device_count(), found.memory_allocated()) == ("fake", 2, 7)
    assert (found.name(1), found.has_streams) == ("Fake card 1", True)
    found.set_rng_state(torch.ones(4, dtype=torch.uint8))
    assert torch.equal(found.rng_state(), torch.ones(4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("kind", "variable", "backend"),
    [("cuda", "CUDA_VISIBLE_DEVICES", "nccl"), ("xpu", "ZE_AFFINITY_MASK", "xccl")],
)
def test_each_kind_has_its_variable_and_backend(kind, variable, backend):
    found = Accelerator(kind)
    assert (found.visible_devices_variable, found.backend) == (variable, backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_real_accelerator_has_streams_and_a_driver():
    device = accelerator.current()
    free, total = device.free_memory()
    assert 0 < free <= total
    event = device.event(timed=True)
    event.record(device.stream())
    event.synchronize()
    assert device.pin_memory(torch.ones(2)).is_pinned()
    state = device.rng_state()
    first = torch.rand(3, device=device.device())
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=device.device()), first)
    assert device.name()


def test_the_environment_asks_for_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert accelerator.current().kind == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert accelerator.current().kind == "cuda"


def test_a_kind_that_the_environment_asks_for_has_to_be_there(monkeypatch, without_accelerator):
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(DsError, match=r"DS_ACCELERATOR='xpu' in the environment, but .* 'cpu'"):
        accelerator.current()
