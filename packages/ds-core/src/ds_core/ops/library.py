"""Ops as `torch.library` knows them: defined once, bound to an implementation when first called.

Every op lives in the namespace `ds_ops`, with its fake kernel and its gradient, so that
`torch.compile` and `torch.library.opcheck` see an ordinary operator. Its kernel is chosen at its
first call on a kind of device (`ds_core.ops.registry`) and from then on called by torch's own
dispatcher, with nothing of ours between. A named implementation has a namespace of its own,
`ds_ops_<name>`, in which the same schema is bound to it alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from ds_core.seams.op import Op

#: Where ops are bound to the implementation that was chosen for the device.
NAMESPACE = "ds_ops"

#: Makes an implementation the kernel of an op: (op name, namespace, device type).
Binder = Callable[[str, str, str], None]

#: What of a call a compiler may look into: (op name, its arguments) to a function, or None.
Tracer = Callable[[str, tuple[Any, ...]], Callable[..., Any] | None]

#: Held while an op is defined or bound.
lock = threading.RLock()


def namespace_of(implementation: str | None) -> str:
    """The namespace in which ops are bound to one implementation; None: to the chosen one."""
    return NAMESPACE if implementation is None else f"{NAMESPACE}_{implementation}"


@cache
def fragment(namespace: str) -> torch.library.Library:
    """What definitions and Python kernels of a namespace are registered with, for good."""
    return torch.library.Library(namespace, "FRAGMENT")


@cache
def overload(name: str, namespace: str) -> Any:
    """The callable `torch.ops.<namespace>.<name>.default` of an op that is defined there."""
    return getattr(getattr(torch.ops, namespace), name).default


def define(op: Op, namespace: str, bind: Binder, trace: Tracer, call: Callable[..., Any]) -> None:
    """Define `op` in a namespace; its first call on a kind of device calls `bind`, once.

    Args:
        bind: registers the kernel.
        trace: says what `torch.compile` sees in place of one opaque operator.
        call: `call(name, *args)` computes another op in the same namespace, for the gradient.
    """
    library = fragment(namespace)
    library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"{namespace}::{op.name}"
    torch.library.register_fake(qualified, op.fake, lib=library)
    # An alias key: whatever is registered later for one kind of device comes before it.
    library.impl(op.name, _first_call(op.name, namespace, bind), "CompositeExplicitAutograd")
    torch.library.register_torch_dispatch(
        qualified, FunctionalTensorMode, _rule(op.name, trace), lib=library
    )
    autograd = op.autograd
    if autograd is not None:

        def backward(ctx: Any, *gradients: Any) -> Any:
            return autograd.backward(call, ctx, *gradients)

        torch.library.register_autograd(
            qualified, backward, setup_context=autograd.setup, lib=library
        )


def _rule(name: str, trace: Tracer) -> Callable[..., Any]:
    """What an op is to torch's compiler, below autograd: operators that it knows, or itself."""

    def rule(
        mode: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        seen = trace(name, (*args, *kwargs.values()))
        if seen is None:
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode:
            return seen(*args, **kwargs)

    return rule


def _first_call(name: str, namespace: str, bind: Binder) -> Callable[..., Any]:
    bound: set[str] = set()

    def first_call(*args: Any, **kwargs: Any) -> Any:
        device_type = device_type_of((*args, *kwargs.values()))
        with lock:
            if device_type not in bound:
                bind(name, namespace, device_type)
                bound.add(device_type)
        return overload(name, namespace)(*args, **kwargs)

    return first_call


def device_type_of(values: Iterable[Any]) -> str:
    """The kind of device that the first tensor of some arguments is on; "cpu" if there is none."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            return value[0].device.type
    return "cpu"


def bind_python(name: str, namespace: str, device_type: str, kernel: Callable[..., Any]) -> None:
    """Make a Python function the kernel of an op on one kind of device."""
    key = torch._C._dispatch_key_for_device(device_type)
    fragment(namespace).impl(name, kernel, key)
