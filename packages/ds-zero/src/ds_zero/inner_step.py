"""Running the user's optimizer on one unit, in as few passes over memory as it can."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ds_core import fused
from ds_core.optimizer_state import PortableState, number_parameters, state_of
from ds_core.whole_matrices import WholeMatrices
from ds_zero.unit import Unit
from ds_zero.unit_piece import OptimizerPiece

#: Above how many units, and elements of a shard, numbers of pieces may coincide.
_MOST_UNITS, _MOST_NUMEL = 1 << 16, 1 << 36


def initial_state(
    optimizer: torch.optim.Optimizer, units: list[Unit]
) -> dict[torch.Tensor, dict[str, Any]]:
    """The state of every piece, of an optimizer that allocated its state before its first step.

    Adagrad does, with values that it is told; it does not allocate again.
    """
    state: dict[torch.Tensor, dict[str, Any]] = {}
    params = {spec.name: spec.param for unit in units for spec in unit.specs}
    for unit in units if optimizer.state else ():
        for piece in unit.optimizer_pieces:
            for part in unit.parts_of(piece):
                for key, value in optimizer.state.get(params[part.slot.name], {}).items():
                    own = state.setdefault(piece.weights, {})
                    if not isinstance(value, torch.Tensor) or value.dim() == 0:
                        own[key] = copy.copy(value) if not torch.is_tensor(value) else value.clone()
                        continue
                    place = own.setdefault(key, torch.zeros_like(piece.weights.detach()))
                    start = part.offset - piece.start
                    place[start : start + part.stop - part.start].copy_(
                        value.reshape(-1)[part.start : part.stop]
                    )
    return state


def number_pieces(optimizer: torch.optim.Optimizer, units: list[Unit]) -> None:
    """Number the pieces of units, for rounding at random: by rank, unit and place in its shard."""
    number_parameters(
        optimizer,
        {
            piece.weights: (unit.group.rank * _MOST_UNITS + unit.index) * _MOST_NUMEL + piece.start
            for unit in units
            for piece in unit.optimizer_pieces
        },
    )


class Stepped(Protocol):
    """What a step reads of a unit."""

    @property
    def grad(self) -> torch.Tensor:
        """The averaged gradient, flat."""

    @property
    def states(self) -> str:
        """Where the states live."""

    def settle_gradient(self) -> None:
        """Wait until `grad` is here."""

    def stepping(
        self, piece: OptimizerPiece, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[None]:
        """Weights and states of a piece are in memory inside the block, for a step."""


class InnerStep:
    """One step of the user's optimizer, taken unit by unit.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        grad_scale: factor on every gradient.
        undo: whether the optimizer keeps what takes the step back (`fused.can_undo`).
        unless: a flag on the device, true to leave the step out, for an optimizer of which
            `fused.can_leave_out` is true; gradients are not scaled then.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        grad_scale: float | torch.Tensor,
        *,
        undo: bool = False,
        unless: torch.Tensor | None = None,
    ) -> None:
        self._optimizer, self._undo, self._unless = optimizer, undo, unless
        self._scale = grad_scale
        self._unit_scale = isinstance(grad_scale, float) and grad_scale == 1.0
        self._one_pass = fused.is_one_pass(optimizer)
        self._fuses_scale = not self._unit_scale and fused.fuses_scale(optimizer)

    def run(self, unit: Unit, used: list[bool]) -> None:
        """Update the shard of `unit`; parameters that are not `used` keep value and state.

        Parameters that are updated as whole matrices are left out. Afterwards the low-precision
        shard has the new values too.
        """
        pieces = self.due(unit, used)
        if pieces:
            with unit.updating(whole=is_all_of(unit, pieces)) as rounded:
                self.take(unit, pieces, rounded)

    def take(
        self, unit: Stepped, pieces: list[OptimizerPiece], rounded: torch.Tensor | None
    ) -> None:
        """Update some pieces of `unit`, and leave their weights in `rounded` too."""
        unit.settle_gradient()
        # States on disk pass through memory a piece at a time.
        turns = [[piece] for piece in pieces] if unit.states == "nvme" else [pieces]
        for turn in turns:
            with ExitStack() as stack:
                for piece in turn:
                    stack.enter_context(unit.stepping(piece, self._optimizer))
                self._step(unit, turn, rounded)

    def due(self, unit: Unit, used: list[bool]) -> list[OptimizerPiece]:
        """The pieces that `run` updates."""
        pieces = unit.optimizer_pieces
        if not all(used):
            split_by_parameter(self._optimizer, unit)
            names = {spec.name for spec, flag in zip(unit.specs, used, strict=True) if flag}
            pieces = [piece for piece in unit.optimizer_pieces if piece.name in names]
        groups = self._optimizer.param_groups
        return [p for p in pieces if not is_whole(self._optimizer, groups[p.group_index])]

    def _step(
        self, unit: Stepped, pieces: list[OptimizerPiece], rounded: torch.Tensor | None
    ) -> None:
        if self._one_pass:
            self._step_in_one_pass(unit, pieces, rounded)
            return
        for piece in pieces:
            piece.weights.grad = self._gradient(unit, piece)
        with self._only(pieces):
            if self._unless is not None:
                fused.step_unless(self._optimizer, self._unless)
            elif self._fuses_scale:
                fused.step_scaled(self._optimizer, self._scale, pieces[0].weights.device)
            else:
                self._optimizer.step()
        for piece in pieces:
            piece.weights.grad = None
            if rounded is not None:
                rounded[piece.start : piece.stop].copy_(piece.weights)

    def _step_in_one_pass(
        self, unit: Stepped, pieces: list[OptimizerPiece], rounded: torch.Tensor | None
    ) -> None:
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        copies: dict[torch.Tensor, torch.Tensor] = {}
        for piece in pieces:
            gradients[piece.weights] = unit.grad[piece.start : piece.stop]
            if rounded is not None:
                copies[piece.weights] = rounded[piece.start : piece.stop]
        with self._only(pieces):
            fused.step_in_one_pass(
                *(self._optimizer, gradients, copies, self._scale),
                undo=self._undo,
                unless=self._unless,
            )

    def _gradient(self, unit: Stepped, piece: OptimizerPiece) -> torch.Tensor:
        gradient = unit.grad[piece.start : piece.stop]
        if gradient.dtype != piece.weights.dtype:
            gradient = gradient.to(piece.weights.dtype)
        if not self._unit_scale and not self._fuses_scale:
            gradient = gradient.mul(self._scale)
        return gradient

    @contextmanager
    def _only(self, pieces: list[OptimizerPiece]) -> Iterator[None]:
        """The optimizer's groups hold these pieces alone."""
        groups = self._optimizer.param_groups
        everything = [group["params"] for group in groups]
        try:
            for index, group in enumerate(groups):
                group["params"] = [p.weights for p in pieces if p.group_index == index]
            yield
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params


def is_all_of(unit: Unit, pieces: list[OptimizerPiece]) -> bool:
    """Whether these pieces are all that the optimizer updates of `unit`."""
    everything = sum(piece.stop - piece.start for piece in unit.optimizer_pieces)
    return sum(piece.stop - piece.start for piece in pieces) == everything


def is_whole(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the parameters of a group are updated as whole matrices."""
    return isinstance(optimizer, WholeMatrices) and optimizer.is_whole(group)


def split_by_parameter(optimizer: torch.optim.Optimizer, unit: Unit) -> None:
    """Give every parameter of `unit` an optimizer state of its own, without copying any
    (of those in memory).

    The pieces of a unit share what an optimizer keeps once per tensor, such as the number of
    steps that corrects Adam's averages. Parameters that skip steps must count for themselves.
    """
    if all(piece.name is not None for piece in unit.optimizer_pieces):
        return
    cut: list[OptimizerPiece] = []
    for whole in unit.optimizer_pieces:
        is_unstepped = whole.weights in unit.unstepped
        unit.unstepped.discard(whole.weights)
        unit.take_from_disk(whole)
        state = state_of(optimizer, whole.weights)
        optimizer.state.pop(whole.weights, None)
        shape = whole.weights.shape
        for part in unit.parts_of(whole):
            start, stop = part.offset, part.offset + part.stop - part.start
            own = slice(start - whole.start, stop - whole.start)
            with unit.shard_memory():
                weights = nn.Parameter(whole.weights.detach()[own])
            if state:
                parts = {key: _part(value, shape, own) for key, value in state.items()}
                if isinstance(optimizer, PortableState):
                    optimizer.load_portable_state(weights, parts)
                else:
                    optimizer.state[weights] = parts
            piece = OptimizerPiece(whole.group_index, weights, start, stop, part.slot.name)
            unit.put_on_disk(piece, optimizer)
            if is_unstepped:
                unit.unstepped.add(weights)
            cut.append(piece)
    _replace(optimizer, unit.optimizer_pieces, cut)
    unit.optimizer_pieces = cut
    number_pieces(optimizer, [unit])


def _part(value: Any, shape: torch.Size, own: slice) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value[own] if value.shape == shape else value.clone()


def _replace(
    optimizer: torch.optim.Optimizer, old: list[OptimizerPiece], new: list[OptimizerPiece]
) -> None:
    gone = {id(piece.weights) for piece in old}
    for index, group in enumerate(optimizer.param_groups):
        group["params"] = [param for param in group["params"] if id(param) not in gone]
        group["params"] += [piece.weights for piece in new if piece.group_index == index]
