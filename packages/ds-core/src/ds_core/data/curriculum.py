"""Short sequences first: training inputs are cut to a length that grows with the steps.

Source: Li et al. 2021, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for
Training GPT Models" (2108.06084).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ds_core.data.schedule import Schedule
from ds_core.errors import ConfigError
from ds_core.seams.observer import Event

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

_ARGUMENT = "curriculum_seqlen"


class SequenceLengthCurriculum:
    """Cuts what the model is called with in training to a number of tokens, by the step.

    The sequence is dimension 1 of the first integer tensor with two dimensions or more (of the
    first tensor, if none is of integers). Every tensor whose dimension 1 is as long is cut there;
    a mask (booleans, or an argument with "mask" in its name) along each of its last two dimensions
    that is. A model whose forward has an argument `curriculum_seqlen` gets the length instead, and
    cuts for itself.

    Args:
        schedule: tokens at each optimizer step, counted from 1.

    Evaluation is left alone. There is no state: the length is that of the engine's step.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._passes_length: bool | None = None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Nothing to watch."""

    def length_at(self, step: int) -> int:
        """Tokens of a sequence after `step` optimizer steps."""
        return int(self.schedule(step + 1))

    def adjust_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs, cut; see `InputAdjuster`."""
        length = self.length_at(engine.global_step)
        if self._passes_length is None:
            self._passes_length = _ARGUMENT in inspect.signature(engine.module.forward).parameters
        if self._passes_length:
            return args, {**kwargs, _ARGUMENT: length}
        return cut_inputs(args, kwargs, length)


def cut_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments whose sequences have at most `length` tokens; see `SequenceLengthCurriculum`."""
    whole = _sequence_length([*args, *kwargs.values()])
    if whole is None or whole <= length:
        return args, dict(kwargs)
    cut_args = tuple(_cut(value, "", whole, length) for value in args)
    return cut_args, {key: _cut(value, key, whole, length) for key, value in kwargs.items()}


def _sequence_length(values: list[Any]) -> int | None:
    tensors = [t for value in values for t in _tensors(value) if t.dim() >= 2]
    integers = [t for t in tensors if not t.is_floating_point() and t.dtype is not torch.bool]
    found = (integers or tensors)[:1]
    return found[0].shape[1] if found else None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _cut(value: Any, name: str, whole: int, length: int) -> Any:
    if isinstance(value, torch.Tensor):
        for dim in _sequence_dims(value, name):
            if value.shape[dim] == whole:
                value = value.narrow(dim, 0, length)
        return value
    if isinstance(value, Mapping):
        return {key: _cut(item, str(key), whole, length) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(item, name, whole, length) for item in value)
    return value


def _sequence_dims(tensor: torch.Tensor, name: str) -> list[int]:
    """Dimensions along which a tensor may have one place per token."""
    if tensor.dim() < 2:
        return []
    if tensor.dtype is not torch.bool and "mask" not in name:
        return [1]
    if tensor.dim() == 2:  # per sample, or of queries and keys
        return [0, 1] if tensor.shape[0] == tensor.shape[1] else [1]
    return [tensor.dim() - 2, tensor.dim() - 1]


def sequence_length_observer(config: Config) -> SequenceLengthCurriculum | None:
    """The curriculum that a config asks for, in either of the two sections that can."""
    from ds_core.data.config import CurriculumSection, DataEfficiencySection

    found: dict[str, Schedule] = {}
    legacy = config.section("curriculum_learning")
    if isinstance(legacy, CurriculumSection) and legacy.enabled:
        found["curriculum_learning"] = legacy.schedule("curriculum_learning")
    section = config.section("data_efficiency")
    if isinstance(section, DataEfficiencySection):
        by_metric = section.data_sampling.curriculum_learning
        for name, metric in by_metric.curriculum_metrics.items() if by_metric.enabled else ():
            if cuts_sequences(name, metric.clustering_type):
                where = (
                    f"data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.{name}"
                )
                found[where] = metric.schedule(where)
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(found)}: both cut sequences; keep one of them")
    return SequenceLengthCurriculum(*found.values()) if found else None


def cuts_sequences(metric_name: str, clustering_type: str) -> bool:
    """Whether a metric of a curriculum is a length to which inputs are cut."""
    return clustering_type == "single_cluster" and metric_name in ("seqlen", "seqlen_truncate")
