"""grouped_mm: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch

from ds_core import ops
from ds_core.testing.contracts import OpContract
from ds_ops import grouped_mm


class TestGroupedMm(OpContract):
    op = "grouped_mm"


class TestGroupedMmBackward(OpContract):
    op = "grouped_mm_backward"
    compiled = False


def test_an_expanded_gradient_is_taken() -> None:
    a = torch.randn(9, 16, requires_grad=True)
    b = torch.randn(3, 16, 8, requires_grad=True)
    grouped_mm(a, b, torch.tensor([4, 4, 7], dtype=torch.int32)).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad[7:] == 0).all()
    assert (b.grad[1] == 0).all()
    torch.testing.assert_close(a.grad[:4], b.detach()[0].sum(1).expand(4, 16))


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_it_compiles_without_breaks() -> None:
    a, b = torch.randn(9, 16), torch.randn(3, 16, 8)
    offsets = torch.tensor([4, 4, 7], dtype=torch.int32)
    compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, offsets), grouped_mm(a, b, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 64])
def test_threads_know_nothing_of_autograd(dtype: torch.dtype, rows: int) -> None:
    a = torch.randn(2 * rows, 512, dtype=dtype, requires_grad=True)
    b = torch.randn(2, 512, 2048, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([rows, 2 * rows], dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = ops.run("grouped_mm", a, b, offsets, impl="cpp")
        found.sum().backward()
        with torch.inference_mode():
            again = ops.run("grouped_mm", a, b, offsets, impl="cpp")
            ops.run("grouped_mm_backward", a, again, offsets, impl="cpp")
            plain = ops.run("grouped_mm", a.clone(), b.clone(), offsets, impl="cpp")
    finally:
        torch.set_num_threads(before)
    assert a.grad is not None
    assert torch.equal(found, again)
    assert torch.equal(found, plain)
