"""Stepping units on the host while backward still runs, before the gradient norm is known.

Clipping, and leaving a step out, need the norm of all gradients, so a plain step on the host begins
when backward ends, and the device waits. Here each unit whose states are on the host is stepped as
soon as its averaged gradient is complete, on the guess that nothing will be clipped, and what takes
the step back is kept. The step itself knows: where the guess was right, it only publishes
the weights; where not, it takes the step back, to the bit, and takes it again. The model computes
with the old weights until then.

Until the step a unit so costs the bytes of its weights and states a second time, and a rounded copy
of the weights where there is a master copy: with fp32 Adam 12 bytes per element, with a bf16 model
14.

Source: Lian et al. 2025, "SuperOffload: Unleashing the Power of Large-Scale LLM Training on
Superchips", section 4.4 (speculation-then-validation).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch

from ds_core import fused
from ds_core.gradients import vector_norm
from ds_core.optimizer_twin import hyperparameters, twin_of
from ds_zero import checks
from ds_zero.agreement import Agreement
from ds_zero.host_steps.host_step import HostStep, Known
from ds_zero.host_steps.twin_flow import TwinFlow
from ds_zero.host_steps.worker import HostWorker
from ds_zero.inner_step import InnerStep, is_all_of
from ds_zero.offload.homes import Homes
from ds_zero.unit import Unit
from ds_zero.unit_piece import OptimizerPiece

logger = logging.getLogger(__name__)


class Speculation(HostStep):
    """Takes the steps of the units on the host ahead of time.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones; those whose states are on the device step as they do without.
        homes: where the states live.
        worker: takes the steps.
        before_change: called before a backward changes anything.
        twins: steps what was not stepped ahead, if host and device do so at the same time.

    A step ahead that fails is undone, and its error raised by the step itself. Where that failed
    too, `torn` says so.

    Attributes:
        taken, redone: units that stepped ahead so far, and those of them that were taken back.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: list[Unit],
        homes: Homes,
        worker: HostWorker,
        before_change: Callable[[], None],
        twins: TwinFlow | None = None,
    ) -> None:
        checks.refuse_whole_matrices(optimizer, "offload: speculative", "set speculative=False")
        checks.refuse_random_rounding(optimizer, "speculative", "leave it out")
        super().__init__(optimizer, units, homes, worker)
        self._worker: HostWorker = worker
        self._before_change, self.twins = before_change, twins
        self._ahead: dict[int, _Ahead] = {}
        # By unit, which parameters the last step updated: what is expected of this one.
        self._used: dict[int, list[bool]] = {}
        self._is_open = False
        self.taken = self.redone = 0
        for unit in self._units:
            unit.on_reduced, unit.on_added = self._reduced, self._take_back_unit

    # ------------------------------------------------------------------ in backward

    def begin_backward(self) -> None:
        """What was stepped with the present gradients is taken back."""
        self.settle()
        self._is_open = self.expected_scale is not None

    def end_backward(self) -> None:
        """What is averaged from now on is not stepped ahead: the step itself is next."""
        self._is_open = False

    def _reduced(self, unit: Unit) -> None:
        # A parameter that this rank did not use may have been used by others. The guess is
        # that this step is as the last one was; the first is taken to use all.
        before = self._used.get(unit.index, [True] * len(unit.params))
        own = unit.used
        if unit.group.size > 1:
            own = [mine or other for mine, other in zip(own, before, strict=True)]
        guesses = self._is_open and unit.states != "device"
        if guesses:
            self._before_change()
        pieces = InnerStep(self._optimizer, 1.0).due(unit, own) if guesses else []
        if not pieces:
            return
        assert self.expected_scale is not None
        ahead = _Ahead(unit, self._optimizer, pieces, own, self.expected_scale, self._note_torn)
        self._ahead[unit.index] = ahead
        ahead.done = self._worker.start(ahead.take)

    def _take_back_unit(self, unit: Unit) -> None:
        """A gradient changes after its unit was stepped with it."""
        ahead = self._ahead.pop(unit.index, None)
        if ahead is None:
            return
        if ahead.error is not None:
            logger.warning("%s: its step ahead failed, and was undone: %s", unit.name, ahead.error)
        elif ahead.finished():
            self.redone += 1
            ahead.take_back()

    def _note_torn(self, reason: str) -> None:
        self.torn = self.torn or reason

    # ------------------------------------------------------------------ the step

    def known(self) -> Known:
        """See `HostStep.known`."""
        self.wait()
        steps = self._ahead.items()
        squares = {index: ahead.square for index, ahead in steps if ahead.square is not None}
        errors = (ahead.error for _, ahead in steps if ahead.error is not None)
        return Known(squares, failure=next(errors, None))

    def judge(self, agreed: Agreement) -> None:
        """Steps with gradients that are not finite, on any rank, are taken back."""
        if agreed.norm is not None and not bool(torch.isfinite(agreed.norm)):
            self.settle()

    def _update_units(
        self, used: dict[int, list[bool]], grad_scale: float | torch.Tensor, step: InnerStep
    ) -> None:
        if self.twins is None:
            super()._update_units(used, grad_scale, step)
        else:
            self.twins.run(used, grad_scale, step, unless=self._was_taken)

    def _update_unit(
        self, unit: Unit, used: list[bool], grad_scale: float | torch.Tensor, step: InnerStep
    ) -> None:
        if not self._was_taken(unit, used, grad_scale):
            step.run(unit, used)

    def _was_taken(self, unit: Unit, used: list[bool], grad_scale: float | torch.Tensor) -> bool:
        """Whether the step of `unit` was taken as it should be; if so, its weights are shown now.

        If not, it is as if it had not been taken.
        """
        self._used[unit.index] = used
        ahead = self._ahead.pop(unit.index, None)
        if ahead is None or not ahead.finished():
            return False
        self.taken += 1
        if not ahead.was_right(used, grad_scale):
            self.redone += 1
            ahead.take_back()
            return False
        ahead.show()
        return True

    def forget(self, *, is_torn: bool) -> None:
        """See `HostStep.forget`."""
        (self.drop if is_torn else self.settle)()
        super().forget(is_torn=is_torn)
        if self.twins is not None:
            self.twins.move()

    # ------------------------------------------------------------------ between steps

    def wait(self) -> None:
        """Nothing is under way; gradients are where they are read."""
        for ahead in self._ahead.values():
            ahead.wait()

    def settle(self) -> None:
        """What was stepped ahead is taken back."""
        for unit in self._units:
            self._take_back_unit(unit)

    def drop(self) -> None:
        """Forget what was stepped ahead, whatever became of it."""
        self.wait()
        for ahead in self._ahead.values():
            ahead.leave()
        self._ahead.clear()

    def undo_bytes(self) -> int:
        """See `HostStep.undo_bytes`."""
        total = 0
        for unit in self._units:
            if unit.states == "device":
                continue
            for piece in unit.optimizer_pieces:
                state = self._optimizer.state.get(piece.weights, {}).values()
                kept = [piece.weights, *(v for v in state if isinstance(v, torch.Tensor))]
                total += sum(tensor.nbytes for tensor in kept if tensor.dim())
            total += unit.layout.shard_numel * unit.dtype.itemsize if unit.rounds else 0
        return total


class _Ahead:
    """The step of one unit, taken ahead.

    Args:
        unit: which is stepped.
        optimizer: the user's.
        pieces: what is updated.
        used: of which parameters.
        scale: factor on its gradient.
        note_torn: told if weights and states could not be put back.
    """

    def __init__(
        self,
        unit: Unit,
        optimizer: torch.optim.Optimizer,
        pieces: list[OptimizerPiece],
        used: list[bool],
        scale: float,
        note_torn: Callable[[str], None],
    ) -> None:
        self._unit, self._optimizer, self._pieces = unit, optimizer, pieces
        self._used, self._scale = list(used), scale
        self._settings = hyperparameters(optimizer)
        self._taken, self._note_torn = False, note_torn
        self._undos: list[Callable[[], None]] = []
        self._rounded: torch.Tensor | None = None
        # The tensors that the model, or a gather, reads; the pieces have their own meanwhile.
        self._shown: list[tuple[OptimizerPiece, torch.Tensor]] = []
        self.square: torch.Tensor | None = None
        self.done: Future[None] | None = None

    def wait(self) -> None:
        """Wait until it is over."""
        if self.done is not None:
            wait([self.done])

    @property
    def error(self) -> BaseException | None:
        """What made it fail, once it is over."""
        return None if self.done is None else self.done.exception()

    def finished(self) -> bool:
        """Wait until it is over; whether there was a step. Raises the error of one that failed."""
        if self.done is not None:
            self.done.result()
        return self._taken

    def was_right(self, used: list[bool], grad_scale: float | torch.Tensor) -> bool:
        """Whether this is the step that should have been taken."""
        same_scale = isinstance(grad_scale, float) and grad_scale == self._scale
        settings = hyperparameters(self._optimizer)
        return same_scale and used == self._used and settings == self._settings

    def take(self) -> None:
        """Step, unless the gradient is not finite."""
        unit = self._unit
        unit.settle_gradient()
        self.square = vector_norm(unit.grad).double().square_()
        if not math.isfinite(float(self.square)):
            return
        if unit.rounds:
            self._rounded = torch.empty(unit.shard.shape, dtype=unit.dtype, device=unit.grad.device)
        # The optimizer's own undo where it is the plain step's kernel that has it, with the same
        # bits: writing rounded weights, it is.
        undoes = self._rounded is not None and fused.can_undo(self._optimizer)
        self._taken = True
        try:
            if not undoes:
                self._keep()
            with twin_of(self._optimizer) as twin:
                if undoes:
                    self._undos.append(_rollback_of(twin))
                step = InnerStep(twin, self._scale, undo=undoes)
                step.take(unit, self._pieces, self._rounded)
        except BaseException:
            self._taken = False
            self.take_back()
            raise

    def _keep(self) -> None:
        """Copy what the step changes; weights that the model computes with are left to it."""
        for piece in self._pieces:
            self._undos.append(_restore_of(self._optimizer, piece.weights))
            if self._unit.master is not None:
                self._undos.append(_back_into(piece.weights, piece.weights.detach().clone()))
                continue
            with self._unit.present(piece, edits=False):
                shown = piece.weights.detach()
                piece.weights.data = shown.clone()
            self._shown.append((piece, shown))

    def take_back(self) -> None:
        """Leave weights and states as they were."""
        try:
            with torch.no_grad():
                self.leave()
                for undo in self._undos:
                    undo()
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            self._note_torn(f"{self._unit.name}: its step ahead could not be undone: {told}")
            raise
        self._undos, self._rounded = [], None

    def leave(self) -> None:
        """The optimizer's weights are those that the model computes with again."""
        for piece, shown in self._shown:
            piece.weights.data = shown
        self._shown = []

    def show(self) -> None:
        """Give the model, or whatever sends to it, the new weights."""
        unit = self._unit
        with unit.updating(whole=is_all_of(unit, self._pieces)) as rounded:
            for piece, shown in self._shown:
                shown.copy_(piece.weights.detach())
                piece.weights.data = shown
            if rounded is not None and self._rounded is not None:
                for piece in self._pieces:
                    part = slice(piece.start, piece.stop)
                    rounded[part].copy_(self._rounded[part])
        self._undos, self._shown, self._rounded = [], [], None


def _rollback_of(twin: Any) -> Callable[[], None]:
    def undo() -> None:
        if twin.can_roll_back:  # not if the step failed before it changed anything
            twin.rollback()

    return undo


def _back_into(tensor: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
    def undo() -> None:
        tensor.detach().copy_(value)

    return undo


def _restore_of(optimizer: torch.optim.Optimizer, weights: torch.Tensor) -> Callable[[], None]:
    """What gives a parameter the state that it has now; tensors stay where they are."""
    present = weights in optimizer.state
    kept = {
        key: (value, value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value))
        for key, value in optimizer.state.get(weights, {}).items()
    }

    def undo() -> None:
        if not present:
            optimizer.state.pop(weights, None)
            return
        state = optimizer.state[weights]
        state.clear()
        for key, (value, saved) in kept.items():
            if isinstance(value, torch.Tensor):
                value.copy_(saved)
                state[key] = value
            else:
                state[key] = saved

    return undo
