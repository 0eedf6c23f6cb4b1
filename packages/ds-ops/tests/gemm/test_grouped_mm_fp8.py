"""grouped_mm_fp8 and scaled_mm: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import DsError
from ds_core.testing.contracts import OpContract

FP8 = torch.float8_e4m3fn


class TestGroupedMmFp8(OpContract):
    op = "grouped_mm_fp8"
    compiled = False  # torch's opcheck computes in the dtype of arguments


class TestScaledMm(OpContract):
    op = "scaled_mm"
    compiled = False


@pytest.mark.parametrize("op", ["grouped_mm", "grouped_mm_backward", "grouped_mm_fp8", "scaled_mm"])
def test_by_torch_bad_arguments_are_refused_too(op: str) -> None:
    for message, args in ops.get(op).refused(torch.device("cpu")):
        with pytest.raises((DsError, RuntimeError), match=message):
            ops.run(op, *args, impl="torch")


def _by_row(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(dim, keepdim=True) / 448
    return (x / scale).to(FP8), scale.squeeze(dim)


def test_it_is_near_to_the_product_of_what_was_quantized() -> None:
    x, w = torch.randn(40, 64), torch.randn(3, 64, 32)
    offsets = torch.tensor([10, 10, 36], dtype=torch.int32)
    (a, scale_a), (b, scale_b) = _by_row(x, 1), _by_row(w, 1)
    out = ds_ops.grouped_mm_fp8(a, b, scale_a, scale_b, offsets, out_dtype=torch.float32)
    true = ds_ops.grouped_mm(x, w, offsets)
    assert 0.01 < float((out - true).norm() / true.norm()) < 0.06
    assert (out[36:] == 0).all()


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_they_compile_without_breaks() -> None:
    (a, scale_a), (b, scale_b) = _by_row(torch.randn(9, 32), 1), _by_row(torch.randn(2, 32, 16), 1)
    offsets = torch.tensor([4, 7], dtype=torch.int32)

    def both(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, scale_a, scale_b, offsets = args
        grouped = ds_ops.grouped_mm_fp8(a, b, scale_a, scale_b, offsets)
        return grouped, ds_ops.scaled_mm(a, b[0], scale_a, scale_b[0], out_dtype=torch.float16)

    args = (a, b, scale_a, scale_b, offsets)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*args), both(*args), strict=True):
        assert torch.equal(found, expected)


def test_scales_may_have_any_shape() -> None:
    (a, scale_a), (b, scale_b) = _by_row(torch.randn(9, 32), 1), _by_row(torch.randn(32, 16), 0)
    flat = ds_ops.scaled_mm(a, b, scale_a, scale_b)
    assert flat.dtype == torch.bfloat16
    assert torch.equal(flat, ds_ops.scaled_mm(a, b, scale_a[:, None], scale_b[None]))
    one = torch.tensor(2.0)
    twice = ds_ops.scaled_mm(a, b, one, one, out_dtype=torch.float32)
    torch.testing.assert_close(twice, 4 * (a.float() @ b.float()))
