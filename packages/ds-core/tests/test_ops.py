"""Who computes an op: the choice, and the errors when it cannot be honoured."""

from __future__ import annotations

import logging

import pytest
import torch

from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops import registry


class Doubling:
    """An implementation that is wrong on purpose, so that a test sees who computed."""

    op = "rms_norm"

    def __init__(self, name="doubling", reason=None):
        self.name, self.reason = name, reason

    def unavailable(self, device, dtype):
        return self.reason

    def __call__(self, x, weight, eps=1e-6):
        return 2 * x


@pytest.fixture
def installed(monkeypatch):
    """Installs implementations for one test."""

    def install(*implementations):
        monkeypatch.setattr(registry, "_implementations", lambda: implementations)
        registry.select.cache_clear()

    yield install
    registry.select.cache_clear()


X, WEIGHT = torch.tensor([[3.0, 4.0]]), torch.ones(2)


def test_the_reference_computes_where_nothing_is_installed(installed, caplog):
    installed()
    with caplog.at_level(logging.INFO, "ds_core"):
        y = ops.run("rms_norm", X, WEIGHT, eps=0.0)
        ops.run("rms_norm", X, WEIGHT)
    assert torch.allclose(y, X / (12.5**0.5))
    assert caplog.text.count("op rms_norm on cpu, torch.float32: reference") == 1


def test_an_installed_implementation_comes_first(installed):
    installed(Doubling())
    assert torch.equal(ops.run("rms_norm", X, WEIGHT), 2 * X)
    reference = ops.run("rms_norm", X, WEIGHT, impl="reference")
    assert not torch.equal(reference, 2 * X)


def test_one_that_cannot_run_is_passed_over(installed):
    installed(Doubling("broken", "no compiler"), Doubling("next"))
    assert ops.available("rms_norm", X.device, X.dtype) == {
        "broken": "no compiler",
        "next": None,
        "reference": None,
    }
    assert torch.equal(ops.run("rms_norm", X, WEIGHT), 2 * X)


@pytest.mark.parametrize(
    ("name", "impl", "message"),
    [
        ("rms_nrom", None, "there is no op 'rms_nrom'; there are .*rms_norm"),
        ("rms_norm", "cuda", "no implementation 'cuda'; there are broken, reference"),
        ("rms_norm", "broken", "'broken' cannot run on cpu: no compiler"),
    ],
    ids=["op", "implementation", "unavailable"],
)
def test_what_is_asked_for_by_name_runs_or_is_an_error(installed, name, impl, message):
    installed(Doubling("broken", "no compiler"))
    with pytest.raises(OpError, match=message):
        ops.run(name, X, WEIGHT, impl=impl)


def test_the_catalog_holds_every_op_under_its_own_name():
    assert "rms_norm" in ops.catalog()
    assert all(op.name == name for name, op in ops.catalog().items())


def test_rms_norm_computes_in_fp32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its squares overflow fp16
    y = ops.run("rms_norm", x, torch.ones(4096, dtype=torch.float16), impl="reference")
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), torch.ones(1, 4096), atol=1e-3)
