"""What programs read on the parameters and modules of a sharded model: `ds_id`, `ds_status` ...

They are attributes of the single parameter, given when `Init` shards it or `initialize` takes its
model, and properties of the class that ds_zero gives a parameter while its values are away: what
changes with its state needs no bookkeeping, and a model that only ds_zero knows has none of it.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import ds_zero
from ds_zero.owners import owners_of
from ds_zero.sharded_param import ShardedMixin

_HOLD = "_ds_hold"


class ZeroParamType(Enum):
    """How a parameter is kept."""

    NORMAL = 1  # whole on every rank
    PARTITIONED = 2  # each rank has a part
    REMOTE = 3  # one rank has all of it; does not occur here


class ZeroParamStatus(Enum):
    """Whether the values of a parameter are here."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3  # does not occur: what arrives is not available yet


class _Ids:
    """Numbers of parameters, given in the same order on all ranks."""

    next: ClassVar[itertools.count[int]] = itertools.count()


class _Names:
    """What ds_core calls a parameter of stage 0, and who holds it.

    Beside the parameters, which stay as they are and can be saved by `torch.save`.
    """

    of: ClassVar[WeakIdKeyDictionary] = WeakIdKeyDictionary()


class _Gathered:
    """What a gather that was asked to run beside the program returns; it is complete already."""

    def wait(self, **kwargs: Any) -> None:
        """Nothing is left to wait for."""


def mark_parameter(param: nn.Parameter) -> None:
    """Give a sharded parameter its attributes; one that has them keeps them."""
    if hasattr(param, "ds_id"):
        return
    _teach_sharded_class()
    here = weakref.ref(param)
    param.__dict__.update(
        ds_id=next(_Ids.next),
        ds_shape=param.shape,
        ds_numel=param.numel(),
        ds_param_type=ZeroParamType.PARTITIONED,
        ds_status=ZeroParamStatus.AVAILABLE,  # while sharded, the property of its class hides it
        ds_active_sub_modules=set(),
        ds_persist=False,
        is_external_param=False,
        all_gather=partial(_all_gather, here),
        partition=partial(_partition, here),
        partition_numel=partial(_partition_numel, here),
        ds_summary=partial(_summary, here),
    )


def mark_model(model: nn.Module, sharding: Any) -> None:
    """Give the parameters and modules of an engine's model what programs read on them.

    Args:
        model: the model of an engine.
        sharding: what holds its values: a `ds_zero.ZeroOptimizer`, or at stage 0 what ds_core has.
    """
    if not isinstance(sharding, ds_zero.ZeroOptimizer):
        for name, param in model.named_parameters():
            _unmark(param)
            _Names.of[param] = (weakref.ref(sharding), name)
        return
    for param in model.parameters():
        if sharding.stage == 3:
            mark_parameter(param)
        else:
            _unmark(param)
    for module in model.modules() if sharding.stage == 3 else ():
        give_external_parameters(module)
        if ds_zero.is_leaf(module):
            for param in module.parameters():
                param.__dict__["ds_z3_leaf_module"] = module


def owner_of(param: nn.Parameter) -> tuple[Any, Any] | None:
    """What holds the values of a parameter, and how it calls the parameter; None: nothing does."""
    for found, _ in owners_of([param]).values():
        return found, param
    reference, name = _Names.of.get(param, (None, None))
    owner = None if reference is None else reference()
    return None if owner is None else (owner, name)


def give_external_parameters(module: nn.Module) -> None:
    """Let a module tell the parameters that it uses and others own."""
    if "_external_params" not in module.__dict__:
        module.__dict__["_external_params"] = {}
        module.__dict__["ds_external_parameters"] = types.MethodType(_external, module)
        module.__dict__["all_parameters"] = types.MethodType(_all_parameters, module)


def _external(module: nn.Module) -> Iterable[tuple[int, nn.Parameter]]:
    found: dict[int, nn.Parameter] = module.__dict__["_external_params"]
    return found.items()


def _all_parameters(module: nn.Module) -> Iterator[tuple[Any, nn.Parameter]]:
    return itertools.chain(module.named_parameters(recurse=False), _external(module))


def _unmark(param: nn.Parameter) -> None:
    """Take the attributes of stage 3 from a parameter of a model that is not sharded so."""
    for key in [key for key in param.__dict__ if key.startswith("ds_")]:
        del param.__dict__[key]
    for key in ("all_gather", "partition", "partition_numel", "is_external_param"):
        param.__dict__.pop(key, None)


def _teach_sharded_class() -> None:
    """What depends on whether the values are here."""
    if "ds_status" in ShardedMixin.__dict__:
        return
    status = property(lambda param: ZeroParamStatus.NOT_AVAILABLE)
    ShardedMixin.ds_status = status  # type: ignore[attr-defined]
    ShardedMixin.ds_tensor = property(_own_part)  # type: ignore[attr-defined]


def _own_part(param: nn.Parameter) -> torch.Tensor:
    """This rank's part, of a parameter whose values are not here."""
    return ds_zero.local_part(param)


def _here(reference: Any) -> nn.Parameter:
    param: nn.Parameter | None = reference()
    assert param is not None, "it is an attribute of the parameter"
    return param


def _all_gather(
    reference: Any,
    param_list: Iterable[nn.Parameter] | None = None,
    async_op: bool = False,
    hierarchy: int = 0,
) -> _Gathered | None:
    """Make parameters whole until `partition`. Collective."""
    for param in [_here(reference)] if param_list is None else param_list:
        if _HOLD not in param.__dict__:
            hold = ds_zero.GatheredParameters(param)
            hold.__enter__()
            param.__dict__[_HOLD] = hold
    return _Gathered() if async_op else None


def _partition(
    reference: Any,
    param_list: Iterable[nn.Parameter] | None = None,
    hierarchy: int = 0,
    has_been_updated: bool = False,
    free_data: bool = True,
) -> None:
    """Undo `all_gather`; each rank keeps its part of what was edited if told that it was."""
    for param in [_here(reference)] if param_list is None else param_list:
        hold: ds_zero.GatheredParameters | None = param.__dict__.pop(_HOLD, None)
        if hold is not None:
            if has_been_updated:
                hold.adopt_edits()
            hold.__exit__(None, None, None)


def _partition_numel(reference: Any) -> int:
    """How many numbers of it this rank holds."""
    return ds_zero.local_numel(_here(reference))


def _summary(reference: Any, use_debug_name: bool = False) -> dict[str, Any]:
    """The attributes in one place, for messages."""
    param: Any = _here(reference)
    return {
        "id": param.ds_id,
        "status": param.ds_status.name,
        "numel": param.numel(),
        "ds_numel": param.ds_numel,
        "shape": tuple(param.shape),
        "ds_shape": tuple(param.ds_shape),
        "requires_grad": param.requires_grad,
        "grad_shape": None if param.grad is None else tuple(param.grad.shape),
        "persist": param.ds_persist,
        "active_sub_modules": param.ds_active_sub_modules,
        "ds_tensor.shape": (ds_zero.local_numel(param),),
    }
