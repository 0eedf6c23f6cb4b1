"""Small helpers of the original's log of collectives."""

from __future__ import annotations

import sys

from deepspeed._names import names_of
from ds_core.quantities import told_bytes


def get_caller_func(frame: int = 3) -> str:
    """The name of the function so many calls up."""
    return sys._getframe(frame).f_code.co_name


def convert_size(size_bytes: float) -> str:
    """Such as "4.19 KiB"."""
    return told_bytes(size_bytes)


__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing={
        "CommsLogger": "use deepspeed.comm.configure and log_summary, or ds_core.comm.Traffic",
        "calc_bw_log": "use ds_core.comm.traffic.bus_factor",
    },
)
