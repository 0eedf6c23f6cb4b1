"""The device of this process, whatever it is."""

from __future__ import annotations

import importlib.metadata

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
