"""Which devices the processes of a job see on one host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_core.errors import LaunchError

#: The variable by which each kind of accelerator hides devices from a process.
VISIBLE_VARIABLES: Mapping[str, str] = {
    "cuda": "CUDA_VISIBLE_DEVICES",  # torch honours it on ROCm, too
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "hpu": "HABANA_VISIBLE_MODULES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
}

PRECEDENCE = """\
Which devices a process sees on a host is decided by the first of these that applies:
  1. --devices, or slots named in --include or --exclude: become CUDA_VISIBLE_DEVICES there
     (ZE_AFFINITY_MASK and so on for other accelerators). If the variable is set to
     something else as well, the job is refused: one of the two is a mistake.
  2. the variable from --env, then from the env file
  3. the variable in the shell of `ds run`, for processes on this machine only: device
     numbers belong to one machine and are never sent to another
  4. nothing set: all devices
Processes are not devices: --nproc says how many to start, and LOCAL_RANK picks the device."""


def visible_variable() -> str:
    """The variable for this machine's accelerator; CUDA's where there is none."""
    import torch

    found = torch.accelerator.current_accelerator()
    return VISIBLE_VARIABLES.get(
        found.type if found is not None else "cuda", "CUDA_VISIBLE_DEVICES"
    )


def parse_devices(text: str) -> tuple[int, ...]:
    """The numbers in a list such as `0,2` or `4-7`. Raises LaunchError for anything else."""
    numbers: list[int] = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        is_range = first.isdecimal() and (last.isdecimal() if dash else True)
        named = range(int(first), int(last or first) + 1) if is_range else ()
        if not named:
            numbers = []
            break
        numbers.extend(named)
    if not numbers or len(set(numbers)) != len(numbers):
        raise LaunchError(
            f"--devices: got {text!r}, expected different device numbers joined by commas, "
            "such as 0,2 or 4-7"
        )
    return tuple(numbers)


def check_devices(devices: Sequence[int], variable: str, value: str | None) -> str:
    """The value of the visible-devices variable for `devices`.

    Raises LaunchError if the variable is set to something else, `value`.
    """
    wanted = ",".join(map(str, devices))
    if value is not None and value.replace(" ", "") != wanted:
        raise LaunchError(
            f"devices {wanted} are asked for (--devices, --include or --exclude), but "
            f"{variable}={value} is set; drop one of the two (`unset {variable}`).\n{PRECEDENCE}"
        )
    return wanted


def num_visible(value: str) -> int:
    """How many devices a value of the variable leaves visible."""
    return len([word for word in value.split(",") if word.strip()])


def num_devices() -> int:
    """Devices that this process sees: 0 without an accelerator."""
    import torch

    count: Any = torch.accelerator.device_count()
    return int(count)
