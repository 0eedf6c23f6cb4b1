"""Who computes an op: the choice, and the errors when it cannot be honoured."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from ds_core import ops
from ds_core.cli import ops_report
from ds_core.errors import OpError
from ds_core.ops import library, registry
from ds_core.seams import Implementation


class Fake:
    """An implementation that is wrong on purpose, so that a test sees who computed.

    What is bound stays bound: a test that calls one gives it a name of its own.
    """

    op = "rms_norm"

    def __init__(self, name, reason=None, priority=10, devices=(), factor=2.0, refuses=None):
        self.name, self.reason, self.priority, self.devices = name, reason, priority, devices
        self.factor, self.bound, self.refuses = factor, [], refuses

    def unavailable(self, device_type):
        return self.reason

    def state(self, device_type):
        return "python"

    def partly(self):
        return self.refuses

    def traced(self):
        return None

    def bind(self, namespace, device_type):
        self.bound.append((namespace, device_type))
        library.bind_python(self.op, namespace, device_type, self._kernel)

    def _kernel(self, x, *others):
        _, *rest = ops.get(self.op).reference(x, *others)
        return self.factor * x, *rest


@pytest.fixture
def installed(monkeypatch):
    """Installs implementations for one test."""

    def install(*implementations):
        monkeypatch.setattr(registry, "_installed", lambda: implementations)
        for function in (registry._selected, registry._warn_once):
            function.cache_clear()

    yield install
    for function in (registry._selected, registry._warn_once):
        function.cache_clear()


X, WEIGHT = torch.tensor([[3.0, 4.0]]), torch.ones(2)


def call(**named):
    return ops.run("rms_norm", X, WEIGHT, 0.0, **named)[0]


def chosen(device_type="cpu"):
    return ops.choose("rms_norm", device_type).implementation.name


def test_the_reference_computes_where_nothing_is_installed(installed, caplog):
    installed()
    with caplog.at_level(logging.INFO, "ds_core"):
        assert ops.select("rms_norm", "cpu").name == "reference"
        ops.select("rms_norm", "cpu")
    assert caplog.text.count("op rms_norm on cpu: reference") == 1
    assert torch.allclose(call(impl="reference"), X / (12.5**0.5))


def test_the_highest_priority_that_can_run_is_chosen(installed):
    installed(Fake("low", priority=5), Fake("high", priority=50), Fake("off", "broken", 100))
    assert chosen() == "high"
    assert list(ops.available("rms_norm", "cpu").items()) == [
        ("off", "broken"),
        ("high", None),
        ("low", None),
        ("reference", None),
    ]


def small(x, *others):
    """Why a call is not taken: rows of more than two elements."""
    return None if x.shape[-1] <= 2 else f"x: rows of {x.shape[-1]}, up to 2 are taken"


@pytest.fixture
def shared(installed, monkeypatch):
    """A "fast" that takes small rows only, and a "wide" that takes all."""
    # Bound once in a process: a namespace of this test's own.
    monkeypatch.setattr(library, "NAMESPACE", "ds_ops_sharing")
    fast = Fake("fast", priority=50, factor=2.0, refuses=small)
    wide = Fake("wide", priority=10, factor=3.0)
    installed(fast, wide, Fake("last", priority=1))
    return fast


def test_calls_that_one_does_not_take_go_to_the_next(shared):
    choice = ops.choose("rms_norm", "cpu")
    assert choice.implementation.name == "fast"
    assert [impl.name for impl in choice.rest] == ["wide"]
    x = torch.randn(2, 3, requires_grad=True)
    found = ops.run("rms_norm", x, torch.ones(3), 0.0)[0]
    assert torch.equal(found, 3 * x)
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(call(), 2 * X)


def test_one_that_is_named_refuses_what_it_does_not_take(shared):
    with pytest.raises(OpError, match=r"'rms_norm' does not take .* by fast: x: rows of 3, up to"):
        ops.run("rms_norm", torch.ones(1, 3), torch.ones(3), 0.0, impl="fast")


def test_the_report_names_all_that_share_an_op(shared):
    row = next(row for row in ops_report.op_rows() if row.op == "rms_norm")
    assert (row.implementation, row.rest, row.others) == ("fast", ("wide",), ("last", "reference"))


@pytest.mark.filterwarnings("error")
def test_one_that_is_meant_for_other_devices_is_not_missed(installed, monkeypatch):
    installed(Fake("of_cpu", "no compiler", devices=("cpu",)))
    monkeypatch.setenv("DS_OPS_FALLBACK", "error")
    assert ops.select("rms_norm", "cuda").name == "reference"
    assert ops.available("rms_norm", "cuda")["of_cpu"] == "for cpu only"
    with pytest.raises(OpError, match="'of_cpu' cannot run on cuda: for cpu only"):
        ops.choose("rms_norm", "cuda", "of_cpu")


def test_one_that_cannot_run_is_passed_over_with_one_warning(installed, recwarn):
    installed(Fake("missing", "no compiler"))
    for _ in range(2):
        registry._selected.cache_clear()  # as if for another op
        assert ops.select("rms_norm", "cpu").name == "reference"
    (warning,) = recwarn
    assert warning.category is RuntimeWarning
    assert "ops on cpu run slower than they could: missing: no compiler" in str(warning.message)


def test_passing_one_over_can_be_forbidden(installed, monkeypatch):
    installed(Fake("missing", "no compiler; install one"))
    monkeypatch.setenv("DS_OPS_FALLBACK", "error")
    with pytest.raises(OpError, match="missing: no compiler; install one; DS_OPS_FALLBACK=error"):
        ops.select("rms_norm", "cpu")
    monkeypatch.setenv("DS_OPS_IMPL", "rms_norm=reference")
    assert ops.select("rms_norm", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("name", "impl", "message"),
    [
        ("rms_nrom", None, "there is no op 'rms_nrom'; did you mean rms_norm\\?"),
        ("xyz", None, "there is no op 'xyz'; there are .*rms_norm"),
        ("rms_norm", "cuda", "no implementation 'cuda'; there are broken, reference"),
        ("rms_norm", "broken", "'broken' cannot run on cpu: no compiler"),
    ],
    ids=["op", "op that nothing is near", "implementation", "unavailable"],
)
def test_what_is_asked_for_by_name_runs_or_is_an_error(installed, name, impl, message):
    installed(Fake("broken", "no compiler"))
    with pytest.raises(OpError, match=message):
        ops.run(name, X, WEIGHT, 0.0, impl=impl)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DS_OPS_IMPL", "rms_norm", "expected OP=IMPLEMENTATION pairs"),
        ("DS_OPS_IMPL", "rms_norm=none", "no implementation 'none'"),
        (
            "DS_OPS_IMPL",
            "rms_nrom=reference",
            "DS_OPS_IMPL: there is no op 'rms_nrom'; did you mean",
        ),
        ("DS_OPS_FALLBACK", "silently", "expected warn or error"),
    ],
)
def test_wrong_variables_are_refused(installed, monkeypatch, variable, value, message):
    installed(Fake("missing", "no compiler"))
    monkeypatch.setenv(variable, value)
    with pytest.raises(OpError, match=message):
        ops.choose("rms_norm", "cpu")


def test_the_environment_names_implementations(installed, monkeypatch):
    installed(Fake("low", priority=5), Fake("high", priority=50))
    monkeypatch.setenv("DS_OPS_IMPL", "rms_norm=low, *=reference")
    assert chosen() == "low"
    monkeypatch.setenv("DS_OPS_IMPL", "*=reference")
    assert chosen() == "reference"


def test_one_is_bound_at_its_first_call_and_only_then(installed):
    doubling = Fake("doubling")
    installed(doubling)
    assert doubling.bound == []
    assert torch.equal(call(impl="doubling"), 2 * X)
    assert torch.equal(call(impl="doubling"), 2 * X)
    assert doubling.bound == [("ds_ops_doubling", "cpu")]


def test_a_block_can_name_implementations(installed):
    installed(Fake("tripling", factor=3.0))
    with ops.use(rms_norm="tripling"):
        assert torch.equal(call(), 3 * X)
    assert not torch.equal(call(impl="reference"), 3 * X)
    with (
        pytest.raises(OpError, match="no implementation 'none'; there are tripling, reference"),
        ops.use(rms_norm="none"),
    ):
        pass


def test_many_threads_bind_once(installed):
    counted = Fake("counted")
    installed(counted)
    start = threading.Barrier(8)
    found = []

    def first_call():
        start.wait()
        found.append(call(impl="counted"))

    threads = [threading.Thread(target=first_call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(y, 2 * X) for y in found)
    assert len(counted.bound) == 1


def test_an_op_whose_binding_failed_can_be_bound_later(installed, monkeypatch):
    flaky = Fake("flaky")
    installed(flaky)
    with monkeypatch.context() as patch:
        patch.setattr(flaky, "bind", lambda *args: (_ for _ in ()).throw(OpError("not now")))
        with pytest.raises(OpError, match="not now"):
            call(impl="flaky")
    assert torch.equal(call(impl="flaky"), 2 * X)


def test_a_gradient_that_an_implementation_lacks_is_computed_by_another(installed):
    installed(Fake("forward_only", factor=1.0))
    x = X.clone().requires_grad_()
    ops.run("rms_norm", x, WEIGHT, 1.0, impl="forward_only")[0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_every_implementation_satisfies_the_protocol(installed):
    installed(Fake("any"))
    assert all(isinstance(impl, Implementation) for impl in ops.implementations("rms_norm"))


def test_the_catalog_holds_every_op_under_its_own_name():
    assert "rms_norm" in ops.catalog()
    assert all(op.name == name for name, op in ops.catalog().items())


def test_rms_norm_computes_in_fp32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its squares overflow fp16
    weight = torch.ones(4096, dtype=torch.float16)
    y = ops.run("rms_norm", x, weight, 1e-6, impl="reference")[0]
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), torch.ones(1, 4096), atol=1e-3)
