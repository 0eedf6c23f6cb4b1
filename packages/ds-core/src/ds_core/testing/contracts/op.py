"""What every implementation of an `Op` must do: compute what the reference computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from ds_core import ops
from ds_core.seams import Implementation, Op
from ds_core.testing.faults import poisoned_empty


class OpContract:
    """Inherit to test the implementations of one op, forward and backward.

    Attributes:
        op: name of the op in `ds_core.ops.catalog()`.
        implementations: callable that returns those to test; default: none but the reference,
            which is always tested (against itself in fp32).
        devices: on which to test.
        differentiable: whether gradients are compared too.

    An implementation that says it is unavailable for a device and dtype is skipped there, with
    its reason.
    """

    op: str
    implementations: Callable[[], Iterable[Implementation]]
    devices: tuple[str, ...] = ("cpu",)
    differentiable: bool = True

    def test_the_op_states_its_contract(self) -> None:
        op = self._op()
        assert op.reference.__doc__, f"{op.name}: the reference's docstring is the contract"
        assert op.tolerance, f"{op.name}: no dtype is covered"
        for dtype in op.tolerance:
            assert op.cases(torch.device("cpu"), dtype), f"{op.name}: no case for {dtype}"

    def test_implementations_satisfy_the_protocol(self) -> None:
        for impl in self._given():
            assert isinstance(impl, Implementation)
            assert impl.op == self._op().name
        names = [impl.name for impl in self._given()]
        assert len(set(names)) == len(names), f"names clash: {names}"

    def test_forward_equals_the_reference(self) -> None:
        for where, compute, args, tolerance in self._cells():
            with poisoned_empty():
                got = compute(*args)
            _compare(where, got, self._truth(args), tolerance)

    def test_inputs_stay_as_they_were(self) -> None:
        for where, compute, args, _ in self._cells():
            before = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
            compute(*args)
            for arg, old in zip(args, before, strict=True):
                assert not torch.is_tensor(arg) or torch.equal(arg, old), where

    def test_results_have_the_dtype_and_device_of_the_reference(self) -> None:
        for where, compute, args, _ in self._cells():
            expected = _tensors(self._op().reference(*args))
            for got, want in zip(_tensors(compute(*args)), expected, strict=True):
                assert (got.dtype, got.device) == (want.dtype, want.device), where
                assert got.shape == want.shape, where

    def test_gradients_equal_the_reference(self) -> None:
        if not self.differentiable:
            pytest.skip(f"{self._op().name} has no gradient")
        for where, compute, args, tolerance in self._cells():
            with poisoned_empty():
                got = _gradients(compute, args)
            wide = [arg.float() if _is_float(arg) else arg for arg in args]
            for mine, truth in zip(got, _gradients(self._op().reference, wide), strict=True):
                _compare(f"{where}, gradient", mine, truth, tolerance)

    def _op(self) -> Op:
        return ops.catalog()[self.op]

    def _given(self) -> list[Implementation]:
        make = getattr(type(self), "implementations", None)
        return [] if make is None else list(make())

    def _truth(self, args: tuple[Any, ...]) -> Any:
        return self._op().reference(*(arg.float() if _is_float(arg) else arg for arg in args))

    def _cells(self) -> Iterable[tuple[str, Callable[..., Any], tuple[Any, ...], float]]:
        """(where, callable, arguments, tolerance) of every combination that can run here."""
        op, tested, reasons = self._op(), 0, []
        for kind, dtype in itertools.product(self.devices, op.tolerance):
            device = torch.device(kind)
            runnable: list[tuple[str, Callable[..., Any]]] = [("reference", op.reference)]
            for impl in self._given():
                reason = impl.unavailable(device, dtype)
                if reason is None:
                    runnable.append((impl.name, impl))
                    tested += 1
                else:
                    reasons.append(f"{impl.name} on {kind}, {dtype}: {reason}")
            for (name, compute), args in itertools.product(runnable, op.cases(device, dtype)):
                shapes = [tuple(arg.shape) for arg in args if torch.is_tensor(arg)]
                where = f"{op.name} by {name} on {kind}, {dtype}, shapes {shapes}"
                yield where, compute, args, op.tolerance[dtype]
        if reasons and not tested:
            pytest.skip("; ".join(reasons))


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if torch.is_tensor(result) else [t for t in result if torch.is_tensor(t)]


def _gradients(compute: Callable[..., Any], args: Iterable[Any]) -> list[torch.Tensor]:
    leaves = [a.detach().clone().requires_grad_() if _is_float(a) else a for a in args]
    outputs = [t for t in _tensors(compute(*leaves)) if t.requires_grad]
    # A gradient that differs from element to element: with ones, errors may cancel.
    seeds = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t) for t in outputs]
    torch.autograd.backward(outputs, seeds)
    return [leaf.grad for leaf in leaves if _is_float(leaf) and leaf.grad is not None]


def _compare(where: str, got: Any, truth: Any, tolerance: float) -> None:
    for mine, want in zip(_tensors(got), _tensors(truth), strict=True):
        assert mine.shape == want.shape, f"{where}: shape {list(mine.shape)}"
        if want.numel() == 0:
            continue
        largest = float(want.abs().max())
        worst = float((mine.float() - want.float()).abs().max())
        # Written so that a NaN fails.
        assert worst <= tolerance * max(largest, 1.0), (
            f"{where}: off by {worst:g} where the largest value is {largest:g}"
        )
