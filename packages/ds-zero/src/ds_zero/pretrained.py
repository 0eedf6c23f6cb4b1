"""Starting from somebody's weights, of which no rank ever has a whole copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ds_core.buffers import persistent_buffers
from ds_zero.errors import ShardError
from ds_zero.init import record_of
from ds_zero.optimizer import ZeroOptimizer
from ds_zero.owners import owners_of
from ds_zero.sharded_param import is_sharded

if TYPE_CHECKING:
    from ds_core.checkpoint import LoadedWeights


def load_pretrained(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    rename: Callable[[str], str | None] | None = None,
    strict: bool = True,
) -> LoadedWeights:
    """Fill a model from a Hugging Face folder; each rank reads only what it holds.

        with ds_zero.Init(empty=True):
            model = AutoModelForCausalLM.from_config(config)
        ds_zero.load_pretrained(model, "SmolLM2-135M")
        optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), stage=3)

    Args:
        model: built under `Init`, or sharded by `shard`; parameters of neither are read whole.
        source: a folder with safetensors (one file, or several with an index), or a file.
        rename: called with each name in the files; returns that in the model, or None for one to
            leave out.
        strict: whether a name that only the model or only the files have is an error.

    Returns what was found, missing and unexpected. Values are converted to the dtype in which the
    model keeps them: of a sharded model that is the master copy, where there is one. A tied weight
    may be in the files under any of its names. Raises CheckpointError on every rank if a file is
    missing or damaged, or of another model. Collective.
    """
    from ds_core.checkpoint import load_weights

    owners = [owner for owner, _ in owners_of(model.parameters()).values()]
    held = {}
    for owner in owners:
        held.update(_held_by(owner))
    names = {id(param): name for name, param in model.named_parameters()}
    targets = {name: _target(name, param, held) for name, param in model.named_parameters()}
    targets.update(persistent_buffers(model))
    everywhere = model.named_parameters(remove_duplicate=False)
    loaded = load_weights(
        source,
        targets,
        aliases={name: names[id(param)] for name, param in everywhere},
        rename=rename,
        strict=strict,
    )
    for owner in owners:
        owner.publish()
    return loaded


def _held_by(owner: ZeroOptimizer) -> dict[int, torch.Tensor]:
    """This rank's share of each parameter, by its id; of no elements where it has none."""
    from ds_core.checkpoint import FlatShard

    state = owner.model_state()
    return {
        id(spec.param): state.get(
            spec.name,
            FlatShard(unit.full.new_empty(0, dtype=unit.weights_dtype), tuple(slot.shape)),
        )
        for unit in owner.units
        for spec, slot in zip(unit.specs, unit.layout.slots, strict=True)
    }


def _target(name: str, param: nn.Parameter, held: dict[int, torch.Tensor]) -> torch.Tensor:
    """What this rank holds of a parameter."""
    from ds_core.checkpoint import FlatShard

    if id(param) in held:
        return held[id(param)]
    record = record_of(param)
    if record is not None:
        record.owner.settle()
        return FlatShard(record.own, tuple(record.shape), record.start)
    if param.is_meta:
        raise ShardError(
            f"load_pretrained: parameter {name!r} is on the meta device and has no storage; build "
            "the model under ds_zero.Init(empty=True), which gives each rank storage for its share"
        )
    if is_sharded(param):
        raise ShardError(
            f"load_pretrained: parameter {name!r} is sharded by an optimizer that is gone; load "
            "before it is, or keep the optimizer"
        )
    return param.detach()
