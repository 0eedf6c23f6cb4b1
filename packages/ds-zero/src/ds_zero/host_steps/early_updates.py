"""Updating each unit as soon as its averaged gradient is complete, while backward goes on.

A gradient then needs memory for one unit at a time, not for the model: with fp32 parameters and
Adam, 12 bytes per parameter in place of 16. A unit's gradient is complete only when the backward
of all its parameters has run, so nobody reads their old values any more.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited
Resources" (LOMO), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ds_core import comm, fused
from ds_core.gradients import vector_norm
from ds_zero import checks
from ds_zero.agreement import Agreement
from ds_zero.errors import ShardError, TornShardError
from ds_zero.host_steps.host_step import HostStep, Known
from ds_zero.inner_step import InnerStep
from ds_zero.offload.homes import Homes
from ds_zero.unit import Unit
from ds_zero.wholeness import advice


class EarlyUpdates(HostStep):
    """Takes the steps of units during backward.

    A parameter that this rank did not use keeps its value, as in plain PyTorch, where one rank
    has it all; on several ranks its gradient counts as zero.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones.
        homes: where the units' states live.
        before_change: called before a backward changes anything.

    From the first gradient on that is not finite, this rank updates nothing until `forget`.
    """

    updates_in_backward = True
    _torn: str | None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: list[Unit],
        homes: Homes,
        before_change: Callable[[], None],
    ) -> None:
        checks.refuse_whole_matrices(optimizer, "update_in_backward", "leave it out")
        super().__init__(optimizer, units, homes)
        self._before_change = before_change
        self._step = InnerStep(optimizer, 1.0)
        # In which order the last backward completed the units; the next one reads ahead by it.
        self._order: list[Unit] = []
        self._seen: set[int] = set()
        self._is_running = False
        self._squares: dict[int, torch.Tensor] = {}
        # What ended the updates of this step on this rank; it is told when the step ends.
        self._failure: Exception | None = None
        self._pending: list[comm.Pending] = []
        # Whether all gradients so far were finite, as the host knows; as the device does.
        self._finite = True
        self._finite_there: torch.Tensor | None = None
        self._updated = torch.zeros((), dtype=torch.float64)
        for unit in units:
            unit.on_reduced = self._reduced

    # ------------------------------------------------------------------ in backward

    def begin_backward(self) -> None:
        """See `HostStep.begin_backward`."""
        self._torn = self.torn  # of the last one, if that did not end
        self._is_running = True

    def gradient_complete(self) -> None:
        """Nothing: units are updated as their gradients come, in the order of the last backward."""

    def end_backward(self) -> None:
        """See `HostStep.end_backward`."""
        self._is_running = False

    @torch.no_grad()
    def _reduced(self, unit: Unit) -> None:
        if unit.index in self._seen:
            self._is_running = False  # this backward has changed nothing
            raise ShardError(
                f"update_in_backward: {unit.name} has another gradient after it was updated; end "
                f"each backward with step(), run micro-batches before the last under "
                f"no_sync(), or shard without update_in_backward"
            )
        begins = not self._seen
        self._seen.add(unit.index)
        if self._failure is None:
            try:
                if begins:
                    self._begin()
                self._order.append(unit)
                self._update(unit)
            except Exception as error:
                # Told when the step ends: the other ranks wait for this one's gradients.
                self._failure = error
                told = f"{type(error).__name__}: {error}"
                self._torn = self._torn or f"update_in_backward ended in the middle: {told}"
        unit.consume_gradient()
        # At stage 3 a unit that is whole now is not when the next pass gathers it.
        pending = unit.publish() if unit.stage < 3 else None
        if pending is not None:
            self._pending.append(pending)

    def _begin(self) -> None:
        self._before_change()
        order, self._order = self._order, []
        self._homes.expect(p.weights for each in order for p in each.optimizer_pieces)

    def _update(self, unit: Unit) -> None:
        unit.settle_gradient()
        square = vector_norm(unit.grad).double().square_()
        self._squares[unit.index] = square
        used = unit.used if unit.group.size == 1 else [True] * len(unit.params)
        if not _is_known(square):
            self._update_unless(unit, used, ~torch.isfinite(square))
            return
        self._finite = self._finite and math.isfinite(float(square))
        if self._finite:
            self._step.run(unit, used)
            self._updated = self._updated + 1

    def _update_unless(self, unit: Unit, used: list[bool], wrong: torch.Tensor) -> None:
        """Update, unless a gradient up to now is not finite, which the host would have to wait for.

        An optimizer that cannot leave a step out then takes it with a gradient of zeros.
        """
        if not self._finite:
            return
        here = self._finite_there
        here = self._finite_there = ~wrong if here is None else here & ~wrong
        done: torch.Tensor | int = 1
        if fused.can_leave_out(self._optimizer):
            done = here
            InnerStep(self._optimizer, 1.0, unless=~here).run(unit, used)
        else:
            unit.grad.masked_fill_(~here, 0.0)
            self._step.run(unit, used)
        self._updated = self._updated.to(here.device) + done

    # ------------------------------------------------------------------ the step

    def known(self) -> Known:
        """See `HostStep.known`."""
        return Known(self._squares, self._updated, self._failure)

    @property
    def torn(self) -> str | None:
        """What left only some units updated; None if nothing did."""
        if self._torn is None and self._is_running and self._seen:
            return (
                f"a backward with update_in_backward ended in the middle, after "
                f"{len(self._seen)} of {len(self._units)} units"
            )
        return self._torn

    @torn.setter
    def torn(self, reason: str | None) -> None:
        self._torn = reason

    def judge(self, agreed: Agreement) -> None:
        """Some units were updated already: then all gradients must be finite."""
        if agreed.norm is None or bool(torch.isfinite(agreed.norm)):
            return
        if agreed.updated:
            self._torn = self._torn or (
                f"a gradient was not finite when {agreed.updated} of {len(self._units)} units were "
                f"updated in backward already"
            )

    def update(self, agreed: Agreement, grad_scale: float | torch.Tensor) -> None:
        """End the step: wait until the model has the new parameters.

        Raises ShardError for gradients that were not finite, or should have been scaled.
        """
        norm = agreed.norm
        assert norm is not None
        while self._pending:
            self._pending.pop().wait()
        if not bool(torch.isfinite(norm)):
            what = f"update_in_backward: the gradient norm is {float(norm)}"
            if self._torn is not None:
                raise TornShardError(f"{what}: {advice(self._torn)}")
            raise ShardError(f"{what}; no unit was updated")
        if float(grad_scale) != 1.0:
            raise ShardError(
                f"update_in_backward: gradients cannot be multiplied by {float(grad_scale):g} "
                f"(clipping, or a loss scale) after they have been used; shard without it"
            )

    def forget(self, *, is_torn: bool) -> None:
        """The next backward begins a step."""
        super().forget(is_torn=is_torn)
        self._begin_step()

    def _begin_step(self) -> None:
        self._torn = self.torn  # of a backward that has not ended
        self._is_running = False
        self._seen.clear()
        self._squares.clear()
        self._failure = None
        self._finite, self._finite_there = True, None
        self._updated = torch.zeros((), dtype=torch.float64)

    def mend(self) -> None:
        """See `HostStep.mend`."""
        self._begin_step()
        super().mend()


def _is_known(number: torch.Tensor) -> bool:
    """Whether the host reads it without waiting for a device."""
    return number.device.type == "cpu"
