"""What a sharded model holds, read and written as a whole, by parameter: values, state, memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ds_core.optimizer_state import allocate_state_of, load_groups
from ds_zero import state
from ds_zero.agreement import Agreement
from ds_zero.early_updates import EarlyUpdates
from ds_zero.holdings import Place
from ds_zero.host_steps.speculative import Speculation
from ds_zero.host_steps.zenflow import ZenFlowStep
from ds_zero.offload.homes import Homes
from ds_zero.parking import KINDS, Parking
from ds_zero.unit import Unit


class HeldValues(torch.optim.Optimizer, ABC):
    """The part of a `ZeroOptimizer` that gives and takes what it holds."""

    units: list[Unit]
    _trainable: list[Unit]
    _inner: torch.optim.Optimizer
    _parking: Parking
    _early: EarlyUpdates | None
    _ahead: Speculation | None
    _zenflow: ZenFlowStep | None
    _agreed: Agreement | None
    _homes: Homes

    @abstractmethod
    def take_back(self) -> None:
        """Weights and states are in their places, as the last step left them."""

    @abstractmethod
    def _show_all(self) -> None:
        """As `take_back`, and the model sees all that is done."""

    @abstractmethod
    def hold_units(self, units: list[Unit]) -> AbstractContextManager[None]:
        """Hold some units on every rank inside the block. Collective."""

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """What `model.state_dict()` would hold unsharded, parameters only, copied to the CPU.

        Gathers unit by unit. Collective.
        """
        self._parking.refuse("full_state_dict", {"lp_params"})
        return state.full_state_dict(self)

    def full_parameter(self, which: str | nn.Parameter) -> torch.Tensor:
        """Full value of one parameter, fp32 where a master copy exists. Collective."""
        self._parking.refuse("full_parameter", KINDS)
        self.take_back()
        return state.full_value(self, which, "parameter")

    def full_gradient(self, which: str | nn.Parameter) -> torch.Tensor | None:
        """Full averaged gradient of one parameter; None before any backward. Collective."""
        self._parking.refuse("full_gradient", KINDS)
        if self._ahead is not None:
            self._ahead.wait()
        return state.full_value_or_none(self, which, "gradient")

    def full_optimizer_state(self, which: str | nn.Parameter, key: str) -> torch.Tensor:
        """Full optimizer state such as "exp_avg" of one parameter. Collective."""
        self._parking.refuse("full_optimizer_state", KINDS)
        self.take_back()
        return state.full_value(self, which, key)

    def set_full_parameter(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite one parameter everywhere, master copy included. Collective."""
        self._parking.refuse("set_full_parameter", KINDS)
        self.take_back()
        state.set_full_value(self, which, "parameter", value)

    def set_full_gradient(self, which: str | nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite the averaged gradient of one parameter. Collective."""
        self._parking.refuse("set_full_gradient", KINDS)
        if self._early is not None:
            state.refuse_gradient("set_full_gradient")
        self._agreed = None
        self.take_back()
        state.set_full_value(self, which, "gradient", value)

    def set_full_optimizer_state(
        self, which: str | nn.Parameter, key: str, value: torch.Tensor
    ) -> None:
        """Overwrite an optimizer state such as "exp_avg" of one parameter. Collective."""
        self._parking.refuse("set_full_optimizer_state", KINDS)
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
        if kind == "gradient" and self._early is not None:
            state.refuse_gradient("set_local_value")
        self.take_back()
        if kind == "gradient":
            self._agreed = None
        state.set_local_value(self, which, kind, value)

    def publish(self) -> None:
        """Make parameters that were edited or loaded visible to the model. Collective."""
        self._parking.refuse("publish", KINDS)
        self.take_back()
        for unit in self.units:
            unit.refresh()
            pending = unit.publish()
            if pending is not None:
                pending.wait()

    # ------------------------------------------------------------------ state and memory

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by parameter name, each rank's share as `FlatShard`s, for DCP.

        Loads into any stage and world size. See `model_state` for the parameters.
        """
        self._parking.refuse("state_dict", KINDS)
        self._show_all()
        return state.optimizer_state(self)

    def prepare_load(self) -> None:
        """Allocate the optimizer state that loading a checkpoint fills in place."""
        self._parking.refuse("prepare_load", KINDS)
        self.take_back()
        for unit in self._trainable:
            for piece in unit.optimizer_pieces:
                group = self._inner.param_groups[piece.group_index]
                unit.take_from_disk(piece)
                self._inner.state.pop(piece.weights, None)
                with unit.present(piece, edits=False):
                    allocate_state_of(self._inner, group, piece.weights)
                unit.put_on_disk(piece, self._inner)
            if self._zenflow is not None:
                self._zenflow.allocate(unit.optimizer_pieces)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt a `state_dict()` whose tensors DCP filled in place, and publish. Collective."""
        self._parking.refuse("load_state_dict", KINDS)
        self.take_back()
        load_groups(self.param_groups, state_dict["groups"])
        state.adopt_loaded(self, state_dict["state"])
        self.publish()

    def model_state(self) -> dict[str, Any]:
        """Parameters by name, each rank's share as `FlatShard`s of the most precise copy."""
        self._parking.refuse("model_state", KINDS)
        self._show_all()
        return state.model_state(self)

    def memory(self) -> dict[str, int]:
        """Bytes of memory that this rank holds between steps, by kind; without what is on disk.

        "padding" is part of the others; "buffers" is what offloaded state passes through; "undo",
        of an optimizer that speculates, is what it holds more from backward to step.
        """
        found = state.memory(self)
        if self._ahead is not None:
            found["undo"] = self._ahead.undo_bytes()
        return found

    def memory_by_tier(self) -> dict[Place, dict[str, int]]:
        """The same by "device", "host" and "disk"; a model on the CPU has no device."""
        return state.memory_by_tier(self)
