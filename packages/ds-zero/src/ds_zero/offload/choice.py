"""`Offload`: what leaves the device, and where to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ds_zero.errors import ShardError

#: Where a kind of state lives while nobody uses it.
Tier = Literal["device", "cpu", "nvme"]


@dataclass(frozen=True)
class Offload:
    """Where the parts of a shard live while nobody uses them.

        ds_zero.shard(model, optimizer, 3, offload=ds_zero.Offload(optimizer="cpu"))

    Attributes:
        optimizer: home of master weights and moments. On "cpu" and "nvme" the step runs on the
            CPU, and gradients go to the host as they are averaged.
        parameters: home of parameter shards; other than "device" only at stage 3.
        folder: on the disk that "nvme" means. Files in it are gone when the process ends, however
            it ends.
        parameters_folder: the same for parameters; default: `folder`.
        ratio: share of the optimizer's elements that leave the device, in whole units; the rest
            is updated there. "auto": found by measuring both sides (Twin-Flow).
        speculative: step the units on the host while backward runs, before the gradient norm is
            known, and take the step back, to the bit, where it asks for clipping (SuperOffload).
            Needs memory for weights and states a second time, from backward to step.
        pin_memory: whether host memory is page-locked, for copies beside the program.
        piece_numel: elements of one read or write of states on disk; a larger parameter is one.
        buffers: such pieces in memory at a time: read ahead, updated, written. As in a config.
        parameter_buffers: shards of parameters on their way between memory and disk at a time. As
            in a config.
        max_numel_in_cpu: with parameters on "nvme": so many elements stay in host memory. None by
            default, since "nvme" says disk; a config's `max_in_cpu` is 10**9, as DeepSpeed's.
    """

    optimizer: Tier = "device"
    parameters: Tier = "device"
    folder: str | None = None
    parameters_folder: str | None = None
    ratio: float | Literal["auto"] = 1.0
    speculative: bool = False
    pin_memory: bool = True
    piece_numel: int = 1 << 24
    buffers: int = 4
    parameter_buffers: int = 5
    max_numel_in_cpu: int = 0

    def __post_init__(self) -> None:
        for name in ("optimizer", "parameters"):
            if getattr(self, name) not in get_args(Tier):
                raise ShardError(
                    f"offload: {name}: got {getattr(self, name)!r}, expected one of "
                    f"{', '.join(map(repr, get_args(Tier)))}"
                )
        homeless = self.optimizer == "nvme" and not self.folder
        if homeless or (self.parameters == "nvme" and not self.folder_of_parameters):
            raise ShardError(
                'offload: "nvme" needs a folder on that disk: Offload(folder="/mnt/nvme"), in a '
                "config nvme_path"
            )
        self._check_split()
        for name, least in (
            ("piece_numel", 1),
            ("buffers", 2),
            ("parameter_buffers", 1),
            ("max_numel_in_cpu", 0),
        ):
            if getattr(self, name) < least:
                raise ShardError(
                    f"offload: {name}: got {getattr(self, name)}, expected at least {least}"
                )

    def _check_split(self) -> None:
        """Raise ShardError for a `ratio` or `speculative` that makes no sense of `optimizer`."""
        if self.ratio != "auto" and not 0.0 <= self.ratio <= 1.0:
            raise ShardError(f'offload: ratio: got {self.ratio!r}, expected 0 to 1, or "auto"')
        if self.ratio != 1.0 and self.optimizer == "device":
            raise ShardError(
                f"offload: ratio: got {self.ratio!r}, but nothing of the optimizer leaves the "
                f'device; set optimizer="cpu"'
            )
        if self.ratio == "auto" and self.optimizer != "cpu":
            raise ShardError(
                f'offload: ratio: got "auto" with optimizer={self.optimizer!r}; states are moved '
                f'between the device and host memory only: set optimizer="cpu", or give a number'
            )
        if self.speculative and self.optimizer != "cpu":
            why = (
                "whose states on disk would have to be read again to be taken back"
                if self.optimizer == "nvme"
                else "where no step waits for the host"
            )
            raise ShardError(
                f'offload: speculative: got True with optimizer="{self.optimizer}", {why}; set '
                f'optimizer="cpu", or leave it out'
            )

    @property
    def folder_of_parameters(self) -> str | None:
        """Where parameters on "nvme" are."""
        return self.parameters_folder or self.folder

    @property
    def splits(self) -> bool:
        """Whether host and device may both have states to update."""
        return self.optimizer != "device" and self.ratio not in (0.0, 1.0)

    def check_stage(self, stage: int) -> None:
        """Raise ShardError for a stage at which the parameters cannot leave the device."""
        if self.parameters != "device" and stage != 3:
            raise ShardError(
                f"offload: parameters: got {self.parameters!r} at stage {stage}, where every rank "
                f"computes with all of them; use stage 3, or offload the optimizer only"
            )

    def states_of(self, sizes: Sequence[int]) -> list[Tier]:
        """Where the states of each unit live, of so many elements each.

        The last units leave first: their gradients are the first that a backward has, so the CPU
        starts early. As many leave as come nearest to `ratio` of all elements.
        """
        if self.optimizer == "device":
            return ["device"] * len(sizes)
        # Half to begin with, so that both sides can be measured.
        ratio = (0.5 if len(sizes) > 1 else 1.0) if self.ratio == "auto" else self.ratio
        leaves = nearest_split(sizes, ratio * sum(sizes))
        return [self.optimizer if leave else "device" for leave in leaves]


def nearest_split(sizes: Sequence[int], wanted: float) -> list[bool]:
    """Which units leave, from the last on, so that about `wanted` of all their elements do."""
    total, found = 0, list[bool]()
    for size in reversed(sizes):
        leaves = abs(total + size - wanted) <= abs(total - wanted)
        total += size if leaves else 0
        found.append(leaves)
    return found[::-1]


def is_host(device: torch.device) -> bool:
    """Whether what lives on the device is in host memory already."""
    return device.type == "cpu"
