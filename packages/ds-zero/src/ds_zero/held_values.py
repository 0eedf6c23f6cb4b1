"""What a sharded model holds, read and written as a whole, by parameter: values, state, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ds_core import comm
from ds_core.optimizer_state import allocate_state_of, load_groups
from ds_zero import state
from ds_zero.agreement import Agreement
from ds_zero.holdings import Place
from ds_zero.host_steps.host_step import HostStep
from ds_zero.offload.homes import Homes
from ds_zero.parking import KINDS, Parking
from ds_zero.unit import Unit
from ds_zero.wholeness import Wholeness


class HeldValues(torch.optim.Optimizer):
    """The part of a `ZeroOptimizer` that gives and takes what it holds; it knows no other part."""

    units: list[Unit]
    mesh: comm.Mesh
    _trainable: list[Unit]
    _inner: torch.optim.Optimizer
    _parking: Parking
    _homes: Homes
    _host_step: HostStep
    _wholeness: Wholeness
    # Whether `prepare_load` was called last.
    _is_loading: bool = False
    # Whether `release` has ended training.
    _is_released: bool = False
    # What all ranks know of the present gradients, if they have exchanged it.
    _agreed: Agreement | None = None
    #: Called before parameters or states change; set it to wait for who still reads them.
    before_change: Callable[[], None]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that does the arithmetic; its groups hold pieces of parameters."""
        return self._inner

    # torch's schedulers and scalers read and write these two.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups: hyperparameters, and this rank's flat shards."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state of this rank's flat shards."""
        self.take_back()
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    # ------------------------------------------------------------------ wholeness

    @property
    def torn(self) -> str | None:
        """Why what this rank holds does not belong to one step, after an error; None if it does.

        Steps, saves and `publish` are refused then, on all ranks, until a checkpoint is loaded:
        `prepare_load`, then `load_state_dict`.
        """
        return self._wholeness.reason

    @torn.setter
    def torn(self, reason: str | None) -> None:
        self._wholeness.reason = reason

    def take_back(self) -> None:
        """Weights and states are in their places, as the last `step` left them.

        What was stepped ahead is taken back, what was begun is waited for.
        """
        self._host_step.settle()

    def _settle_whole(self, operation: str) -> None:
        """As `take_back`, and all is on disk that is to be there. Collective.

        Raises ShardError on every rank if that failed on one, or a step was torn before.
        """
        if self._is_loading:
            return
        cause: Exception | None = None
        try:
            self.take_back()
            self._homes.settle()
        except Exception as error:
            cause = error
        self._wholeness.check(operation, self.mesh.group("dp"), cause)

    def _drop_unsettled(self) -> None:
        """As `take_back`; of what is torn, errors do not matter any more."""
        (self._host_step.settle if self.torn is None else self._host_step.drop)()

    def settle(self) -> None:
        """Wait until what was written to disk is there; it goes on beside the program otherwise.

        Raises the error of a write that failed.
        """
        self._homes.settle()

    # ------------------------------------------------------------------ by parameter

    def full_parameter(self, which: str | nn.Parameter) -> torch.Tensor:
        """Full value of one parameter, fp32 where a master copy exists. Collective."""
        self._parking.refuse("full_parameter", KINDS)
        self.take_back()
        return state.full_value(self, which, "parameter")

    def full_gradient(self, which: str | nn.Parameter) -> torch.Tensor | None:
        """Full averaged gradient of one parameter; None before any backward. Collective."""
        self._parking.refuse("full_gradient", KINDS)
        self._host_step.wait()
        return state.full_value_or_none(self, which, "gradient")

    def full_optimizer_state(self, which: str | nn.Parameter, key: str) -> torch.Tensor:
        """Full optimizer state such as "exp_avg" of one parameter. Collective."""
        self._parking.refuse("full_optimizer_state", KINDS)
        self.take_back()
        return state.full_value(self, which, key)

    def set_full_parameter(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite one parameter everywhere, master copy included. Collective."""
        self._parking.refuse("set_full_parameter", KINDS)
        self.before_change()
        self.take_back()
        state.set_full_value(self, which, "parameter", value)

    def set_full_gradient(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite the averaged gradient of one parameter. Collective."""
        self._parking.refuse("set_full_gradient", KINDS)
        if self._host_step.updates_in_backward:
            state.refuse_gradient("set_full_gradient")
        self._agreed = None
        self.take_back()
        state.set_full_value(self, which, "gradient", value)

    def set_full_optimizer_state(
        self, which: str | nn.Parameter, key: str, value: torch.Tensor
    ) -> None:
        """Overwrite an optimizer state such as "exp_avg" of one parameter. Collective."""
        self._parking.refuse("set_full_optimizer_state", KINDS)
        self.before_change()
        self.take_back()
        state.set_full_value(self, which, key, value)

    def local_value(self, which: str | nn.Parameter, kind: str) -> torch.Tensor:
        """This rank's part, as a 1-D view, of a "parameter", "gradient" or optimizer state.

        Empty where this rank holds none of it. Writing to it changes the value; a changed
        parameter shows after the next step or `publish`.
        """
        self._parking.refuse("local_value", KINDS)
        self.take_back()
        return state.local_value(self, which, kind)

    def set_local_value(self, which: str | nn.Parameter, kind: str, value: torch.Tensor) -> None:
        """Overwrite this rank's part of a "parameter", "gradient" or optimizer state.

        value: as many numbers as `local_value` has. A changed parameter shows when its unit is
        gathered next (stage 3), or after `publish`; what is on the host or on disk changes there.
        """
        self._parking.refuse("set_local_value", KINDS)
        if kind == "gradient" and self._host_step.updates_in_backward:
            state.refuse_gradient("set_local_value")
        self.take_back()
        if kind == "gradient":
            self._agreed = None
        state.set_local_value(self, which, kind, value)

    def publish(self) -> None:
        """Make parameters that were edited or loaded visible to the model. Collective.

        Raises ShardError on every rank if one has `torn` a step.
        """
        self._parking.refuse("publish", KINDS)
        self.before_change()
        self._settle_whole("publish")
        self._publish()

    def _publish(self, loaded: Mapping[str, Any] | None = None) -> None:
        for unit in self.units:
            self._host_step.refresh(unit, loaded or {})
            pending = unit.publish()
            if pending is not None:
                pending.wait()

    # ------------------------------------------------------------------ state and memory

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by parameter name, each rank's share as `FlatShard`s, for DCP.

        Loads into any stage and world size. See `model_state` for the parameters. Collective.

        Raises ShardError on every rank if one has `torn` a step, but for `prepare_load`.
        """
        self._parking.refuse("state_dict", KINDS)
        self._settle_whole("state_dict")
        found = state.optimizer_state(self)
        found["state"].update(self._host_step.shown_state())
        return found

    def passing_state(self) -> dict[str, str]:
        """Keys of `state_dict` that a run of another kind need not know; what is lost with each."""
        return self._host_step.passing_state()

    def prepare_load(self) -> None:
        """Allocate the optimizer state that loading a checkpoint fills in place.

        Until `load_state_dict` nothing that is held belongs to a step: it is `torn`.
        """
        self._parking.refuse("prepare_load", KINDS)
        self.before_change()
        self._drop_unsettled()
        self._is_loading = True
        self.torn = self.torn or "prepare_load() dropped states, and no load_state_dict() followed"
        for unit in self.units:
            unit.rescue_shard()
        for unit in self._trainable:
            for piece in unit.optimizer_pieces:
                group = self._inner.param_groups[piece.group_index]
                unit.take_from_disk(piece, rescues=True)
                self._inner.state.pop(piece.weights, None)
                with unit.present(piece, edits=False):
                    allocate_state_of(self._inner, group, piece.weights)
                unit.put_on_disk(piece, self._inner)
            unit.unstepped.clear()
            self._host_step.allocate(unit.optimizer_pieces)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt a `state_dict()` whose tensors DCP filled in place, and publish. Collective.

        Nothing is `torn` any more.
        """
        self._parking.refuse("load_state_dict", KINDS)
        self.before_change()
        self._drop_unsettled()
        load_groups(self.param_groups, state_dict["groups"])
        state.adopt_loaded(self, state_dict["state"])
        self._publish(state_dict["state"] if self._is_loading else None)
        self._is_loading, self._agreed, self.torn = False, None, None
        self._host_step.mend()

    def model_state(self) -> dict[str, Any]:
        """Parameters by name, each rank's share as `FlatShard`s of the most precise copy.

        Collective. Raises ShardError as `state_dict` does.
        """
        self._parking.refuse("model_state", KINDS)
        self._settle_whole("model_state")
        return state.model_state(self)

    def memory(self) -> dict[str, int]:
        """Bytes of memory that this rank holds between steps, by kind; without what is on disk.

        "padding" is part of the others; "buffers" is what offloaded state passes through; "undo",
        of an optimizer that speculates, is what it holds more from backward to step.
        """
        found, undo = state.memory(self), self._host_step.undo_bytes()
        return {**found, "undo": undo} if undo else found

    def memory_by_tier(self) -> dict[Place, dict[str, int]]:
        """The same by "device", "host" and "disk"; a model on the CPU has no device."""
        return state.memory_by_tier(self)

    def swap_bytes(self) -> tuple[int, int]:
        """Bytes that this rank has read from and written to disk so far."""
        return self._homes.swap_bytes()
