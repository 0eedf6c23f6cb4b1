"""What every kernel in Triton shares: its configs by shape and target, and checks of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_core.errors import OpError
from ds_core.ops.arguments import FLOATS, expect
from ds_ops.triton_kernels import targets
from ds_ops.triton_kernels.targets import TARGETS


@dataclass(frozen=True)
class Config:
    """How a kernel is cut for some shapes on some targets.

    Attributes:
        constants: of the kernel, by name: block sizes.
        up_to: the largest sizes that it is for, by name; what is not named may be anything.
        warps: that run one program.
        stages: of a pipelined loop.
        targets: names of the `TARGETS` that it is for.
    """

    constants: Mapping[str, int]
    up_to: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    targets: tuple[str, ...] = tuple(TARGETS)

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is for a call of these sizes."""
        return all(sizes[name] <= limit for name, limit in self.up_to.items())

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{constants} warps={self.warps} stages={self.stages}"


@dataclass(frozen=True)
class Kernel:
    """A function in Triton, and every way in which it is compiled.

    Attributes:
        function: a `triton.jit` function, without autotuning: which config a call takes depends
            on its shape and target alone, so that it is the same everywhere and known beforehand.
        configs: the first that covers a call's sizes is taken.
        types: of its arguments by name, for a compilation ahead of time: "*bf16", "fp32", "i32", or
            "i32:16" for what 16 divides in most calls, which Triton then relies on; or the value of
            a constant that is no part of the configs.
        instructions: what the assembly must contain, by target: `MATRIX` if it multiplies matrices.
        variant: distinguishes kernels of one function.
    """

    function: Any
    configs: Sequence[Config]
    types: Mapping[str, str | int | bool]
    instructions: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        """The function's name, and the variant."""
        name = self.function.__name__
        return f"{name}:{self.variant}" if self.variant else name

    def config(self, op: str, device: torch.device, **sizes: int) -> Config:
        """The config for a call of these sizes on that device.

        Raises OpError, naming the sizes that there are configs for, if none covers them.
        """
        target = targets.of_device(device).name
        offered = [config for config in self.configs if target in config.targets]
        for config in offered:
            if config.covers(sizes):
                return config
        got = ", ".join(f"{name} {size}" for name, size in sizes.items())
        there = "; ".join(
            ", ".join(f"{name} up to {limit}" for name, limit in config.up_to.items())
            for config in offered
        )
        raise OpError(
            f"{op}: {got}: no config of the Triton kernel {self.name} for {target} covers this; "
            f"there are configs for {there or 'other targets only'}; another implementation takes "
            f"it: DS_OPS_IMPL={op}=reference"
        )


def types(by_type: Mapping[str, str], **constants: int | bool) -> dict[str, str | int | bool]:
    """`Kernel.types` from the names of arguments, with spaces between them, by their type."""
    found: dict[str, str | int | bool] = dict(constants)
    for kind, names in by_type.items():
        found.update(dict.fromkeys(names.split(), kind))
    return found


def expect_plain(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise OpError unless tensors are contiguous, and those of floats fp32, bf16 or fp16."""
    for argument, t in tensors.items():
        if t is None:
            continue
        expect(t.is_contiguous(), op, argument, f"strides {list(t.stride())}", "contiguous")
        if t.is_floating_point():
            expect(t.dtype in FLOATS, op, argument, t.dtype, "fp32, bf16 or fp16")


def blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)
