"""Faults that tests inject for real: killed processes, full disks, damaged files, stale memory.

`acts` are single deeds, done by the process that calls them. A `Fault` is one that waits for its
moment: drawn at random, handed to a training program as text, and committed by a `FaultInjector`
that the program gives its engine as an observer. Nothing in the library knows of it.
"""

from ds_core.testing.faults.acts import (
    die,
    die_on_call,
    fail_open_files,
    file_size_limit,
    flip_byte,
    poisoned_empty,
    truncate,
)
from ds_core.testing.faults.disks import fill_disk, small_disk
from ds_core.testing.faults.fault import DAMAGES, KINDS, Fault, Kind, Point, draw
from ds_core.testing.faults.injector import FaultInjector, Strike

__all__ = [
    "DAMAGES",
    "Fault",
    "FaultInjector",
    "KINDS",
    "Kind",
    "Point",
    "Strike",
    "die",
    "die_on_call",
    "draw",
    "fail_open_files",
    "file_size_limit",
    "fill_disk",
    "flip_byte",
    "poisoned_empty",
    "small_disk",
    "truncate",
]
