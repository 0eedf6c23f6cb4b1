"""Triton's interpreter, with bf16 as a GPU has it.

As it is, `tl.dot` multiplies the bits of bf16 numbers as if they were integers, and a number that
becomes bf16 is cut, not rounded. `test_interpreter.py` says so once that is mended; then this goes.
Arithmetic on bf16 other than `tl.dot` stays wrong: kernels widen what they load, as they should.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Replace the two functions, for this process."""
    cut, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(values, source, destination, rounding):
        if source == tl.float32 and destination == tl.bfloat16:
            return rounded(values)
        if source == tl.bfloat16 and destination == tl.float32:
            return widened(values).view(np.uint32)
        return cut(values, source, destination, rounding)

    def dot(self, a, b, d, *rest):
        return multiply(self, _wide(a), _wide(b), d, *rest)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def rounded(values):
    """The bits of the nearest bf16 numbers, the even one of two; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    near = np.where(np.isnan(bits.view(np.float32)), (bits >> 16) | 0x40, near)
    return near.astype(np.uint16).reshape(values.shape)


def widened(bits):
    """The fp32 numbers that bits of bf16 stand for."""
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(bits.shape)


def _wide(t):
    if t.dtype.scalar != tl.bfloat16:
        return t
    return interpreter.TensorHandle(widened(t.data), tl.float32)
