"""In which format and where a model is built, as arguments and configuration say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_core import _env, accelerator, comm
from ds_core.comm.discovery import find_world
from ds_core.config.document import read
from ds_zero import ShardError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DEVICES = ("none", "cpu", "nvme")
_WHY = {
    "zero_param_parallel_group": "there is no second copy of the parameters within a node",
    "zero_quantized_weights": "weights travel as they are",
    "zero_quantized_nontrainable_weights": "frozen weights are kept and travel as they are",
    "param_swapper": "offload_param in the configuration moves parameters to disk",
}


@dataclass(frozen=True)
class BuildFormat:
    """What is decided before a model is built.

    Attributes:
        dtype: of its floating parameters and tensors.
        remote_device: "none", or "cpu" or "nvme" where parts wait away from the device.
    """

    dtype: torch.dtype
    remote_device: str

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | None,
        dtype: torch.dtype | None,
        remote_device: str | None,
    ) -> BuildFormat:
        """Arguments of `Init`, and what its configuration says; raises ShardError if wrong."""
        data = {} if config is None else read(config).data
        if dtype is None:
            dtype = _half() if config is None else _configured(data)
        if dtype not in _DTYPES:
            raise ShardError(
                f"zero.Init: dtype: got {dtype}, expected torch.half, torch.bfloat16 or torch.float"
            )
        offload = _section(_section(data, "zero_optimization"), "offload_param")
        device = offload.get("device", "none" if remote_device is None else remote_device)
        device = str(getattr(device, "value", device))
        if device not in _DEVICES:
            raise ShardError(
                f"zero.Init: remote_device: got {device!r}, expected one of {', '.join(_DEVICES)}"
            )
        return cls(dtype, device)


def refuse_arguments(**given: Any) -> None:
    """Raise ShardError for the first argument that asks for what there is not."""
    for name, value in given.items():
        if value:
            raise ShardError(f"zero.Init: {name}: got {value!r}, but {_WHY[name]}; leave it out")


def checked_world(group: Any) -> None:
    """Start torch's process group unless it runs, and check that it has the ranks launched.

    Raises ShardError if the launcher started several ranks and the default group has one: each
    would hold the whole model.
    """
    comm.init()
    launched = find_world(_env.whole())
    if group is None and dist.get_world_size() == 1 and launched and launched.size > 1:
        raise ShardError(
            f"zero.Init: the process group has one rank, but the launcher started "
            f"{launched.size}, each of which would hold the whole model; call "
            f"deepspeed.init_distributed() before anything else starts a process group, or pass "
            f"data_parallel_group if this is meant"
        )


def _half() -> torch.dtype:
    """The 16-bit format in which the device computes."""
    fast = accelerator.current().computes_fast(torch.float16)
    return torch.float16 if fast else torch.bfloat16


def _configured(data: Mapping[str, Any]) -> torch.dtype:
    bf16 = any(_is_on(data, name) for name in ("bf16", "bfloat16"))
    fp16 = _is_on(data, "fp16")
    if bf16 and fp16:
        raise ShardError("zero.Init: the configuration enables bf16 and fp16; enable one of them")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def _is_on(data: Mapping[str, Any], name: str) -> bool:
    # "auto" is for whoever fills it in before training; nothing is known yet.
    return _section(data, name).get("enabled", False) is True


def _section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = data.get(name)
    return found if isinstance(found, Mapping) else {}
