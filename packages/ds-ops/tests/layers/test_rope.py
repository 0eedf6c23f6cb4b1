"""rope: every implementation against the reference, and what it is for."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import DsError
from ds_core.ops.rope import rope_tables
from ds_core.testing.contracts import OpContract


class TestRope(OpContract):
    op = "rope"


class TestRopeInPlace(OpContract):
    op = "rope_"
    compiled = False


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As Llama does, with tables of the whole width."""
    a, b = x.chunk(2, -1)
    wide_cos, wide_sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return x * wide_cos[:, None] + torch.cat((-b, a), -1) * wide_sin[:, None]


def test_it_rotates_as_llama_does() -> None:
    x = torch.randn(2, 6, 3, 16)
    cos, sin = rope_tables(torch.arange(6), 16)
    torch.testing.assert_close(ds_ops.rope(x, cos, sin), _rotate(x, cos, sin))


def test_layouts_agree_and_views_are_read_as_they_are() -> None:
    packed = torch.randn(2, 6, 3, 4, 16)
    x = packed[:, :, 1]
    tables = rope_tables(torch.arange(6), 16)
    expected = ds_ops.rope(x.contiguous(), *tables, interleaved=True)
    assert torch.equal(ds_ops.rope(x, *tables, interleaved=True), expected)
    found = ds_ops.rope(x.transpose(1, 2), *tables, layout="bhsd", interleaved=True)
    assert torch.equal(found.transpose(1, 2), expected)


def test_scores_depend_on_distances_only() -> None:
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        rotated = [
            ds_ops.rope(t, *rope_tables(torch.tensor([at]), 64)) for t, at in ((q, at_q), (k, at_k))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(3, 1), score(100_003, 100_001), rtol=1e-4, atol=1e-4)


def test_in_place_changes_x_and_nothing_else() -> None:
    x = torch.randn(1, 4, 3, 16)
    tables = rope_tables(torch.arange(4), 8)
    expected = ds_ops.rope(x, *tables)
    room = torch.randn(1, 4, 5, 16)
    before = room.clone()
    view = room[:, :, 1:4]
    view.copy_(x)
    assert ds_ops.rope(view, *tables, in_place=True) is view
    assert torch.equal(view, expected)
    assert torch.equal(room[:, :, [0, 4]], before[:, :, [0, 4]])


def test_in_place_refuses_what_it_would_spoil() -> None:
    tables = rope_tables(torch.arange(4), 8)
    with pytest.raises(DsError, match="in_place"):
        ds_ops.rope(torch.ones(1, 4, 3, 8, requires_grad=True), *tables, in_place=True)
    with pytest.raises(RuntimeError, match="overlap in memory"):
        ds_ops.rope(torch.ones(1, 4, 1, 8).expand(1, 4, 3, 8), *tables, in_place=True)
    with pytest.raises(DsError, match="layout"):
        ds_ops.rope(torch.ones(1, 4, 3, 8), *tables, layout="sbhd")
    room = torch.ones(1, 4, 5, 8)
    inside = room.view(-1)[-24:-8].view(4, 4)
    with pytest.raises(RuntimeError, match="x and cos overlap in memory"):
        ds_ops.rope(room[:, :, 1:4], inside, tables[1], in_place=True)


def test_rows_that_overlap_in_memory_are_refused() -> None:
    x = torch.randn(64).as_strided((1, 4, 1, 8), (32, 1, 8, 1))
    cos, sin = torch.randn(2, 4, 4)
    with pytest.raises((DsError, RuntimeError), match="overlap in memory"):
        ops.run("rope", x, cos, sin, False, False, False, impl="cpp")
