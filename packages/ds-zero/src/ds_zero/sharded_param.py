"""A parameter whose values are elsewhere: it keeps its shape, and any use of it is noticed.

While a parameter is sharded, its class is a subclass of its own whose `__torch_function__` sees
every operation on it, and its data is one NaN stretched to the full shape, which costs nothing.
So shapes, names and counts stay true; an operation inside a forward or backward gathers the
parameter's unit; anywhere else it is an error that says what to do. While gathered, the parameter
is of its ordinary class, and torch.compile and every kernel see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

#: Attribute by which a parameter finds the optimizer that shards it.
OWNER = "_ds_zero_owner"

#: Attribute by which a sharded parameter finds who can gather it.
_KEEPER = "_ds_keeper"


class Keeper(Protocol):
    """Whoever holds the shards of a parameter."""

    #: Whether the values stay where they are once they are present, so that others may share them.
    values_stay: bool

    @property
    def detaches_later(self) -> bool:
        """Whether `detach` leaves it to the use of what it makes to ask for the values.

        So `state_dict()` tells names and shapes, and gathers nothing by itself.
        """

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """Make the values of `params` present, or raise an error that says how to."""


# What may be asked of a sharded parameter without its values: metadata and bookkeeping.
_METADATA = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.ndimension,
        torch.Tensor.element_size,
        torch.Tensor.is_contiguous,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage_offset,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.register_hook,
        torch.Tensor.register_post_accumulate_grad_hook,
        torch.Tensor.requires_grad_,
        torch.Tensor.__len__,
        torch.Tensor.__hash__,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "shape", "dtype", "device", "layout", "requires_grad", "grad", "is_leaf", "ndim",
                "grad_fn", "is_cuda", "is_sparse", "is_quantized", "is_meta", "names", "itemsize",
                "nbytes", "output_nr", "is_mkldnn", "is_nested", "is_cpu", "is_xpu", "is_mps",
                "retains_grad", "_version", "_backward_hooks", "_post_accumulate_grad_hooks",
            )
            if hasattr(torch.Tensor, name)
        ),
        *(
            getattr(torch.Tensor, name).__set__
            for name in ("grad", "requires_grad")
        ),
    }
)  # fmt: skip


class ShardedMixin:
    """Behaviour of a parameter while its values are not on this rank."""

    def __repr__(self) -> str:
        shape = list(self.shape)  # type: ignore[attr-defined]
        return f"sharded parameter of shape {shape} ({self.dtype})"  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.detach and _keeper(args[0]).detaches_later:
            return _detached(args[0])
        if func not in _METADATA:
            _touch(_sharded_in((args, kwargs)), getattr(func, "__name__", repr(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Classes:
    """The sharded twin of every parameter class in use."""

    made: ClassVar[dict[type, type]] = {}

    @classmethod
    def sharded(cls, plain: type) -> type:
        if plain not in cls.made:
            cls.made[plain] = type(f"Sharded{plain.__name__}", (ShardedMixin, plain), {})
        return cls.made[plain]


def is_sharded(param: torch.Tensor) -> bool:
    """True while the values of `param` are not present on this rank."""
    return isinstance(param, ShardedMixin)


def hide(param: nn.Parameter, keeper: Keeper) -> None:
    """Make `param` a shape without values; whoever held its data may free it."""
    show_class(param)
    setattr(param, _KEEPER, keeper)
    poison = torch.full((), float("nan"), dtype=param.dtype, device=param.device)
    param.data = poison.expand(param.shape)
    param.__class__ = _Classes.sharded(type(param))


def show(param: nn.Parameter, values: torch.Tensor) -> None:
    """Give `param` its values again; `values` is not copied."""
    show_class(param)
    param.data = values


def show_class(param: nn.Parameter) -> None:
    """Restore the parameter's own class, so that torch sees nothing unusual."""
    if isinstance(param, ShardedMixin):
        param.__class__ = type(param).__mro__[2]


def _keeper(param: torch.Tensor) -> Keeper:
    found: Keeper = getattr(param, _KEEPER)
    return found


class _Detached:
    """Keeps what `detach` made of a sharded parameter: it has values once they are asked for."""

    detaches_later = values_stay = True

    def __init__(self, param: nn.Parameter) -> None:
        self._param = param

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """See `Keeper`."""
        keeper = _keeper(self._param)
        if isinstance(self._param, ShardedMixin):
            keeper.touch([self._param], operation)
        values = self._param.data
        if not keeper.values_stay:
            values = values.clone()
        for each in params:
            show(each, values)


def _detached(param: nn.Parameter) -> torch.Tensor:
    """A tensor without gradient that has the values of `param`, asked for when it is used.

    It shares them if they stay where they are, and copies them otherwise.
    """
    with torch._C.DisableTorchFunctionSubclass():
        tensor = torch.Tensor.detach(param)
    tensor.__class__ = _Classes.sharded(torch.Tensor)
    setattr(tensor, _KEEPER, _Detached(param))
    return tensor


def _sharded_in(tree: Any) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, ShardedMixin):
            found.append(item)  # type: ignore[arg-type]
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
    return found


def _touch(params: list[nn.Parameter], operation: str) -> None:
    by_keeper: dict[int, tuple[Keeper, list[nn.Parameter]]] = {}
    for param in params:
        keeper = _keeper(param)
        by_keeper.setdefault(id(keeper), (keeper, []))[1].append(param)
    for keeper, theirs in by_keeper.values():
        keeper.touch(theirs, operation)
