"""What must hold before a model is sharded, and the errors that say what does not."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from ds_core import comm
from ds_core.agreement import Entry, check_same_model
from ds_core.checks import check_model, check_optimizer
from ds_core.whole_matrices import WholeMatrices
from ds_zero.errors import ShardError
from ds_zero.plan import ParamSpec
from ds_zero.released import released
from ds_zero.sharded_param import OWNER

# These compute an update from a whole matrix or from all parameters at once, not element by
# element, so they would be wrong on a flat shard.
NOT_ELEMENTWISE = frozenset(
    ("LBFGS", "Adafactor", "Muon", "SparseAdam", "Shampoo", "SOAP", "LAMB", "Lamb", "FusedLamb")
)


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise ShardError unless `optimizer` can step on flat shards, and has not stepped yet."""
    name = type(optimizer).__name__
    if name in NOT_ELEMENTWISE and not isinstance(optimizer, WholeMatrices):
        other = "ds_core.optim.Muon, or " if name == "Muon" else ""
        raise ShardError(
            f"optimizer: {name} computes its update from whole matrices, and ZeRO hands it flat "
            f"shards; use {other}an elementwise one (Adam, AdamW, SGD, Adagrad, RMSprop, ...)"
        )
    if any(int(values.get("step", 1)) > 0 for values in optimizer.state.values()):
        raise ShardError(
            "optimizer: it has taken steps already, and its state belongs to the unsharded model; "
            "shard before the first step, and load state from a checkpoint after it"
        )


def parameters_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, group: comm.Group
) -> list[ParamSpec]:
    """Every parameter of the model with the optimizer group that updates it.

    Raises ShardError for a model or optimizer that cannot be sharded, and ModelMismatchError on
    every rank of `group` if theirs differ. Collective.
    """
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)  # else that is what is told
    trains = is_optimizer and any(group["params"] for group in optimizer.param_groups)
    check_model(model, ShardError, trains=trains or not is_optimizer)
    check_optimizer(model, optimizer, ShardError)
    check_elementwise(optimizer)
    group_of: dict[int, int] = {}
    for index, params in enumerate(group["params"] for group in optimizer.param_groups):
        group_of.update((id(param), index) for param in params)
    specs = [
        ParamSpec(name, param, group_of.get(id(param)) if param.requires_grad else None)
        for name, param in model.named_parameters()
    ]
    for spec in specs:
        _check_parameter(spec)
    check_same_model([_entry(spec) for spec in specs], group)
    return specs


def _check_parameter(spec: ParamSpec) -> None:
    if hasattr(spec.param, "to_local"):  # a DTensor; importing its class takes half a second
        raise ShardError(
            f"model: parameter {spec.name!r} is a DTensor; ds-zero 0.1 shards plain parameters "
            f"(fully_shard and tensor-parallel styles cannot be combined with it yet)"
        )
    if hasattr(spec.param, OWNER) and released(spec.param) is None:
        raise ShardError(
            f"model: parameter {spec.name!r} is sharded already; call close() on the optimizer "
            f"that shards it first"
        )


def _entry(spec: ParamSpec) -> Entry:
    kind = "frozen" if spec.group_index is None else f"optimizer group {spec.group_index}"
    return spec.name, list(spec.param.shape), str(spec.param.dtype), kind


def full_value(param: nn.Parameter) -> torch.Tensor:
    """The whole value of a parameter; one that `ds_zero.Init` sharded is gathered.

    So is one that was left sharded when an earlier training ended.
    """
    from ds_zero.init import gathered_value

    left = released(param)
    if left is not None:
        return left.take(param)
    return gathered_value(param)


def refuse_new_group() -> NoReturn:
    """Raise: parameters cannot join once units are laid out."""
    raise ShardError(
        "add_param_group: the units are laid out already; give all parameters to the optimizer "
        "before ds_zero.shard"
    )


def refuse_whole_matrices(optimizer: torch.optim.Optimizer, argument: str, instead: str) -> None:
    """Raise ShardError for an optimizer that does not step unit by unit."""
    if isinstance(optimizer, WholeMatrices):
        raise ShardError(
            f"{argument}: {type(optimizer).__name__} puts matrices together from all units and "
            f"ranks, after backward; {instead}, or use an elementwise optimizer"
        )


def refuse_random_rounding(optimizer: torch.optim.Optimizer, argument: str, instead: str) -> None:
    """Raise ShardError if the order in which a step's parts are taken changes what it computes."""
    for group in optimizer.param_groups:
        if group.get("stochastic_rounding"):
            raise ShardError(
                f"offload: {argument}: {type(optimizer).__name__} rounds at random by the order of "
                f"its steps, which is another here; set stochastic_rounding=False, or {instead}"
            )
