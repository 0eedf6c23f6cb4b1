"""Where figures go: what a sink is, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch

from ds_core.errors import DsError
from ds_core.seams import EventKind

#: Names that DeepSpeed gives to figures of a step; the others keep ours.
_ORIGINAL_NAMES = {
    "loss": "train_loss",
    "forward_s": "elapsed_time_ms_forward",
    "backward_s": "elapsed_time_ms_backward",
}
_PREFIX = "Train/Samples/"


@dataclass(frozen=True)
class Record:
    """What one event measured.

    Attributes:
        kind: START (values: what was decided), STEP_END, LOG (the user's own) or CHECKPOINT.
        step: optimizer steps taken.
        samples: samples taken from the data so far, over all ranks.
        values: figures and texts by name; a tensor is a scalar that nobody has waited for yet.
    """

    kind: EventKind
    step: int
    samples: int
    values: Mapping[str, Any]

    def scalars(self) -> Iterator[tuple[str, float]]:
        """The numbers of a step or of `engine.log`, under the names that dashboards show.

        Those of a step begin with "Train/Samples/", as DeepSpeed's do, and are drawn over
        `samples`; durations that DeepSpeed has too are in its milliseconds. The user's own names
        stay as they are.
        """
        if self.kind not in (EventKind.STEP_END, EventKind.LOG):
            return
        for name, value in self.values.items():
            number = as_number(value)
            if number is None:
                continue
            if self.kind is EventKind.LOG:
                yield name, number
                continue
            original = _ORIGINAL_NAMES.get(name, name)
            scale = 1e3 if original.startswith("elapsed_time_ms") else 1.0
            yield _PREFIX + original, number * scale
        if "update_s" in self.values:
            duration = self.values["norm_s"] + self.values["update_s"]
            yield _PREFIX + "elapsed_time_ms_step", duration * 1e3


@runtime_checkable
class Sink(Protocol):
    """Writes figures somewhere; exists on rank 0 only."""

    def write(self, record: Record) -> None:
        """Write what `record` holds and this sink can show."""

    def close(self) -> None:
        """Write what is left; called once."""


def as_number(value: Any) -> float | None:
    """`value` as a float if it is a number, truth value or scalar tensor, else None."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, bool | int | float) else None


def as_plain(value: Any) -> Any:
    """`value` as JSON can hold it: what is not finite becomes a string, because JSON has no NaN."""
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def vendor(section: str, module: str, extra: str) -> Any:
    """The module of a dashboard's own package.

    Raises DsError naming the config `section` and what to install, if it is missing.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DsError(
            f"{section}.enabled: {package} cannot be imported ({error}); pip install "
            f"'ds-core[{extra}]', or set {section}.enabled to false"
        ) from error
