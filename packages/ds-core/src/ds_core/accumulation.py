"""Which micro-batch ends a step: counted, said by the caller, or left to `engine.step()`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ds_core.errors import DsError


class Accumulation:
    """The micro-batches of one optimizer step.

    Args:
        steps: micro-batches per step.
        managed: whether they are counted; if not, each `engine.step()` ends a step, however many
            backwards came before it.

    Attributes:
        steps: what each loss is divided by.
        held: whether backwards accumulate locally for now.
    """

    def __init__(self, steps: int, *, managed: bool = True) -> None:
        self.steps, self.managed = steps, managed
        self.held = False
        self._done = 0
        self._begun = False
        self._has_gradients = self._has_stepped = False
        self._said: bool | None = None

    @property
    def is_boundary(self) -> bool:
        """Whether the present micro-batch is the last of its step, as far as is known."""
        if self._said is not None:
            return self._said
        # At least, because the caller may have put a boundary off before it was counted again.
        return self.managed and self._done >= self.steps - 1

    @property
    def is_between_steps(self) -> bool:
        """Whether nothing of the next step has been computed."""
        return not self._begun and self._done == 0

    def say(self, is_boundary: bool | None) -> None:
        """The caller's word on the boundary counts from now on; None: count again."""
        if not self.managed:
            raise DsError(
                "set_boundary: managed_gradient_accumulation is false, so every engine.step() ends "
                "a step; leave it true to set boundaries, or call step() only where one ends"
            )
        self._said = is_boundary

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Micro-batches inside are counted, whether or not they are otherwise."""
        managed, self.managed = self.managed, True
        try:
            yield
        finally:
            self.managed = managed

    def begin(self) -> bool:
        """A training forward begins; whether it is the first of its step."""
        first, self._begun = not self._begun, True
        return first

    def advance(self) -> bool:
        """A micro-batch is over; whether its step is."""
        ends = self.is_boundary or not self.managed
        self._done = 0 if ends else self._done + 1
        self._begun = self._begun and not ends
        if ends:
            self._has_gradients = self._has_stepped = False
        return ends

    def note_backward(self, *, took_step: bool) -> None:
        """A backward begins, whose gradients are added up; `took_step`: and used at once."""
        self._has_gradients = True
        self._has_stepped = self._has_stepped or took_step

    def forget_gradients(self) -> None:
        """What backwards have added up is gone; a step that they took is not."""
        self._has_gradients = False

    def restart(self) -> None:
        """The step that was begun is given up: the next micro-batch is the first of one."""
        self._done, self._begun = 0, False

    def replace(self) -> None:
        """Parameters, optimizer state and step number are others now, and of one step."""
        self.restart()
        self._has_gradients = self._has_stepped = False

    def resize(self, what: str, samples: int, per_micro_batch: int) -> None:
        """Make a step as many micro-batches as `samples` need. Raises DsError if not whole ones."""
        self.check_between_steps(what)
        if samples <= 0 or samples % per_micro_batch:
            raise DsError(
                f"{what}: got {samples}, expected a positive multiple of {per_micro_batch}, the "
                f"samples of one micro-batch on all ranks"
            )
        self.steps = samples // per_micro_batch

    def check_between_steps(self, what: str) -> None:
        """Raise DsError in the middle of a step."""
        if not self.is_between_steps:
            raise DsError(
                f"{what}: {self._done} micro-batches of the present step are done; call it right "
                f"after a step() that returned True, or before the first forward"
            )

    def warn_of_loss(self, what: str) -> None:
        """Warn if backwards of the present step have run, whose gradients `what` leaves out.

        Raises DsError if they have updated parameters, which the step's number, the schedule and
        the loss scale do not know yet.
        """
        if self._has_stepped:
            raise DsError(
                f"{what}: backward has updated parameters already (update_in_backward), and the "
                f"step is not counted: whoever resumes would take it twice. Save right after a "
                f"step() that returned True"
            )
        told = "a backward of the present step has run"
        if self._done:
            told = f"{self._done} micro-batches of the present step are done"
        if self._done or self._has_gradients:
            warnings.warn(
                f"{what}: {told}, and gradients are not part of a checkpoint: whoever resumes "
                f"goes on behind them. Save right after a step() that returned True",
                stacklevel=3,
            )


class Held(AbstractContextManager[None]):
    """Backwards inside accumulate locally.

    Args:
        accumulation: whose backwards.
        release: called at the end of the outermost block, unless an error ended it.
    """

    def __init__(self, accumulation: Accumulation, release: Callable[[], None]) -> None:
        self._accumulation, self._release = accumulation, release
        self._before = False

    def __enter__(self) -> None:
        self._before, self._accumulation.held = self._accumulation.held, True

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._accumulation.held = self._before
        if kind is None and not self._before:
            self._release()
