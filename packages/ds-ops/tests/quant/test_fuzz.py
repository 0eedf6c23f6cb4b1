"""Whatever is passed, an op gives a result or an error: it never crashes or writes elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core import ops
from ds_core.errors import DsError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
_NUMBERS = st.sampled_from((-(1 << 62), -1, 0, 1, 2, 3, 4, 7, 8, 32, 64, 1 << 31, 1 << 62))


@st.composite
def _tensors(draw: st.DrawFn, *likely: torch.dtype) -> torch.Tensor:
    """Mostly of a likely dtype, small, and contiguous; sometimes none of these, or overlapping."""
    dtype = draw(st.sampled_from((*likely * 4, *_DTYPES)))
    shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 8, 32, 64)), max_size=3))
    t = torch.randint(0, 100, shape).to(dtype)
    how = draw(st.sampled_from(("plain", "plain", "plain", "turned", "expanded", "offset", "meta")))
    if how == "turned" and t.dim() >= 2:
        return t.transpose(0, 1)
    if how == "expanded" and t.dim() >= 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    if how == "offset" and t.dim() >= 1:
        return t[t.shape[0] // 2 :]
    return t.to("meta") if how == "meta" else t


_FLOAT = _tensors(torch.float32, torch.bfloat16)
_SCALES = _tensors(torch.float32)
_CODES = _tensors(torch.uint8)
_FORMAT = st.integers(-1, 9)
_SEED = st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
_BETA = st.sampled_from((0.0, 0.5, 1.0, -1.0, float("nan")))
_BLOCK = _NUMBERS | st.sampled_from((4, 8, 32))
_DTYPE = st.sampled_from(_DTYPES)
_BOOL = st.booleans()
_TO_CODES = (_FORMAT, _BLOCK, _BOOL, _SEED, _NUMBERS, _NUMBERS)
_PIECES = (_CODES, _SCALES, st.none() | _SCALES)

_ARGUMENTS: dict[str, tuple[st.SearchStrategy[Any], ...]] = {
    "quantize_blocks": (_FLOAT, *_TO_CODES),
    "quantize_feedback_": (_FLOAT, _FLOAT, _BETA, *_TO_CODES),
    "dequantize_blocks": (*_PIECES, _FORMAT, _BLOCK, _DTYPE, _BOOL),
    "quantized_reduce": (*_PIECES, _FORMAT, _BLOCK, _BOOL, _FORMAT, _BOOL, _SEED),
    "quantized_reduce_feedback_": (
        *(*_PIECES, _FLOAT, _BETA),
        *(_FORMAT, _BLOCK, _BOOL, _FORMAT, _BOOL, _SEED),
    ),
    "sign_pack": (_FLOAT, _NUMBERS, _BOOL),
    "sign_pack_feedback_": (_FLOAT, _FLOAT, _NUMBERS, _BOOL),
    "sign_unpack": (_CODES, _SCALES, _NUMBERS, _DTYPE),
}


@pytest.mark.parametrize("name", list(_ARGUMENTS))
def test_any_arguments_give_a_result_or_an_error(name: str) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.tuples(*_ARGUMENTS[name]))
    def fuzz(args: tuple[Any, ...]) -> None:
        found = []
        for impl in ("cpp", "reference"):
            copies = [a.clone() if torch.is_tensor(a) and a.is_contiguous() else a for a in args]
            try:
                found.append(ops.run(name, *copies, impl=impl))
            except (DsError, RuntimeError, NotImplementedError):
                found.append(None)
        mine, plain = found
        if mine is not None and not any(torch.is_tensor(a) and a.is_meta for a in args):
            assert plain is not None, "the reference refuses what the kernel takes"

    fuzz()
