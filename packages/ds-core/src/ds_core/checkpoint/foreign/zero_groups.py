"""The flat fp32 groups of DeepSpeed's ZeRO stages 1, 2 and 3, taken apart into parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_core.checkpoint.foreign.flat_groups import (
    Piece,
    Shapes,
    consecutive_pieces,
    divided_pieces,
    mapped_pieces,
    uncovered,
)
from ds_core.checkpoint.foreign.foreign import Foreign, plain
from ds_core.errors import CheckpointError

#: What helps where a model was split in a way that is not undone here.
CONVERT_ELSEWHERE = (
    "convert it with DeepSpeed's own `python -m deepspeed.checkpoint.ds_to_universal` and import "
    "the folder that it writes"
)


@dataclass
class FlatGroups:
    """The flat groups of all ranks, in one shape for all stages.

    Attributes:
        shapes: per flat group, its parameters in order.
        pieces: per flat group, where its parameters are.
        weights: per flat group and rank, the fp32 partition.
        states: per flat group and rank, the optimizer's state of that partition.
        settings: per parameter group of the optimizer, its settings.
        members: per parameter group, the flat groups that belong to it.
    """

    shapes: list[Shapes]
    pieces: list[dict[str, list[Piece]]]
    weights: list[list[torch.Tensor]]
    states: list[list[Mapping[str, Any]]]
    settings: list[Mapping[str, Any]]
    members: list[list[int]] = field(default_factory=list)


def stage12_groups(model: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> FlatGroups:
    shapes: list[Shapes] = model["param_shapes"]
    weights = [
        [state["single_partition_of_fp32_groups"][group] for state in states]
        for group in range(len(shapes))
    ]
    pieces = [_stage12_pieces(model, states, group, weights[group]) for group in range(len(shapes))]
    bases = [state["base_optimizer_state"] for state in states]
    settings, members = _settings(bases[0], len(shapes))
    held = [[_state_of(base, group) for base in bases] for group in range(len(shapes))]
    return FlatGroups(list(shapes), pieces, weights, held, settings, members)


def _stage12_pieces(
    model: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    group: int,
    partitions: Sequence[torch.Tensor],
) -> dict[str, list[Piece]]:
    """Where the parameters of a group are: the account that agrees with the model's own weights.

    The parameters lie one behind another. Releases differ in the padding between them that they
    tell of. Addresses are told too, but they are wrong with `round_robin_gradients`.
    """
    shapes: Shapes = model["param_shapes"][group]
    sizes = [part.numel() for part in partitions]
    paddings = states[0].get("param_alignment_paddings")
    accounts = [consecutive_pieces(shapes, sizes, paddings[group] if paddings else None)]
    if "param_slice_mappings" in states[0]:
        accounts.append(
            mapped_pieces(shapes, [state["param_slice_mappings"][group] for state in states])
        )
    for account in accounts:
        if all(
            not uncovered(shape, account[name], sizes)
            and _agrees(model, name, _joined(account[name], partitions, tuple(shape)))
            for name, shape in shapes.items()
        ):
            return account
    return accounts[0]


def _agrees(model: Mapping[str, Any], name: str, master: torch.Tensor) -> bool:
    """Whether the model's own copy of a weight, often in 16 bits, is that of the optimizer."""
    own = model["module"].get(name)
    if own is None or own.numel() != master.numel():
        return own is None or own.numel() == 0  # stage 3 keeps placeholders
    return own.shape == master.shape and torch.equal(master.to(own.dtype), own)


def stage3_groups(model: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> FlatGroups:
    shapes: list[Shapes] = model["param_shapes"]
    if any(
        entry.get("partition_count", len(states)) != len(states)
        for entry in states[0].get("ds_zero_partition_groups") or ()
    ):
        raise CheckpointError(f"a mixture-of-experts model: {CONVERT_ELSEWHERE}")
    weights = [
        [state["fp32_flat_groups"][group] for state in states] for group in range(len(shapes))
    ]
    pieces = [divided_pieces(of_group, len(states)) for of_group in shapes]
    bases = [state["optimizer_state_dict"] for state in states]
    settings, members = _settings(bases[0], len(shapes))
    held = [[_state_of(base, group) for base in bases] for group in range(len(shapes))]
    return FlatGroups(list(shapes), pieces, weights, held, settings, members)


def _settings(base: Any, count: int) -> tuple[list[Mapping[str, Any]], list[list[int]]]:
    """The optimizer's parameter groups, and which flat groups belong to each."""
    if isinstance(base, Mapping):
        groups = list(base["param_groups"])
        return groups, [[int(index) for index in group["params"]] for group in groups]
    return [{} for _ in range(count)], [[group] for group in range(count)]


def _state_of(base: Any, group: int) -> Mapping[str, Any]:
    """The optimizer's state of one flat group; an elastic checkpoint has a list of them."""
    states = base["state"] if isinstance(base, Mapping) else dict(enumerate(base))
    found: Mapping[str, Any] = states.get(group, {})
    return found


def add_groups(found: Foreign, groups: FlatGroups) -> None:
    for group, shapes in enumerate(groups.shapes):
        for name, shape in shapes.items():
            pieces = groups.pieces[group][name]
            if _add_flat(found, name, None, tuple(shape), pieces, groups.weights[group]):
                _add_states(found, name, tuple(shape), pieces, groups.states[group])
    found.state.values["groups"] = [
        {
            **plain(settings),
            "names": sorted(name for group in members for name in groups.shapes[group]),
        }
        for settings, members in zip(groups.settings, groups.members, strict=True)
    ]
    for settings, members in zip(groups.settings, groups.members, strict=True):
        if "step" in settings:  # DeepSpeed's own Adam counts per group
            for name in (name for group in members for name in groups.shapes[group]):
                if f"optimizer.step.{name}" not in found.state.tensors:
                    found.add_step(name, settings["step"])


def _add_states(
    found: Foreign,
    name: str,
    shape: tuple[int, ...],
    pieces: list[Piece],
    states: Sequence[Mapping[str, Any]],
) -> None:
    for key, value in states[0].items():
        if key == "step":
            found.add_step(name, value)
        elif isinstance(value, torch.Tensor) and value.dim():
            _add_flat(found, name, key, shape, pieces, [state[key] for state in states])
        else:
            found.ignored[f"optimizer.{key}"] = "not one value per element"


def _joined(
    pieces: Sequence[Piece], partitions: Sequence[torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    parts = [partitions[rank].view(-1)[start : start + count] for rank, start, count in pieces]
    return (torch.cat(parts) if parts else partitions[0].view(-1)[:0]).view(shape)


def _add_flat(
    found: Foreign,
    name: str,
    key: str | None,
    shape: tuple[int, ...],
    pieces: list[Piece],
    partitions: Sequence[torch.Tensor],
) -> bool:
    """State where a parameter or its moment is; False, and listed as missing, if not whole."""
    problem = uncovered(shape, pieces, [partition.numel() for partition in partitions])
    if problem:
        found.missing.append(f"{key + ' of ' if key else ''}{name}: {problem}")
        return False

    def read() -> torch.Tensor:
        return _joined(pieces, partitions, shape)

    if key is None:
        found.add_weight(name, partitions[0].dtype, shape, read)
    else:
        found.add_moment(key, name, partitions[0].dtype, shape, read)
    return True


def check_agreement(found: Foreign, model: Mapping[str, Any]) -> None:
    """List the trained parameters whose fp32 copy is not what the model computed with."""
    for name in (name for group in model.get("param_shapes") or () for name in group):
        tensor = found.state.tensors.get(f"model.{name}")
        if tensor is not None and not _agrees(model, name, tensor.read()):
            found.unexpected.append(f"{name}: its fp32 copy and the model's weight differ")
