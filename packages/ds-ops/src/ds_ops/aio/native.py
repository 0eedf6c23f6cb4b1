"""The C functions of csrc/aio, with their types."""

from __future__ import annotations

import ctypes
from functools import cache

from ds_ops.native import library


class Counters(ctypes.Structure):
    """What an engine has done so far; of csrc/aio/engine.h."""

    _fields_ = [
        ("bytes", ctypes.c_int64),
        ("pieces", ctypes.c_int64),
        ("buffered_bytes", ctypes.c_int64),
        ("bounced_bytes", ctypes.c_int64),
        ("continued", ctypes.c_int64),
        ("peak_in_flight", ctypes.c_int64),
    ]


@cache
def functions() -> ctypes.CDLL:
    """The library, typed. Calls release the GIL. Raises BuildError if it does not build."""
    found = library.load()
    i64, int_, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "ds_aio_open": (pointer, [int_, int_, i64, ctypes.POINTER(int_)]),
        "ds_aio_close": (None, [pointer]),
        "ds_aio_submit": (pointer, [pointer, int_, int_, i64, i64, int_, pointer, i64, i64]),
        "ds_aio_wait": (int_, [pointer, pointer, ctypes.c_double]),
        "ds_aio_finish": (None, [pointer, ctypes.POINTER(i64)]),
        "ds_aio_counters": (None, [pointer, ctypes.POINTER(Counters)]),
        "ds_aio_alignment": (int_, [int_, ctypes.POINTER(i64), ctypes.POINTER(i64)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
