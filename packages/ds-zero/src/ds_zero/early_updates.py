"""Updating each unit as soon as its averaged gradient is complete, while backward goes on.

A gradient then needs memory for one unit at a time, not for the model: with fp32 parameters and
Adam, 12 bytes per parameter in place of 16. A unit's gradient is complete only when the backward
of all its parameters has run, so nobody reads their old values any more.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited
Resources" (LOMO), section 3.
"""

from __future__ import annotations

import math

import torch

from ds_core import comm
from ds_core.gradients import vector_norm
from ds_zero.errors import ShardError
from ds_zero.inner_step import InnerStep
from ds_zero.offload.homes import Homes
from ds_zero.unit import Unit
from ds_zero.whole_matrices import MatrixStep


class EarlyUpdates:
    """Takes the steps of `units` during backward.

    A parameter that this rank did not use keeps its value, as in plain PyTorch, where one rank
    has it all; on several ranks its gradient counts as zero.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones.
        matrices: of an optimizer that updates whole matrices; refused.
        homes: where the units' states live.

    Attributes:
        norm_squares: by unit, the squared norm of this rank's part of its gradient, fp64.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: list[Unit],
        matrices: list[MatrixStep],
        homes: Homes,
    ) -> None:
        if matrices:
            raise ShardError(
                f"update_in_backward: {type(optimizer).__name__} puts matrices together from all "
                f"units and ranks, after backward; leave it out, or use an elementwise optimizer"
            )
        self._step = InnerStep(optimizer, 1.0)
        self._homes = homes
        # In which order the last backward completed the units; the next one reads ahead by it.
        self._order: list[Unit] = []
        self.norm_squares: dict[int, torch.Tensor] = {}
        self._pending: list[comm.Pending] = []
        for unit in units:
            unit.on_reduced = self._update

    @torch.no_grad()
    def _update(self, unit: Unit) -> None:
        if unit.index in self.norm_squares:
            raise ShardError(
                f"update_in_backward: {unit.name} has another gradient after it was updated; end "
                f"each backward with step(), run micro-batches before the last under "
                f"no_sync(), or shard without update_in_backward"
            )
        if not self.norm_squares:
            order, self._order = self._order, []
            self._homes.expect(p.weights for each in order for p in each.optimizer_pieces)
        self._order.append(unit)
        unit.settle_gradient()
        square = vector_norm(unit.grad).double().square_()
        self.norm_squares[unit.index] = square
        # Elsewhere than on a CPU the host would have to wait for the number.
        if square.device.type != "cpu" or math.isfinite(float(square)):
            used = unit.used if unit.group.size == 1 else [True] * len(unit.params)
            self._step.run(unit, used)
        unit.consume_gradient()
        # At stage 3 a unit that is whole now is not when the next pass gathers it.
        pending = unit.publish() if unit.stage < 3 else None
        if pending is not None:
            self._pending.append(pending)

    def finish(self, grad_scale: float | torch.Tensor) -> None:
        """End the step: wait until the model has the new parameters.

        Raises ShardError for gradients that should have been scaled.
        """
        if float(grad_scale) != 1.0:
            raise ShardError(
                f"update_in_backward: gradients cannot be multiplied by {float(grad_scale):g} "
                f"(clipping, or a loss scale) after they have been used; shard without it"
            )
        while self._pending:
            self._pending.pop().wait()

    def forget(self) -> None:
        """The next backward begins a step."""
        self.norm_squares.clear()
