"""Counts the operations that torch dispatches, as torch's `FlopCounterMode` does.

That mode takes apart every operation that can be (`silu_backward`, say), which changes results in
their last bits; this one runs each as it would run without.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_core.accelerator import Accelerator
from ds_core.profiling import formulas
from ds_core.profiling.calls import Calls, Phase


class Work:
    """What one module (or what is outside of all) has done itself, without what it calls."""

    def __init__(self) -> None:
        self.flops = dict.fromkeys(Phase, 0)
        self.elements = dict.fromkeys(Phase, 0)
        self.seconds = 0.0  # in the operations of its backward


class OpCounter(TorchDispatchMode):
    """While entered, every operation is looked up, run as it is, and noted with its module.

    Args:
        calls: tells whose operation it is.
        device: that the model is on.

    Attributes:
        work: of each module by its index in `calls`.
        uncounted: calls of operations from other libraries for which there is no formula.
    """

    supports_higher_order_operators = True

    def __init__(self, calls: Calls, device: torch.device) -> None:
        super().__init__()
        self._calls = calls
        self._synchronize = Accelerator(device.type).synchronize
        self._backend = torch._C._dispatch_key_for_device(device.type)
        self._composite: dict[Any, bool] = {}
        self.work: dict[int, Work] = {}
        self.uncounted: Counter[str] = Counter()
        self.backward_s = 0.0
        self._backward_began_s: float | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_plain = isinstance(func, torch._ops.OpOverload)
        formula = formulas.formula_of(func._overloadpacket if is_plain else func)
        if formula is None and is_plain and self._is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        phase, module = self._calls.current()
        if phase is not Phase.FORWARD:
            self._note_backward()
        work = self.work.setdefault(module, Work())
        began_s = time.perf_counter()
        output = func(*args, **kwargs)
        if phase is Phase.BACKWARD:
            self._synchronize()
            work.seconds += time.perf_counter() - began_s
        if formula is not None:
            work.flops[phase] += formula(args, kwargs, output)
        elif not is_plain or func.namespace not in formulas.KNOWN_NAMESPACES:
            self.uncounted[func.name()] += 1
        else:
            work.elements[phase] += formulas.elements_of(func, args, output)
        return output

    def _is_composite(self, func: Any) -> bool:
        """Whether an operation is made of others, as it arrives where autograd is not above it.

        One that has a kernel of its own for the device is not taken apart, even if it could be:
        its parts round differently.
        """
        if func not in self._composite:
            name, has_kernel = func.name(), torch._C._dispatch_has_kernel_for_dispatch_key
            self._composite[func] = has_kernel(
                name, torch._C.DispatchKey.CompositeImplicitAutograd
            ) and not has_kernel(name, self._backend)
        return self._composite[func]

    def _note_backward(self) -> None:
        """Time each backward from its first operation to its end."""
        if self._backward_began_s is None:
            self._backward_began_s = time.perf_counter()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._synchronize()
        if self._backward_began_s is not None:
            self.backward_s += time.perf_counter() - self._backward_began_s
        self._backward_began_s = None
