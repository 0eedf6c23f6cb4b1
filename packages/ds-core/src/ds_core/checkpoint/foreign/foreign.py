"""`Foreign`: what was found in a checkpoint of another format, and what could not be placed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_core.checkpoint.jsonable import encode
from ds_core.checkpoint.lazy import MODEL, OPTIMIZER, LazyState, LazyTensor
from ds_core.checkpoint.unpickling import Record
from ds_core.errors import CheckpointError


@dataclass
class Foreign:
    """A checkpoint of another format, opened.

    Attributes:
        kind: what it is, in words.
        state: what it holds, in the layout of an `Engine`'s checkpoint.
        missing: what it speaks of, but does not hold.
        unexpected: tensors that it holds, of which it is not clear what they are.
        ignored: what is left out on purpose, and why.
        aliases: further names of tied weights.
        frozen: parameters that were not trained.
        buffers: names of the model's buffers.
    """

    kind: str
    state: LazyState = field(default_factory=LazyState)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    frozen: list[str] | None = None
    buffers: list[str] = field(default_factory=list)

    def add_weight(
        self,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[], torch.Tensor],
        read_flat: Callable[[int, int], torch.Tensor] | None = None,
    ) -> None:
        """State where a parameter or buffer of the model is."""
        self._add((MODEL, name), dtype, shape, read, read_flat)

    def add_moment(
        self,
        key: str,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[], torch.Tensor],
    ) -> None:
        """State where an optimizer's tensor of a parameter is, such as key "exp_avg"."""
        self._add((OPTIMIZER, key, name), dtype, shape, read)

    def add_moment_tensor(self, key: str, name: str, tensor: torch.Tensor) -> None:
        """An optimizer's tensor that is in memory, or mapped into it."""
        self.add_moment(key, name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def add_step(self, name: str, step: Any) -> None:
        """State how many steps a parameter has been through, as torch's optimizers keep it."""
        value = torch.tensor(float(step), dtype=torch.float32)
        self.add_moment("step", name, torch.float32, (), lambda: value)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """A weight that is in memory, or mapped into it."""
        self.add_weight(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def add_client(self, values: Mapping[str, Any]) -> None:
        """Keep what a user saved beside the model, as far as a checkpoint can hold it."""
        client = self.state.values.setdefault("client", {})
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                client[key] = value
                continue
            try:
                encode(value, key)
            except CheckpointError:
                kind = type(value).__name__
                told = "an object" if isinstance(value, Record) else "a value"
                self.ignored[f"client.{key}"] = f"{told} of type {kind}, which JSON cannot hold"
            else:
                client[key] = value

    def _add(
        self,
        path: tuple[str, ...],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[], torch.Tensor],
        read_flat: Callable[[int, int], torch.Tensor] | None = None,
    ) -> None:
        full = ".".join(path)
        if full in self.state.tensors:
            raise CheckpointError(f"{self.kind}: {full} is there twice")
        self.state.tensors[full] = LazyTensor(path, dtype, shape, read, read_flat)


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer's group as plain values."""
    return {
        str(key): value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
        for key, value in group.items()
        if key not in ("params", "step", "names")
    }


def engine_values(
    step: int, *, skipped: int = 0, samples: int = 0, scale: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What an `Engine` keeps of its own in a checkpoint."""
    return {
        "global_step": step,
        "skipped_steps": skipped,
        "loss_scale": dict(scale or {"scale": 1.0, "good_steps": 0, "tolerated": 1}),
        "samples": samples,
    }


def same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same elements, which torch saves once."""
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
