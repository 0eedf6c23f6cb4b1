"""Names for an optimizer's state that is keyed by position, as plain `torch.optim` saves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_core.checkpoint.foreign.foreign import plain


@dataclass
class NamedStates:
    """An optimizer's state by name of the parameter.

    Attributes:
        states: per parameter, by key, such as "exp_avg".
        masters: fp32 copies of weights that the model has in 16 bits.
        groups: settings of each group, with the names of its parameters.
        missing: why state is left out.
    """

    states: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def name_states(
    parameters: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]
) -> NamedStates:
    """The state of an optimizer of stage 0 by name.

    Nothing says which position is which parameter. An optimizer is built over parameters in the
    model's order, so the positions of a group are assigned to names in that order; shapes, and
    where there are fp32 copies their values, must leave exactly one way to do so.

    Args:
        parameters: the model's, by name, in its order; tied weights once.
        optimizer: what the optimizer saved: `state` and `param_groups`, maybe inside
            `optimizer_state_dict`, maybe with `fp32_groups` or `fp32_groups_flat`.
    """
    found = NamedStates()
    inner: Mapping[str, Any] = optimizer.get("optimizer_state_dict") or optimizer
    if "param_groups" not in inner:
        return found
    flat = optimizer.get("fp32_groups_flat")
    for number, group in enumerate(inner["param_groups"]):
        positions: Sequence[int] = group["params"]
        states = [inner["state"].get(position, {}) for position in positions]
        masters: Sequence[torch.Tensor] | None = None
        if flat is not None:
            masters, states = _split(parameters, flat[number], states[0])
        elif "fp32_groups" in optimizer:
            masters = optimizer["fp32_groups"][number]
        names = _only_way(parameters, states, masters)
        if names is None:
            found.missing.append(
                f"optimizer group {number}: stage 0 does not save names, and its "
                f"{len(positions)} states fit the model's parameters in no way, or several"
            )
            continue
        found.groups.append({**plain(group), "names": sorted(names)})
        for name, state in zip(names, states, strict=True):
            found.states[name] = dict(state)
            if "step" in group and "step" not in state:
                found.states[name] = {**state, "step": group["step"]}
        if masters is not None:
            found.masters.update(zip(names, masters, strict=True))
    return found


def _split(
    parameters: Mapping[str, torch.Tensor], flat: torch.Tensor, state: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[Mapping[str, Any]]]:
    """A flat group that is the whole model, by parameter; nothing if it is not."""
    if sum(p.numel() for p in parameters.values()) != flat.numel():
        return [], []
    masters: list[torch.Tensor] = []
    states: list[Mapping[str, Any]] = []
    at = 0
    for parameter in parameters.values():
        part = slice(at, at + parameter.numel())
        masters.append(flat[part].view(parameter.shape))
        states.append(
            {
                key: value[part].view(parameter.shape)
                if isinstance(value, torch.Tensor) and value.dim()
                else value
                for key, value in state.items()
            }
        )
        at += parameter.numel()
    return masters, states


def _only_way(
    parameters: Mapping[str, torch.Tensor],
    states: Sequence[Mapping[str, Any]],
    masters: Sequence[torch.Tensor] | None,
) -> list[str] | None:
    """The one way to name the states in the model's order, or None if there is none or several."""
    if not states:
        return None
    # The earliest and the latest name that each state can have, found from either end. There is
    # one way exactly if they agree everywhere.
    candidates = list(parameters)
    earliest = _greedy(parameters, candidates, states, masters, step=1)
    latest = _greedy(parameters, candidates, states, masters, step=-1)
    return earliest if earliest == latest else None


def _greedy(
    parameters: Mapping[str, torch.Tensor],
    candidates: Sequence[str],
    states: Sequence[Mapping[str, Any]],
    masters: Sequence[torch.Tensor] | None,
    *,
    step: int,
) -> list[str] | None:
    names: list[str] = []
    at = 0 if step > 0 else len(candidates) - 1
    for position in range(len(states))[::step]:
        master = None if masters is None else masters[position]
        while 0 <= at < len(candidates) and not _fits(
            parameters[candidates[at]], states[position], master
        ):
            at += step
        if not 0 <= at < len(candidates):
            return None
        names.append(candidates[at])
        at += step
    return names[::step]


def _fits(parameter: torch.Tensor, state: Mapping[str, Any], master: torch.Tensor | None) -> bool:
    if master is not None:
        return master.shape == parameter.shape and torch.equal(
            master.to(parameter.dtype), parameter
        )
    shapes = [v.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
    return all(shape == parameter.shape for shape in shapes)
