"""Where a parameter stands in the mesh: what its gradient is averaged over, how it is split."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """How one parameter relates to the mesh's axes.

    Attributes:
        grad_axes: axes over which its gradient is averaged, and over which ZeRO may shard it.
        split_axis: axis ("tp" or "ep") over which it is split, or None if it is whole.
        split_dim: dimension of the tensor that is split, when `split_axis` is set.
    """

    grad_axes: tuple[str, ...] = ("dp",)
    split_axis: str | None = None
    split_dim: int | None = None

    def __post_init__(self) -> None:
        if (self.split_axis is None) != (self.split_dim is None):
            raise ValueError(
                f"Placement: split_axis={self.split_axis!r} and split_dim={self.split_dim!r} go "
                f"together; set both or neither"
            )


_DATA_PARALLEL = Placement()
_ATTRIBUTE = "ds_placement"


def place(param: torch.nn.Parameter, placement: Placement) -> torch.nn.Parameter:
    """Tag `param` with its placement; returns the parameter. Tensor and expert layers do this."""
    setattr(param, _ATTRIBUTE, placement)
    return param


def placement_of(param: torch.Tensor) -> Placement:
    """The placement that `param` was tagged with, or averaged over "dp" and whole."""
    placement = getattr(param, _ATTRIBUTE, _DATA_PARALLEL)
    return placement if isinstance(placement, Placement) else _DATA_PARALLEL
