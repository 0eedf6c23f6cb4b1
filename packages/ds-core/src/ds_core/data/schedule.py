"""How a quantity grows with the steps of a run: difficulty of data, or tokens that a layer sees.

A schedule is a function of the number of the step alone, so there is nothing to save: a run that
resumes at a step is where the schedule says.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_core.errors import ConfigError, DsError

#: The value at a step, counted from 1 for the first optimizer step.
Schedule = Callable[[int], int]


@dataclass(frozen=True)
class FixedRoot:
    """From `minimum` to `maximum` in `total_steps`, fast first: by a root of the steps' share.

    value(t) = minimum + (maximum - minimum) (t / total_steps)^(1 / degree), rounded down to a
    multiple of `multiple_of`, but never below the first multiple that `minimum` allows, and never
    above `maximum`.

    Args:
        minimum, maximum: of the value.
        total_steps: optimizer steps until the maximum.
        multiple_of: every value but the maximum is one of these; 8 suits tensor cores.
        degree: 1 is a straight line, 2 a square root.

    Source: Li et al. 2021, "The Stability-Efficiency Dilemma" (2108.06084), section 4.
    """

    minimum: int
    maximum: int
    total_steps: int
    multiple_of: int = 1
    degree: float = 1.0

    def __post_init__(self) -> None:
        for name in ("minimum", "total_steps", "multiple_of", "degree"):
            if getattr(self, name) <= 0:
                raise DsError(f"schedule: {name} is {getattr(self, name)}, expected more than 0")
        if self.maximum < self.minimum:
            raise DsError(
                f"schedule: the maximum {self.maximum} is below the minimum {self.minimum}"
            )

    def __call__(self, step: int) -> int:
        share = min(1.0, max(0, step) / self.total_steps) ** (1.0 / self.degree)
        if share == 1.0:
            return self.maximum
        value = math.floor(self.minimum + (self.maximum - self.minimum) * share)
        value -= value % self.multiple_of
        first = -(-self.minimum // self.multiple_of) * self.multiple_of
        return min(max(value, first), self.maximum)


@dataclass(frozen=True)
class FixedLinear(FixedRoot):
    """From `minimum` to `maximum` in `total_steps`, evenly; see `FixedRoot`."""


@dataclass(frozen=True)
class FixedDiscrete:
    """Given values, each up to a given step, and the last one from then on.

    Args:
        values: one more than `last_steps`.
        last_steps: ascending; `values[i]` holds up to and including step `last_steps[i]`.
    """

    values: Sequence[int]
    last_steps: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.last_steps) + 1:
            raise DsError(
                f"schedule: {len(self.values)} values and {len(self.last_steps)} last steps; the "
                f"last value has none, so there must be one value more"
            )
        if list(self.last_steps) != sorted(set(self.last_steps)):
            raise DsError(f"schedule: the last steps {list(self.last_steps)} must ascend")

    def __call__(self, step: int) -> int:
        for value, last in zip(self.values, self.last_steps, strict=False):
            if step <= last:
                return value
        return self.values[-1]


def load_function(path: str, where: str) -> Schedule:
    """The function that "package.module:name" names, from a step to a value.

    where: the config key, for the error. Raises ConfigError if it cannot be imported.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f'{where}: got "{path}", expected "package.module:function"')
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'{where}: "{path}" cannot be imported: {error}; give a function on the Python path '
            f"that takes the number of the step and returns the difficulty"
        ) from error
    if not callable(function):
        raise ConfigError(f'{where}: "{path}" is a {type(function).__name__}, no function')
    schedule: Schedule = function
    return schedule
