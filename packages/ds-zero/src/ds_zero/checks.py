"""What must hold before a model is sharded, and the errors that say what does not."""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

import torch
from torch import nn

from ds_core import comm
from ds_core.errors import ModelMismatchError
from ds_zero.errors import ShardError
from ds_zero.plan import ParamSpec

#: Attribute by which a parameter finds the optimizer that shards it.
OWNER = "_ds_zero_owner"

# These compute an update from a whole matrix or from all parameters at once, not element by
# element, so they would be wrong on a flat shard.
_NOT_ELEMENTWISE = ("LBFGS", "Adafactor", "Muon", "SparseAdam", "Shampoo", "SOAP", "LAMB", "Lamb")


def check_optimizer(optimizer: Any) -> None:
    """Raise ShardError unless `optimizer` can step on flat shards."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ShardError(
            f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer that was "
            f"built on the model's parameters"
        )
    name = type(optimizer).__name__
    if name in _NOT_ELEMENTWISE:
        raise ShardError(
            f"optimizer: {name} computes its update from whole matrices, and ZeRO hands it flat "
            f"shards; use an elementwise one (Adam, AdamW, SGD, Adagrad, RMSprop, ...)"
        )
    if any(int(values.get("step", 1)) > 0 for values in optimizer.state.values()):
        raise ShardError(
            "optimizer: it has taken steps already, and its state belongs to the unsharded model; "
            "shard before the first step, and load state from a checkpoint after it"
        )


def parameters_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[ParamSpec]:
    """Every parameter of the model with the optimizer group that updates it.

    Raises ShardError if nothing is trainable, if the optimizer holds parameters that are not the
    model's, or if it lacks trainable ones.
    """
    group_of: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        group_of.update((id(param), index) for param in group["params"])
    named = dict(model.named_parameters())
    _check_model(model, named)
    if not any(param.requires_grad for param in named.values()):
        raise ShardError(
            f"model: {type(model).__name__} has no trainable parameter ({len(named)} frozen); set "
            f"requires_grad on what should be trained"
        )
    known = {id(param) for param in named.values()}
    for index, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            if id(param) not in known:
                raise ShardError(
                    f"optimizer: parameter {place} of group {index}, of shape "
                    f"{list(param.shape)}, is not a parameter of the model; build the optimizer "
                    f"on model.parameters() of the model that is sharded"
                )
    missing = [n for n, p in named.items() if p.requires_grad and id(p) not in group_of]
    if missing:
        raise ShardError(
            f"optimizer: it lacks {len(missing)} trainable parameters of the model, the first is "
            f"{missing[0]!r}; add them to a group or freeze them with requires_grad_(False)"
        )
    return [
        ParamSpec(name, param, group_of.get(id(param)) if param.requires_grad else None)
        for name, param in named.items()
    ]


def _check_model(model: nn.Module, named: dict[str, nn.Parameter]) -> None:
    """Raise ShardError for a model that something else distributes, or that has no values."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ShardError(
            "model: it is wrapped in DistributedDataParallel, which averages gradients too; "
            "shard the module inside it instead: ds_zero.shard(ddp.module, ...)"
        )
    for name, param in named.items():
        if param.is_meta:
            raise ShardError(
                f"model: parameter {name!r} is on the meta device and has no values; build the "
                f"model under ds_zero.Init(), or materialize it first"
            )
        if hasattr(param, "to_local"):  # a DTensor; importing its class takes half a second
            raise ShardError(
                f"model: parameter {name!r} is a DTensor; ds-zero 0.1 shards plain parameters "
                f"(fully_shard and tensor-parallel styles cannot be combined with it yet)"
            )
        if hasattr(param, OWNER):
            raise ShardError(
                f"model: parameter {name!r} is sharded already; call close() on the optimizer that "
                f"shards it first"
            )


def check_same_on_all_ranks(specs: list[ParamSpec], group: comm.Group) -> None:
    """Raise ModelMismatchError on every rank, naming the first parameter that differs."""
    if group.size == 1:
        return
    mine = [(s.name, list(s.param.shape), str(s.param.dtype), s.group_index) for s in specs]
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    if len(set(comm.all_gather_object(digest, group, caller="model check"))) == 1:
        return
    everybody = comm.all_gather_object(mine, group, caller="model check")
    for place in range(max(map(len, everybody))):
        seen = [ours[place] if place < len(ours) else None for ours in everybody]
        if any(entry != seen[0] for entry in seen):
            told = "; ".join(
                f"rank {rank}: {_describe(entry)}"
                for rank, entry in zip(group.ranks, seen, strict=True)
            )
            name = next(entry[0] for entry in seen if entry is not None)
            raise ModelMismatchError(
                f"the ranks hold different models, the first difference is at {name!r}: {told}; "
                f"build the same model on every rank"
            )


def _describe(entry: tuple[str, list[int], str, int | None] | None) -> str:
    if entry is None:
        return "no further parameter"
    name, shape, dtype, group = entry
    kind = "frozen" if group is None else f"optimizer group {group}"
    return f"{name} {shape} {dtype.removeprefix('torch.')}, {kind}"


def full_value(param: nn.Parameter) -> torch.Tensor:
    """The whole value of a parameter; one that `ds_zero.Init` sharded is gathered."""
    from ds_zero.init import gathered_value

    return gathered_value(param)


def refuse_new_group() -> NoReturn:
    """Raise: parameters cannot join once units are laid out."""
    raise ShardError(
        "add_param_group: the units are laid out already; give all parameters to the optimizer "
        "before ds_zero.shard"
    )
