"""A model's operations, multiply-accumulates and parameters in one call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ds_core.errors import DsError
from ds_core.profiling.profile import Profile
from ds_core.profiling.profiler import FlopsProfiler
from ds_core.profiling.report import number


def profile_model(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    warm_up: int = 1,
    ignore_modules: Sequence[type[nn.Module]] = (),
    mode: Literal["forward", "generate"] = "forward",
) -> Profile:
    """The profile of one forward of a model in evaluation mode.

    Args:
        model: left as it was: mode, parameters, gradients and random states.
        input_shape: of a single input of zeros in the model's dtype and on its device; else
        args: positional arguments, and
        kwargs: keyword arguments of the call.
        warm_up: calls before the one that is profiled.
        ignore_modules: classes of modules to leave out, with what is below them.
        mode: whether the model is called, or its method `generate`.

    Raises DsError if neither a shape nor arguments are given, or the mode is unknown.
    """
    call = _method(model, mode)
    kwargs = dict(kwargs or {})
    if input_shape is not None:
        if args or kwargs:
            raise DsError(
                "get_model_profile: got input_shape and arguments; give the shape of a single "
                "input, or args and kwargs"
            )
        args = [_zeros(model, input_shape)]
    if not args and not kwargs:
        raise DsError(
            "get_model_profile: nothing to call the model with; give input_shape, args or kwargs"
        )
    modes = {module: module.training for module in model.modules()}
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    devices = [] if device.type == "cpu" else [device]
    profiler = FlopsProfiler(model, ignore=ignore_modules)
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=_rng_type(device)):
            for _ in range(warm_up):
                call(*args, **kwargs)
            with profiler:
                call(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    return profiler.profile()


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | os.PathLike[str] | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: Literal["forward", "generate"] = "forward",
) -> tuple[int, int, int] | tuple[str, str, str]:
    """Operations, multiply-accumulates and parameters of one forward: (flops, macs, params).

    Args:
        model, input_shape, args, kwargs, warm_up, ignore_modules, mode: see `profile_model`.
        print_profile: whether the report is written, to `output_file` or to standard output.
        detailed, module_depth, top_modules: see `ds_core.profiling.report.written`.
        as_string: whether the three are texts such as "1.23 G", or exact integers.
        output_file: replaced if it exists; its folder is created.
    """
    profile = profile_model(
        model,
        input_shape,
        args,
        kwargs,
        warm_up=warm_up,
        ignore_modules=tuple(ignore_modules or ()),
        mode=mode,
    )
    if print_profile:
        text = profile.text(module_depth=module_depth, top_modules=top_modules, detailed=detailed)
        if output_file is None:
            sys.stdout.write(text)
        else:
            write_report(output_file, text)
    if as_string:
        return (
            number(profile.forward_flops, "FLOPs"),
            number(profile.macs, "MACs"),
            number(profile.parameters),
        )
    return profile.forward_flops, profile.macs, profile.parameters


def write_report(path: str | os.PathLike[str], text: str) -> None:
    """Write a report to a file, whose folder is created. Raises DsError if it cannot be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DsError(
            f"flops_profiler.output_file: cannot write {os.fspath(path)!r}: {error}"
        ) from error


def _method(model: nn.Module, mode: str) -> Callable[..., Any]:
    if mode not in ("forward", "generate"):
        raise DsError(f"get_model_profile: mode: got {mode!r}, expected one of forward, generate")
    if mode == "forward":
        return model
    found: Callable[..., Any] | None = getattr(model, "generate", None)
    if found is None:
        raise DsError(
            f'get_model_profile: mode="generate", but {type(model).__name__} has no method generate'
        )
    return found


def _zeros(model: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    like = next(model.parameters(), torch.empty(()))
    return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)


def _rng_type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
