"""What a checkpoint of an engine holds, and how it is put back."""

from __future__ import annotations

import base64
import logging
import os
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ds_core.buffers import persistent_buffers
from ds_core.errors import CheckpointError
from ds_core.passing_state import passing_keys, with_others_ignored, with_own_only

if TYPE_CHECKING:
    from ds_core.checkpoint import LoadedWeights
    from ds_core.checkpoint.lazy import LazyStateDict
    from ds_core.checkpoint.remote import Place
    from ds_core.engine import Engine

logger = logging.getLogger(__name__)

#: Optimizer state by its key, such as "exp_avg", then by name of the parameter.
_State = dict[str, dict[str, Any]]


def state_to_save(
    engine: Engine, client_state: Mapping[str, Any] | None, *, exclude_frozen: bool
) -> dict[str, Any]:
    """What `Engine.save_checkpoint` writes."""
    state = {**_state(engine), "client": dict(client_state or {})}
    if exclude_frozen:
        frozen = set(state["about"]["frozen"])
        state["model"] = {name: v for name, v in state["model"].items() if name not in frozen}
    return state


def load(
    engine: Engine,
    directory: str | os.PathLike[str],
    tag: str | None,
    *,
    strict: bool,
    optimizer: bool,
    lr_scheduler: bool,
    only_model: bool,
    verify: bool,
    place_weights: Callable[[LazyStateDict], None] | None = None,
) -> tuple[str, dict[str, Any]]:
    """See `Engine.load_checkpoint`."""
    from ds_core import checkpoint

    path = checkpoint.find(directory, tag)
    with_optimizer = optimizer and not only_model
    if with_optimizer:
        if not checkpoint.inspect(path).groups:
            raise CheckpointError(
                f"{path} holds no optimizer state, such as an import of weights; load it with "
                f"load_module_only=True"
            )
        engine.sharding.prepare_load()
    state = _state(engine)
    state["model"] = without_excluded(path, state["model"])
    own_keys = state["optimizer"].keys()
    state["optimizer"] = _fillable(engine, path, state["optimizer"]) if with_optimizer else {}
    # What another world or config need not have had: the checkpoint's are returned all the same.
    del state["rng"], state["lr_scheduler"], state["about"], state["data"]
    parts = None if with_optimizer else {"model", "client"}
    if not only_model and not with_optimizer:
        parts = {"model", "client", "engine", "lr_scheduler", "rng", "data"}
    if place_weights is not None:
        state["model"] = {}
        parts = (parts or {*state, "lr_scheduler", "rng", "data"}) - {"model"}
    loaded = checkpoint.load(path, state=state, parts=parts, strict=strict, verify=verify)
    # Loading its own state makes a sharding publish what was written into it.
    groups = in_own_order(loaded["groups"], state["groups"])
    taken = {key: values for key, values in loaded["optimizer"].items() if key in own_keys}
    published = {"state": taken, "groups": groups}
    engine.sharding.load_state_dict(published if with_optimizer else engine.sharding.state_dict())
    if not only_model:
        _restore(engine, loaded, with_scheduler=lr_scheduler)
    if place_weights is not None:
        place_weights(checkpoint.full_state_dict(path))
    return str(path), dict(loaded.get("client", {}))


@torch.no_grad()
def load_model(engine: Engine, values: Mapping[str, Any], *, strict: bool) -> None:
    """See `Engine.load_state_dict`."""
    from ds_core.checkpoint import FlatShard

    targets = {**engine.sharding.model_state(), **_live_buffers(engine)}
    module = engine.module
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    shapes.update((name, tuple(b.shape)) for name, b in _live_buffers(engine).items())
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    complaints = [
        f"{name}: the state has {list(values[name].shape)}, the model {list(shape)}"
        for name, shape in shapes.items()
        if name in values and tuple(values[name].shape) != shape
    ]
    if strict and (missing := sorted(shapes.keys() - values.keys())):
        complaints.append(f"the model has, but the state lacks: {', '.join(missing[:4])}")
    if strict and (unknown := sorted(values.keys() - shapes.keys() - aliases)):
        complaints.append(f"the state has, but the model lacks: {', '.join(unknown[:4])}")
    if complaints:
        raise CheckpointError(f"load_state_dict: a state of another model; {'; '.join(complaints)}")
    for name, target in targets.items():
        if name not in values:
            continue
        value = values[name]
        if isinstance(target, FlatShard):
            edges = zip(target.within.offsets, target.within.lengths, strict=True)
            block = value[tuple(slice(offset, offset + length) for offset, length in edges)]
            with target.opened(fill=True) as local:
                local.copy_(block.reshape(-1)[target.start :][: target.held_numel])
        else:
            target.copy_(value)
    # Loading its own state makes a sharding publish what was written into it.
    engine.sharding.load_state_dict(engine.sharding.state_dict())


def load_pretrained(
    engine: Engine,
    source: str | os.PathLike[str],
    *,
    rename: Callable[[str], str | None] | None,
    strict: bool,
) -> LoadedWeights:
    """See `Engine.load_pretrained`."""
    from ds_core.checkpoint import FlatShard, load_weights

    names = {id(param): name for name, param in engine.module.named_parameters()}
    everywhere = engine.module.named_parameters(remove_duplicate=False)
    held = engine.sharding.model_state()
    nothing = torch.empty(0)
    targets = {
        name: held[name] if name in held else FlatShard(nothing, tuple(param.shape))
        for name, param in engine.module.named_parameters()
    }
    loaded = load_weights(
        source,
        {**targets, **_live_buffers(engine)},
        aliases={name: names[id(param)] for name, param in everywhere},
        rename=rename,
        strict=strict,
    )
    # Loading its own state makes a sharding publish what was written into it.
    engine.sharding.load_state_dict(engine.sharding.state_dict())
    return loaded


def _state(engine: Engine) -> dict[str, Any]:
    optimizer = engine.sharding.state_dict()
    return {
        "model": {**engine.sharding.model_state(), **_live_buffers(engine)},
        "optimizer": optimizer["state"],
        "groups": optimizer["groups"],
        "engine": {
            "global_step": engine.global_step,
            "skipped_steps": engine.skipped_steps,
            "loss_scale": engine.scaler.state_dict(),
        },
        "data": _data_state(engine),
        "lr_scheduler": _scheduler_state(engine),
        "rng": {f"rank{_rank()}": _random_state()},
        "about": _about(engine),
    }


def _about(engine: Engine) -> dict[str, Any]:
    """What nobody needs to load, but tools that have no model need to know."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    everywhere = engine.module.named_parameters(remove_duplicate=False)
    return {
        "sharding": str(engine.sharding),
        "precision": str(engine.precision),
        "aliases": {name: names[id(p)] for name, p in everywhere if names[id(p)] != name},
        "frozen": [name for name, p in engine.module.named_parameters() if not p.requires_grad],
        "buffers": [name for name, _ in persistent_buffers(engine.module)],
        "passing": passing_keys(engine.sharding),
    }


def _fillable(engine: Engine, checkpoint: Place, optimizer_state: _State) -> _State:
    """The part of the optimizer's state to load, and what of the checkpoint's is let go."""
    own = passing_keys(engine.sharding)
    found = with_own_only(checkpoint, known_to(checkpoint, optimizer_state), own)
    return with_others_ignored(checkpoint, found)


def known_to(checkpoint: Place, optimizer_state: _State) -> _State:
    """The part of `optimizer_state` that a checkpoint can fill.

    A parameter that had not been stepped when it was saved (the checkpoint was taken before the
    first step, or the parameter was not used) has no state there, and starts anew.

    Args:
        checkpoint: its folder.
        optimizer_state: by key of the state, then by name of the parameter.
    """
    from ds_core.checkpoint.index import Index

    index = Index.read(checkpoint)
    paths = [record.path for record in index.tensors.values()]
    paths += [record.path for record in index.state.values()]
    saved = {path[2] for path in paths if path[0] == "optimizer" and len(path) > 2}
    names = {name for values in optimizer_state.values() for name in values}
    if new := names - saved:
        logger.warning(
            "%s has no optimizer state for %d parameters, such as %s: they start anew",
            checkpoint, len(new), min(new),
        )  # fmt: skip
    return {
        key: {name: value for name, value in values.items() if name in saved}
        for key, values in optimizer_state.items()
    }


def in_own_order(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups in the order of this optimizer's, by the names of their parameters.

    As they are if the parameters are grouped otherwise.
    """
    by_names = {tuple(sorted(group.get("names", ()))): group for group in saved}
    wanted = [tuple(sorted(group.get("names", ()))) for group in own]
    return [by_names[names] for names in wanted] if by_names.keys() == set(wanted) else saved


def without_excluded(checkpoint: Place, model_state: dict[str, Any]) -> dict[str, Any]:
    """`model_state` without the frozen parameters that a checkpoint left out on purpose."""
    from ds_core.checkpoint import read_state
    from ds_core.checkpoint.index import Index

    frozen = set(read_state(checkpoint).get("about", {}).get("frozen", ()))
    paths = [record.path for record in Index.read(checkpoint).tensors.values()]
    saved = {str(path[-1]) for path in paths if path[0] == "model"}
    return {name: v for name, v in model_state.items() if name in saved or name not in frozen}


def _restore(engine: Engine, loaded: dict[str, Any], *, with_scheduler: bool) -> None:
    # Micro-batches of a step that had begun belong to what was before.
    engine._micro.replace()
    engine.zero_grad()
    own = loaded["engine"]
    engine.global_step, engine.skipped_steps = own["global_step"], own["skipped_steps"]
    engine.scaler.load_state_dict(own["loss_scale"])
    if with_scheduler and engine.lr_scheduler is not None and loaded.get("lr_scheduler"):
        engine.lr_scheduler.load_state_dict(loaded["lr_scheduler"])
    if engine.dataloader is not None and loaded.get("data"):
        engine.dataloader.load_state_dict(loaded["data"])
        engine._batches = None
    # Random states belong to the ranks that saved them; one that did not exist then starts anew.
    mine = loaded.get("rng", {}).get(f"rank{_rank()}")
    if mine is not None:
        _restore_random_state(mine)


def _live_buffers(engine: Engine) -> dict[str, torch.Tensor]:
    """Buffers themselves, not copies, so that loading fills them in place."""
    return dict(persistent_buffers(engine.module))


def _data_state(engine: Engine) -> dict[str, Any]:
    return {} if engine.dataloader is None else dict(engine.dataloader.state_dict())


def _scheduler_state(engine: Engine) -> dict[str, Any]:
    if engine.lr_scheduler is None:
        return {}
    state = engine.lr_scheduler.state_dict()
    return {key: value for key, value in state.items() if not callable(value)}


def _random_state() -> dict[str, Any]:
    """States of the generators of torch, Python and numpy, as JSON-able text and numbers."""
    version, internal, gauss = random.getstate()
    name, key, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": _as_text(torch.get_rng_state()),
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(key).tolist(), *rest],
    }
    if torch.accelerator.is_available():
        state["accelerator"] = _as_text(torch.get_device_module().get_rng_state())
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(_from_text(state["torch"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "numpy" in state:  # not in checkpoints of the first releases
        name, key, *rest = state["numpy"]
        np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(_from_text(state["accelerator"]))


def _as_text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _from_text(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
