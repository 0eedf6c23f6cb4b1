"""Helpers that programs call: memory in use, moving values between devices, small functions."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepspeed._absent import reason_for
from deepspeed._names import names_of
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import print_dist
from ds_core.errors import DsError
from ds_core.observers.memory import peak_resident_bytes, resident_bytes

_GIB = 1024**3
_CLIPS = (
    "the engine clips and knows the norm: gradient_clipping, engine.get_global_grad_norm(); for "
    "gradients outside an engine there is torch.nn.utils.clip_grad_norm_"
)
_PIPE = reason_for("deepspeed.pipe") or ""
_INTERNAL = "it is an inner part of the original package that nothing replaces one to one"

__getattr__, __dir__ = names_of(
    __name__,
    {
        "recursive_getattr": "deepspeed.utils.module_utils:recursive_getattr",
        "recursive_setattr": "deepspeed.utils.module_utils:recursive_setattr",
    },
    missing={
        **dict.fromkeys(
            (
                *("clip_grad_norm_", "get_grad_norm", "get_weight_norm", "get_global_norm"),
                *("get_global_norm_of_tensors", "clip_tensors_by_global_norm", "CheckOverflow"),
                *("get_flattened_grad_norm", "has_inf_or_nan", "is_invalid_grad_norm"),
            ),
            _CLIPS,
        ),
        **dict.fromkeys(
            ("PartitionedTensor", "partition_uniform", "partition_balanced", "prefix_sum_inc"),
            _PIPE,
        ),
        **dict.fromkeys(
            (
                *("DummyOptim", "align_dense_tensors", "all_gather_dp_groups", "TLinear"),
                *("all_gather_into_tensor_dp_groups", "compare_tensors_in_structures"),
                *("copy_to_device", "filter_empty_parameters", "get_grad_zeros", "noop_context"),
                *("get_inactive_params", "get_norm_with_moe_layers", "get_tensor_bytes"),
                *("get_norm_with_moe_layers_fast", "is_optimized_parameter"),
                *("mask_nan_or_inf_with_val_inplace", "offload_adam_states"),
                *("reload_adam_states", "get_checkpoint_folder_size", "combine_grad_norm_groups"),
                *("is_transformers_cache", "maybe_loss_for_backward", "OutputBackwardHookManager"),
                *("register_output_backward_hooks", "count_used_parameters_in_backward"),
                *("check_internal_apis_for_count_used_parameters", "torch_memory_reserved"),
                *("torch_max_memory_reserved", "bwc_tensor_model_parallel_rank"),
            ),
            _INTERNAL,
        ),
    },
)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Write the memory in use on rank 0: the device's and the process's. Not unless `force`.

    The device's peak is counted anew from here on.
    """
    if not force:
        return
    gc.collect()
    device = get_accelerator()
    told = {
        "MA": device.memory_allocated(),
        "Max_MA": device.max_memory_allocated(),
        "CA": device.memory_reserved(),
        "Max_CA": device.max_memory_reserved(),
        "resident": resident_bytes(),
        "peak resident": peak_resident_bytes(),
    }
    sizes = " | ".join(f"{name} {size / _GIB:.2f} GB" for name, size in told.items() if size)
    print_dist(f"{message} | {sizes}", ranks=[0])
    device.reset_peak_memory_stats()


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Write the device memory in use, on one rank or, if `print_rank` is -1, on all."""
    device = get_accelerator()
    device.synchronize()
    if reset_max:
        device.reset_peak_memory_stats()
    told = f"current {device.memory_allocated() / _GIB:.4f} GB"
    told += f", peak {device.max_memory_allocated() / _GIB:.4f} GB"
    print_dist(f"memory {msg}: {told}", ranks=[print_rank])


def get_ma_status() -> int:
    """Bytes that tensors take on the device."""
    return int(get_accelerator().memory_allocated())


def empty_cache() -> None:
    """Give memory that no tensor takes back to the device, and count the peak anew."""
    get_accelerator().empty_cache()
    get_accelerator().reset_peak_memory_stats()


def move_to_device(
    item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None
) -> Any:
    """Tensors, alone or in lists, tuples and dicts, on another device.

    criterion_func: of those for which it is true, the tensor itself is moved rather than a copy.
    """
    if criterion_func is not None and criterion_func(item):
        item.data = item.to(device).data
        return item
    if isinstance(item, list | tuple):
        moved = [move_to_device(each, device, criterion_func) for each in item]
        return moved if isinstance(item, list) else tuple(moved)
    if isinstance(item, Mapping):
        return {key: move_to_device(each, device, criterion_func) for key, each in item.items()}
    return item.to(device)


def ensure_directory_exists(filename: str) -> None:
    """Make the folder that a file is to be in."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)


def set_random_seed(seed: int) -> None:
    """Seed Python, torch, and numpy if it is in use."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """A call as it would be written."""
    words = [repr(arg) for arg in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return f"{base}({', '.join(words)})"


def get_only_unique_item(items: Iterable[Any]) -> Any:
    """The one value that all items are. Raises DsError if they differ."""
    found = set(items)
    if len(found) != 1:
        raise DsError(f"items: got {items}, expected all to be the same")
    return found.pop()


def noop_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return func


def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Whether a program has marked a parameter as split over ranks of a model."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))
