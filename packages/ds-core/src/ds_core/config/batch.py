"""The batch triangle: global batch = micro-batch x accumulation steps x data-parallel world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ds_core.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """A consistent triangle, in samples.

    Attributes:
        train: samples per optimizer step over all ranks.
        micro: samples per forward on one rank.
        steps: forwards per optimizer step.
    """

    train: int
    micro: int
    steps: int


@runtime_checkable
class BatchPolicy(Protocol):
    """A config section that chooses the batch itself, in place of the file's batch keys."""

    def solve_batch(self, world_size: int) -> Batch | None:
        """The triangle for so many data-parallel ranks; None to leave it to the batch keys.

        Raises ConfigError if the batch does not divide among them.
        """
        ...

    @property
    def overrules(self) -> bool:
        """Whether batch keys that are given too are ignored; if not, they are an error."""
        ...


def solve(train: int | None, micro: int | None, steps: int | None, *, world_size: int) -> Batch:
    """The triangle that the given corners determine.

    Two corners give the third. The global batch alone or the micro-batch alone means one
    accumulation step.

    Args:
        train: `train_batch_size`, or None if not given.
        micro: `train_micro_batch_size_per_gpu`, or None.
        steps: `gradient_accumulation_steps`, or None.
        world_size: data-parallel ranks.

    Raises ConfigError if they contradict, do not divide, or say too little; it shows the sums.
    """
    if train is None and micro is None:
        raise ConfigError(
            "train_batch_size: missing; give it or train_micro_batch_size_per_gpu "
            "(gradient_accumulation_steps alone does not determine a batch)"
        )
    if train is None:
        assert micro is not None
        return Batch(micro * (steps or 1) * world_size, micro, steps or 1)
    if micro is None:
        steps = steps or 1
        return Batch(train, _divide(train, world_size, "gradient_accumulation_steps", steps), steps)
    if steps is None:
        key = "train_micro_batch_size_per_gpu"
        return Batch(train, micro, _divide(train, world_size, key, micro))
    if train != micro * steps * world_size:
        raise ConfigError(
            f"train_batch_size: got {train}, but train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {steps} x {_world(world_size)} = "
            f"{micro * steps * world_size}; change one, or remove one and it is solved for"
        )
    return Batch(train, micro, steps)


def _divide(train: int, world_size: int, key: str, value: int) -> int:
    """`train / (value x world)`, which must come out even."""
    per_step = value * world_size
    quotient, rest = divmod(train, per_step)
    if rest:
        below, above = quotient * per_step, (quotient + 1) * per_step
        nearby = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"train_batch_size: got {train}, not a multiple of {key} {value} x "
            f"{_world(world_size)} = {per_step}; use {nearby}"
        )
    return quotient


def _world(world_size: int) -> str:
    return f"{world_size} data-parallel rank{'' if world_size == 1 else 's'}"
