"""Checkpoints of DeepSpeed: ZeRO stages 0 to 3, and its universal format.

A checkpoint of N data-parallel ranks is one file of model states (one per rank at stage 3) and, for
ZeRO, one file of optimizer states per rank, which holds that rank's part of flat fp32 groups. The
universal format has a folder `zero/<parameter>` with one file per tensor instead.
Source: DeepSpeed 0.19.8, what its engine and its `zero_to_fp32.py` write and read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_core.checkpoint.foreign.flat_groups import Shapes
from ds_core.checkpoint.foreign.foreign import Foreign, engine_values, plain, same_storage
from ds_core.checkpoint.foreign.unsharded import name_states
from ds_core.checkpoint.foreign.zero_groups import (
    CONVERT_ELSEWHERE,
    add_groups,
    check_agreement,
    stage3_groups,
    stage12_groups,
)
from ds_core.checkpoint.unpickling import Dropped, Record, load_torch_file
from ds_core.errors import CheckpointError


class _Fragment(Record):
    """Stands for DeepSpeed's address of a part of a parameter: `start` and `numel`."""


class _LossScaler(Record):
    """Stands for DeepSpeed's loss scalers."""


_ALLOWED: Mapping[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": _Fragment,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _LossScaler,
}
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
#: What the model file holds beside a user's client state.
_KNOWN = frozenset(
    {
        *("module", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params"),
        *("frozen_param_fragments", "optimizer", "lr_scheduler", "data_sampler", "random_ltd"),
        *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config"),
        *("ds_version", "universal_checkpoint_info"),
    }
)


def looks_like(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of DeepSpeed."""
    return any(_MODEL.fullmatch(path.name) for path in folder.iterdir()) or any(
        _OPTIM.fullmatch(path.name) for path in folder.iterdir()
    )


def open_deepspeed(folder: Path, *, drop_objects: bool = False) -> Foreign:
    """What a checkpoint of DeepSpeed holds, with fp32 master weights and optimizer states.

    Args:
        folder: of one tag.
        drop_objects: as for `load_torch_file`.

    Raises:
        CheckpointError: if a file is missing, damaged or asks for code, or the model was split in
            a way that only DeepSpeed's own converter can undo (tensor, pipeline or expert
            parallel).
    """
    try:
        return _open(folder, drop_objects)
    except KeyError as error:
        raise CheckpointError(
            f"{folder}: an entry {error} is missing, which DeepSpeed writes; the files are of "
            f"another release than 0.19 knows, or of something else"
        ) from error


def _open(folder: Path, drop_objects: bool) -> Foreign:
    models = [_load(path, drop_objects) for path in _model_files(folder)]
    model = models[0]
    if (folder / "zero").is_dir():
        return _open_universal(folder, models, drop_objects)
    optims = [_load(path, drop_objects) for path in _optim_files(folder)]
    version = model.get("ds_version", "of unknown version")
    if not optims:
        world_size = model.get("dp_world_size", 1)
        found = Foreign(f"DeepSpeed {version}, stage 0, {world_size} ranks")
        _add_stage0(found, model)
    else:
        states = [optim["optimizer_state_dict"] for optim in optims]
        stage = int(states[0].get("zero_stage", 1))
        _check_count(folder, states)
        found = Foreign(f"DeepSpeed {version}, ZeRO stage {stage}, {len(optims)} ranks")
        groups = stage3_groups(model, states) if stage == 3 else stage12_groups(model, states)
        add_groups(found, groups)
        check_agreement(found, model)
        _add_untrained(found, models, sharded=stage == 3)
        _add_values(found, model, _scale(states[0].get("loss_scaler")))
    return found


# ---------------------------------------------------------------------- files


def _load(path: Path, drop_objects: bool) -> dict[str, Any]:
    content = load_torch_file(path, allow=_ALLOWED, drop_objects=drop_objects)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def _model_files(folder: Path) -> list[Path]:
    by_rank: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("layer_") and path.suffix == ".pt":
            raise CheckpointError(
                f"{folder} is of a pipeline or mixture-of-experts model ({path.name}): "
                f"{CONVERT_ELSEWHERE}"
            )
        match = _MODEL.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2]):
            raise CheckpointError(
                f"{folder} is of a tensor-parallel model ({path.name}): {CONVERT_ELSEWHERE}"
            )
        by_rank[int(match[1] or 0)] = path
    return _in_rank_order(folder, by_rank, "zero_pp_rank_{}_mp_rank_00_model_states.pt")


def _optim_files(folder: Path) -> list[Path]:
    by_rank: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if (match := _OPTIM.fullmatch(path.name)) and int(match[2]) == 0:
            by_rank[int(match[1])] = path
    return _in_rank_order(folder, by_rank, "zero_pp_rank_{}_mp_rank_00_optim_states.pt")


def _in_rank_order(folder: Path, by_rank: Mapping[int, Path], name: str) -> list[Path]:
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise CheckpointError(f"{folder} is incomplete: {name.format(rank)} is missing")
    if not by_rank and "model" in name:
        raise CheckpointError(f"{folder} is incomplete: it has no model states")
    return [by_rank[rank] for rank in range(len(by_rank))]


def _check_count(folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
    counts = states[0].get("partition_count", len(states))
    expected = max(counts) if isinstance(counts, list) else int(counts)
    if isinstance(counts, list) and len(set(counts)) > 1:
        raise CheckpointError(f"{folder} is of a mixture-of-experts model: {CONVERT_ELSEWHERE}")
    if expected != len(states):
        raise CheckpointError(
            f"{folder} is incomplete: {expected} ranks saved it, but the optimizer states of "
            f"{len(states)} are there"
        )


# ---------------------------------------------------------------------- the rest of the model


def _add_untrained(found: Foreign, models: Sequence[Mapping[str, Any]], *, sharded: bool) -> None:
    """Buffers, frozen parameters and tied weights: what is in no flat group."""
    model = models[0]
    module: Mapping[str, torch.Tensor] = model["module"]
    frozen: Shapes = model.get("frozen_param_shapes") or {}
    found.buffers = [name for name in model.get("buffer_names", ()) if name in module]
    found.frozen = list(frozen)
    trained = {name for group in model.get("param_shapes") or () for name in group}
    for name in dict.fromkeys([*module, *frozen]):
        if name in trained:
            continue
        if name in frozen:
            _add_frozen(found, name, tuple(frozen[name]), models, sharded=sharded)
        elif (kept := _tied_to(name, model, trained | frozen.keys())) is not None:
            found.aliases[name] = kept
        elif not sharded or name in found.buffers:
            found.add_tensor(name, module[name])
        else:
            found.unexpected.append(f"{name}: stage 3 keeps only a placeholder of it")


def _add_frozen(
    found: Foreign,
    name: str,
    shape: tuple[int, ...],
    models: Sequence[Mapping[str, Any]],
    *,
    sharded: bool,
) -> None:
    if not sharded and name in models[0]["module"]:
        found.add_tensor(name, models[0]["module"][name])
        return
    fragments = [(model.get("frozen_param_fragments") or {}).get(name) for model in models]
    parts = [part for part in fragments if part is not None]
    if len(parts) < len(models):
        found.missing.append(f"{name}: it is frozen, and was left out of the checkpoint")
        return
    numel = torch.Size(shape).numel()
    if sum(part.numel() for part in parts) < numel:
        found.missing.append(f"{name}: its parts are smaller than {list(shape)}")
        return

    def read() -> torch.Tensor:
        return torch.cat([part.view(-1) for part in parts])[:numel].view(shape)

    found.add_weight(name, parts[0].dtype, shape, read)


def _tied_to(name: str, model: Mapping[str, Any], parameters: set[str]) -> str | None:
    """The parameter that shares its storage with `name`, if there is one."""
    shared = (model.get("shared_params") or {}).get(name)
    if shared is not None:
        return str(shared)
    module = model["module"]
    for other in module:
        if other in parameters and other != name and same_storage(module[name], module[other]):
            return str(other)
    return None


def _add_values(found: Foreign, model: Mapping[str, Any], scale: Mapping[str, Any] | None) -> None:
    values = found.state.values
    values["engine"] = engine_values(
        int(model.get("global_steps", 0)),
        skipped=int(model.get("skipped_steps", 0)),
        samples=int(model.get("global_samples", 0)),
        scale=scale,
    )
    schedule = model.get("lr_scheduler")
    if isinstance(schedule, Mapping) and schedule:
        values["lr_scheduler"] = dict(schedule)
    for key in ("ds_config", "data_sampler", "random_ltd", "universal_checkpoint_info"):
        if model.get(key):
            found.ignored[key] = "settings of DeepSpeed, not state"
    client = {key: value for key, value in model.items() if key not in _KNOWN}
    found.add_client({str(k): v for k, v in client.items() if not isinstance(v, Dropped)})
    for key, value in client.items():
        if isinstance(value, Dropped):
            found.ignored[f"client.{key}"] = f"an object of class {type(value).__name__}"


def _scale(scaler: Any) -> dict[str, Any] | None:
    if not isinstance(scaler, Record) or scaler.get("cur_scale") is None:
        return None
    since = scaler.get("cur_iter", 0) - scaler.get("last_overflow_iter", -1) - 1
    return {
        "scale": float(scaler.get("cur_scale")),
        "good_steps": max(0, int(since)),
        "tolerated": int(scaler.get("cur_hysteresis", 1)),
    }


# ---------------------------------------------------------------------- stage 0 and universal


def _add_stage0(found: Foreign, model: Mapping[str, Any]) -> None:
    module: Mapping[str, torch.Tensor] = model["module"]
    found.buffers = [name for name in model.get("buffer_names", ()) if name in module]
    parameters: list[str] = []
    for name in module:
        if name in found.buffers:
            continue
        tied = next((o for o in parameters if same_storage(module[name], module[o])), None)
        if tied is None:
            parameters.append(name)
        else:
            found.aliases[name] = tied
    optimizer = model.get("optimizer") or {}
    named = name_states({name: module[name] for name in parameters}, optimizer)
    for name in [*parameters, *found.buffers]:
        master = named.masters.get(name, module[name])
        found.add_tensor(name, master)
    for name, state in named.states.items():
        for key, value in state.items():
            if key == "step":
                found.add_step(name, value)
            elif isinstance(value, torch.Tensor):
                found.add_moment_tensor(key, name, value)
    found.missing += named.missing
    if named.groups:
        found.state.values["groups"] = named.groups
        found.frozen = sorted(set(parameters) - named.states.keys())
    scale = optimizer.get("cur_scale")
    scaler = _LossScaler(**{k: v for k, v in optimizer.items() if k != "optimizer_state_dict"})
    _add_values(found, model, _scale(scaler) if scale is not None else None)


def _open_universal(
    folder: Path, models: Sequence[Mapping[str, Any]], drop_objects: bool
) -> Foreign:
    model = models[0]
    common_file = folder / "zero" / "optimizer_state.pt"
    common = _load(common_file, drop_objects) if common_file.exists() else {}
    stage = int(common.get("zero_stage", 1))
    version = model.get("ds_version", "of unknown version")
    found = Foreign(f"DeepSpeed {version}, universal format, saved at ZeRO stage {stage}")
    base: Mapping[str, Any] = common.get("optimizer_state_dict") or common
    states: Mapping[int, Mapping[str, Any]] = base.get("state", {})
    shapes: list[Shapes] = model["param_shapes"]
    for group, of_group in enumerate(shapes):
        for name, shape in of_group.items():
            _add_universal(found, folder, name, tuple(shape), states.get(group, {}), drop_objects)
    if "param_groups" in base:
        found.state.values["groups"] = [
            {
                **plain(settings),
                "names": sorted(n for index in settings["params"] for n in shapes[index]),
            }
            for settings in base["param_groups"]
        ]
    check_agreement(found, model)
    _add_untrained(found, models, sharded=len(models) > 1 or stage == 3)
    _add_values(found, model, _scale(common.get("loss_scaler")))
    return found


def _add_universal(
    found: Foreign,
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    common: Mapping[str, Any],
    drop_objects: bool,
) -> None:
    base = folder / "zero" / name
    if not (base / "fp32.pt").exists():
        found.missing.append(f"{name}: zero/{name}/fp32.pt is not there")
        return
    for path in sorted(base.glob("*.pt")):
        content = load_torch_file(path, allow=_ALLOWED, drop_objects=drop_objects)
        if path.stem == "step":
            found.add_step(name, content)
            continue
        tensor: torch.Tensor = content["param"] if isinstance(content, Mapping) else content
        if not isinstance(content, Mapping):  # flat: its shape is in the model states
            if tensor.numel() != torch.Size(shape).numel():
                found.missing.append(f"{name}: {path.name} has {tensor.numel()} elements")
                continue
            tensor = tensor.view(shape)
        if path.stem == "fp32":
            found.add_tensor(name, tensor)
        else:
            found.add_moment_tensor(path.stem, name, tensor)
    if not (base / "step.pt").exists() and "step" in common:
        found.add_step(name, common["step"])
