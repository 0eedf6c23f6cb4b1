"""Which accelerator this process uses."""

from __future__ import annotations

import functools

from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from ds_core import accelerator

_chosen: list[DeepSpeedAccelerator] = []


@functools.cache
def _found() -> DeepSpeedAccelerator:
    return DeepSpeedAccelerator(accelerator.current())


def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator of this process: one object for all callers.

    DS_ACCELERATOR=cpu in the environment has the CPU used although there is another device.
    """
    return _chosen[-1] if _chosen else _found()


def set_accelerator(accel_obj: DeepSpeedAccelerator) -> None:
    """Have `get_accelerator` return this one from now on."""
    _chosen[:] = [accel_obj]


def is_current_accelerator_supported() -> bool:
    """Whether torch can compute on the device of this process."""
    return get_accelerator().is_available()
