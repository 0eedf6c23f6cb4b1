"""What every rank that holds the whole model has: its parameters, master copies, optimizer state.

The base of the shardings of stage 0; they differ in what becomes of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ds_core import comm
from ds_core.agreement import check_same_model
from ds_core.errors import DsError, OptimizerError
from ds_core.optimizer_state import (
    PortableState,
    allocate_state,
    load_groups,
    number_parameters,
    state_of,
)
from ds_core.precision import Precision


class WholeModel:
    """Parameters that this rank holds whole, and the optimizer that updates them.

    Args:
        model: on its device; cast to `precision.compute` if that is set.
        optimizer: on the model's parameters; with a master copy its groups are switched to it.
        group: the ranks that hold the same model.
        precision: number formats.
        broadcast: start from rank 0's values.

    Raises ModelMismatchError if the ranks' models differ. Collective.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        group: comm.Group,
        precision: Precision,
        *,
        broadcast: bool,
    ) -> None:
        self.optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        check_same_model(
            [
                (name, list(p.shape), str(p.dtype), "trained" if p.requires_grad else "frozen")
                for name, p in self._parameters.items()
            ],
            group,
        )
        self._master: dict[str, nn.Parameter] = {}
        if broadcast:
            for name, param in self._parameters.items():
                comm.broadcast(param.data, group, caller=name)
        self._cast(precision)
        # The same on all ranks, which hold the same values.
        targets = [self._target(name) for name in self._trained()]
        number_parameters(optimizer, {target: place for place, target in enumerate(targets)})

    def _cast(self, precision: Precision) -> None:
        replaced: dict[int, nn.Parameter] = {}
        for name, param in self._parameters.items():
            target = precision.compute
            if target is None or not param.dtype.is_floating_point:
                continue
            # Also for a model that was built in 16 bits.
            if param.requires_grad and precision.master not in (None, target):
                master = nn.Parameter(param.data.to(precision.master, copy=True))
                self._master[name] = replaced[id(param)] = master
                self._hand_over_state(param, master)
            param.data = param.data.to(target)
        for group in self.optimizer.param_groups if replaced else ():
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]

    def _hand_over_state(self, param: nn.Parameter, master: nn.Parameter) -> None:
        """What the optimizer knows of a parameter already: Adagrad does before its first step."""
        if param in self.optimizer.state:
            self.optimizer.state[master] = {
                key: value.to(master.dtype) if _is_like(value, param) else value
                for key, value in self.optimizer.state.pop(param).items()
            }

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: param for name, param in self._parameters.items() if param.requires_grad}

    def _target(self, name: str) -> nn.Parameter:
        """What the optimizer updates for a parameter: its master copy, or itself."""
        return self._master.get(name, self._parameters[name])

    def _publish(self) -> None:
        """Give the model the values of the master copies."""
        with torch.no_grad():
            for name, master in self._master.items():
                self._parameters[name].data.copy_(master)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def full_parameter(self, which: str) -> torch.Tensor:
        """The most precise copy of one parameter."""
        self._named(which)
        return self._target(which).detach()

    def full_optimizer_state(self, which: str, key: str) -> torch.Tensor:
        """Optimizer state such as "exp_avg" of one parameter.

        Raises OptimizerError if the optimizer has none of that name, or no step has made it yet.
        """
        self._named(which)
        held = state_of(self.optimizer, self._target(which))
        value = held.get(key)
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.detach().clone()
        raise OptimizerError(
            f"optimizer state {key!r} of {which!r}: {type(self.optimizer).__name__} has "
            f"{', '.join(sorted(held)) or 'no state before its first step'}"
        )

    @torch.no_grad()
    def set_full_parameter(self, which: str, value: torch.Tensor) -> None:
        """Overwrite one parameter and its master copy; all ranks give the same value."""
        self._named(which).data.copy_(value)
        self._target(which).data.copy_(value)

    @torch.no_grad()
    def set_full_optimizer_state(self, which: str, key: str, value: torch.Tensor) -> None:
        """Overwrite an optimizer state such as "exp_avg" of one parameter."""
        self.full_optimizer_state(which, key)  # raises where there is none
        target = self._target(which)
        if isinstance(self.optimizer, PortableState):
            self.optimizer.load_portable_state(
                target, {**state_of(self.optimizer, target), key: value}
            )
        else:
            self.optimizer.state[target][key].copy_(value)

    def _named(self, which: str) -> nn.Parameter:
        if which not in self._parameters:
            raise DsError(
                f"parameter {which!r} is not one of the {len(self._parameters)} of the model; the "
                f"first of them are {', '.join(list(self._parameters)[:4])}"
            )
        return self._parameters[which]

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Every parameter by name, copied to the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    def model_state(self) -> dict[str, Any]:
        """The most precise copy of every parameter."""
        return {name: self._target(name).detach() for name in self._parameters}

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by parameter name."""
        names = {id(self._target(name)): name for name in self._parameters}
        state: dict[str, dict[str, Any]] = {}
        for param in self.optimizer.state:
            for key, value in state_of(self.optimizer, param).items():
                state.setdefault(key, {})[names[id(param)]] = value
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "names": sorted(names[id(param)] for param in group["params"]),
            }
            for group in self.param_groups
        ]
        return {"state": state, "groups": groups}

    def prepare_load(self) -> None:
        """Allocate optimizer state by a step that changes nothing."""
        allocate_state(self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt loaded state."""
        load_groups(self.param_groups, state_dict["groups"])
        if isinstance(self.optimizer, PortableState):
            for name in self._trained():
                own = {k: by[name] for k, by in state_dict["state"].items() if name in by}
                if own:
                    self.optimizer.load_portable_state(self._target(name), own)
        self._publish()

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds between steps, by kind."""
        return {
            "parameters": num_bytes(self._parameters.values()),
            "gradients": self._gradient_bytes(),
            "master": num_bytes(self._master.values()),
            "optimizer": num_bytes(
                value
                for values in self.optimizer.state.values()
                for value in values.values()
                if torch.is_tensor(value) and value.dim()
            ),
            "padding": 0,
        }

    def _gradient_bytes(self) -> int:
        return num_bytes(self._trained().values())


def _is_like(value: Any, param: nn.Parameter) -> bool:
    """Whether a value of an optimizer's state holds a number for each of a parameter's."""
    return torch.is_tensor(value) and value.shape == param.shape and value.is_floating_point()


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
