"""What every implementation of an `Op` must do: compute what the reference computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from ds_core import ops
from ds_core.errors import DsError
from ds_core.ops.checking import comparable, compare
from ds_core.seams import Implementation, Op


class OpContract:
    """Inherit to test an op with every implementation of it that can run here.

    Attributes:
        op: its name.
        devices: kinds of device to test on.
        implementations: names of those that are tested; empty: all that can run.
        compiled: whether it is also run through `torch.library.opcheck` and `torch.compile`,
            which take seconds: do so for one op of a family.

    An implementation that cannot run on a device is skipped there, with its reason; one that takes
    only some calls is tested on those, and must take one.
    """

    op: str
    devices: tuple[str, ...] = ("cpu",)
    implementations: tuple[str, ...] = ()
    compiled: bool = True

    def test_the_op_states_its_contract(self) -> None:
        op = self._op()
        assert op.reference.__doc__, f"{op.name}: the reference's docstring is the contract"
        for dtype in op.dtypes:
            assert op.cases(torch.device("cpu"), dtype), f"{op.name}: no case for {dtype}"
        for label, args in op.benchmarks(torch.device("cpu")):
            assert op.floor(*args).bytes > 0, label

    def test_implementations_satisfy_the_protocol(self) -> None:
        offered = ops.implementations(self.op)
        assert all(isinstance(impl, Implementation) and impl.op == self.op for impl in offered)
        names = [impl.name for impl in offered]
        assert len(set(names)) == len(names), f"names clash: {names}"

    def test_one_that_takes_only_some_calls_takes_one(self) -> None:
        for device in self.devices:
            for name, _ in self._runnable(device):
                refusal = self._refusal(name)
                if refusal is not None:
                    kinds = self._op().dtypes
                    given = [a for t in kinds for a in self.cases(torch.device(device), t)]
                    assert any(refusal(*args) is None for args in given), f"{name} takes no case"

    def test_results_equal_the_reference(self) -> None:
        op = self._op()
        if not op.measured:
            pytest.skip(f"{op.name} is random, and has tests of its own")
        for where, compute, args in self._cells():
            found = compare(op, compute, args)
            assert not found.problem, f"{where}: {found.problem}"

    def test_threads_do_not_change_the_results(self) -> None:
        before = torch.get_num_threads()
        try:
            for where, compute, args in self._cells():
                found = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    copies = [a.clone() if torch.is_tensor(a) else a for a in args]
                    result = compute(*copies)
                    found.append([*_tensors(result), *_tensors(copies)])
                for one, other in zip(*found, strict=True):
                    same = torch.equal(comparable(one), comparable(other))
                    assert same or "reference" in where, where
        finally:
            torch.set_num_threads(before)

    def test_gradients_equal_the_reference(self) -> None:
        op = self._op()
        if op.autograd is None:
            pytest.skip(f"{op.name} has no gradient of its own")
        for where, compute, args in self._cells():
            got = _gradients(compute, args)
            torchs = _gradients(op.reference, args)
            truth = _gradients(op.reference, [_widened(a) for a in args])
            for mine, own, true in zip(got, torchs, truth, strict=True):
                if mine.numel() == 0:
                    continue
                size = max(float(true.norm()), 1.0)  # it may vanish, as for rows of one element
                errors = [float((g - true).norm()) / size for g in (mine, own)]
                allowed = max(op.tolerance[mine.dtype], 1.5 * errors[1])
                assert errors[0] <= allowed, f"{where}: gradient off by {errors[0]:.2e}"

    def test_bad_arguments_are_refused_by_name(self) -> None:
        for device in self.devices:
            for name, compute in self._runnable(device):
                if self._refusal(name) is not None:
                    continue  # what it refuses is computed, or refused, by the next
                for message, args in self._op().refused(torch.device(device)):
                    with pytest.raises((DsError, RuntimeError), match=message):
                        compute(*args)

    @pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
    def test_torch_can_trace_and_compile_it(self) -> None:
        if not self.compiled:
            pytest.skip("another op of its family is compiled")
        ops.define(self.op)
        operator = getattr(torch.ops.ds_ops, self.op).default
        for args in list(self._op().cases(torch.device("cpu"), self._op().dtypes[0]))[:2]:
            told = torch.library.opcheck(operator, _leaves(self._op(), args))
            assert set(told.values()) == {"SUCCESS"}, told

    def cases(self, device: torch.device, dtype: torch.dtype) -> Sequence[tuple[Any, ...]]:
        """The arguments that it is tested on: those of the op, unless a test adds some."""
        return self._op().cases(device, dtype)

    def _refusal(self, name: str) -> Callable[..., str | None] | None:
        """What says which calls an implementation does not take; None if it takes all."""
        offered = {impl.name: impl for impl in ops.implementations(self.op)}
        return offered[name].partly()

    def _op(self) -> Op:
        return ops.get(self.op)

    def _runnable(self, device: str) -> list[tuple[str, Callable[..., Any]]]:
        found: list[tuple[str, Callable[..., Any]]] = []
        reasons = []
        for name, reason in ops.available(self.op, device).items():
            if self.implementations and name not in self.implementations:
                continue
            if reason is None:
                found.append((name, functools.partial(ops.run, self.op, impl=name)))
            else:
                reasons.append(f"{name} on {device}: {reason}")
        if len(found) <= (not self.implementations) and reasons:  # the reference only, or nothing
            pytest.skip("; ".join(reasons))
        return found

    def _cells(self) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
        """(where, callable, arguments) of every combination that can run here."""
        op = self._op()
        for device in self.devices:
            for name, compute in self._runnable(device):
                refusal = self._refusal(name)
                for dtype in op.dtypes:
                    for index, args in enumerate(self.cases(torch.device(device), dtype)):
                        if refusal is not None and refusal(*args) is not None:
                            continue
                        shapes = [tuple(a.shape) for a in args if torch.is_tensor(a)]
                        where = f"{op.name} by {name} on {device}, {dtype}, case {index} {shapes}"
                        yield where, compute, args


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _widened(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def _tensors(result: Any) -> list[torch.Tensor]:
    if torch.is_tensor(result):
        return [result]
    return [t for t in result or () if torch.is_tensor(t)]


def _leaves(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if op.autograd is None:
        return args
    return tuple(a.detach().clone().requires_grad_() if _is_float(a) else a for a in args)


def _gradients(compute: Callable[..., Any], args: Any) -> list[torch.Tensor]:
    leaves = [a.detach().clone().requires_grad_() if _is_float(a) else a for a in args]
    outputs = [t for t in _tensors(compute(*leaves)) if t.requires_grad][:1]
    # A gradient that differs from element to element: with ones, errors may cancel.
    seeds = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t) for t in outputs]
    torch.autograd.backward(outputs, seeds)
    return [leaf.grad for leaf in leaves if _is_float(leaf) and leaf.grad is not None]
