"""How kernels in Triton are run, or written into the graph that torch.compile makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from ds_ops import _env
from ds_ops.triton_kernels.kernel import Config, Kernel

_tracing: ContextVar[bool] = ContextVar("ds_ops_triton_tracing", default=False)


def tracing() -> bool:
    """Whether launches are written down at present, not run: there are no values to look at."""
    return _tracing.get()


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its launches written into the graph that is being made."""

    @functools.wraps(function)
    def seen(*args: Any, **kwargs: Any) -> Any:
        token = _tracing.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _tracing.reset(token)

    return seen


def launch(
    kernel: Kernel, config: Config, grid: tuple[int, ...], *args: Any, **constants: int | bool
) -> None:
    """Run a kernel on the device of its first argument; an empty grid does nothing.

    Args:
        args: the function's, in order, up to its constants.
        constants: those that are not the config's.
    """
    if 0 in grid:
        return
    constants |= config.constants
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if tracing():
        _env.keep_fp_fusion()
        torch.library.wrap_triton(kernel.function)[grid](*args, **constants, **options)
        return
    with torch.cuda.device_of(args[0]):
        kernel.function[grid](*args, **constants, **options, enable_fp_fusion=True)
