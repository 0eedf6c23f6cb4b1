"""grouped_mm: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch

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
