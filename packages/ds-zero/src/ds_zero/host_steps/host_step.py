"""When a rank takes its part of a step: the plain way, and what the other ways may do otherwise.

A `ZeroOptimizer` has one `HostStep`, which `chosen.chosen_step` picks. It tells it of every
backward, asks it what it knows of the gradients, and lets it update the units. Work that a way does
early, or puts off, shows nowhere else: `settle` puts weights and states in their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ds_core.seams import tearing
from ds_zero.agreement import Agreement
from ds_zero.host_steps.worker import HostWorker
from ds_zero.inner_step import InnerStep
from ds_zero.offload.homes import Homes
from ds_zero.publishing import Publishing
from ds_zero.unit import Unit
from ds_zero.unit_piece import OptimizerPiece
from ds_zero.whole_matrices import MatrixSteps


@dataclass(frozen=True)
class Known:
    """What work ahead of a step has found, on this rank.

    Attributes:
        squares: by unit, the squared norm of this rank's part of its gradient, fp64.
        updated: how many units were updated already, fp64.
        failure: what ended that work; the step raises it.
    """

    squares: Mapping[int, torch.Tensor] = field(default_factory=dict)
    updated: torch.Tensor | None = None
    failure: BaseException | None = None


class HostStep:
    """Updates units one after the other, when all gradients are known and the step is asked for.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones.
        homes: where their states live.
        worker: the thread of a way that has one.

    Attributes:
        updates_in_backward: whether backward uses the gradients up.
        expected_scale: what the coming backward's gradients will be multiplied by if they are not
            clipped; None: more backwards follow before the step. For who steps ahead.
        torn: why weights and states belong to no one step, after an error; None if they do.
    """

    updates_in_backward = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: list[Unit],
        homes: Homes,
        worker: HostWorker | None = None,
    ) -> None:
        self._optimizer, self._units, self._homes = optimizer, units, homes
        self._worker = worker
        self._matrices = MatrixSteps(optimizer, units)
        self.expected_scale: float | None = 1.0
        self.torn: str | None = None

    # ------------------------------------------------------------------ in backward

    def begin_backward(self) -> None:
        """A backward begins: gradients are about to change."""

    def gradient_complete(self) -> None:
        """A unit's gradient is there, for the step: read states of one more piece meanwhile.

        One for each, since a backward reads parameters from the same disk.
        """
        if self._homes.swap is None:
            return
        everything = InnerStep(self._optimizer, 1.0)
        pieces = (p for u in self._units for p in everything.due(u, [True] * len(u.params)))
        with suppress(OSError):  # of a write before: the step tells it, on all ranks
            self._homes.read_one_more(piece.weights for piece in pieces)

    def end_backward(self) -> None:
        """It has ended; not called if an error ended it."""

    def forget(self, *, is_torn: bool) -> None:
        """All gradients are forgotten, and what was done with them ahead of the step is undone.

        is_torn: errors do not matter any more.
        """
        for unit in self._units:
            unit.clear_gradient()

    # ------------------------------------------------------------------ the step

    def known(self) -> Known:
        """What work ahead of the step has found; waits for it."""
        return Known()

    def judge(self, agreed: Agreement) -> None:
        """The ranks have exchanged what they know of the gradients."""

    def update(self, agreed: Agreement, grad_scale: float | torch.Tensor) -> None:
        """Step with gradients multiplied by `grad_scale`; the model sees the result. Collective.

        An error in the middle leaves it `torn`.
        """
        with tearing(self, "the optimizer's step"):
            used = agreed.used
            self._matrices.run(used, grad_scale)
            step = InnerStep(self._optimizer, grad_scale)
            self._homes.expect(
                piece.weights for unit in self._units for piece in step.due(unit, used[unit.index])
            )
            self._update_units(used, grad_scale, step)

    def _update_units(
        self, used: dict[int, list[bool]], grad_scale: float | torch.Tensor, step: InnerStep
    ) -> None:
        """Update and publish all units; gathers of one overlap the arithmetic of the next."""
        publishing = Publishing()
        for unit in self._units:
            work = partial(self._update_unit, unit, used[unit.index], grad_scale, step)
            publishing.attempt(work)
            publishing.publish(unit)
        publishing.finish()

    def _update_unit(
        self, unit: Unit, used: list[bool], grad_scale: float | torch.Tensor, step: InnerStep
    ) -> None:
        """Update one unit. used: which of its parameters some rank used."""
        step.run(unit, used)

    # ------------------------------------------------------------------ between steps

    def wait(self) -> None:
        """Nobody writes gradients any more."""

    def settle(self) -> None:
        """Weights and states are in their places, as the last step that was asked for left them."""

    def drop(self) -> None:
        """Nothing is under way, whatever becomes of it: weights and states are to be replaced."""

    def mend(self) -> None:
        """Weights and states were loaded: nothing is torn any more."""
        self.torn = None

    def close(self, *, is_torn: bool) -> None:
        """No step follows: unless all is torn, the model sees what was done. Collective."""
        if self._worker is not None:
            self._worker.close()

    # ------------------------------------------------------------------ checkpoints and memory

    def allocate(self, pieces: list[OptimizerPiece]) -> None:
        """Give pieces states that a checkpoint is to fill, beside those of the optimizer."""

    def shown_state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds beside the optimizer's states: by key, then by parameter."""
        return {}

    def passing_state(self) -> dict[str, str]:
        """Keys of states that a run of another kind need not know; what is lost now with each."""
        return {}

    def refresh(self, unit: Unit, loaded: Mapping[str, Any]) -> None:
        """Let the shard of a unit show weights that were edited, or `loaded` from a checkpoint."""
        unit.refresh()

    def undo_bytes(self) -> int:
        """Bytes that this rank holds more from backward to step, to take steps back."""
        return 0

    def buffer_bytes(self) -> int:
        """Bytes of what is kept apart now, for steps under way."""
        return 0
