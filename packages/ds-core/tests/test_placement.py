"""The tag that says over which axes a parameter's gradient is averaged and how it is split."""

from __future__ import annotations

import pytest
import torch

from ds_core.comm import Placement, place, placement_of


def test_a_parameter_without_tag_is_whole_and_data_parallel():
    placement = placement_of(torch.nn.Parameter(torch.ones(2)))
    assert placement == Placement(grad_axes=("dp",), split_axis=None, split_dim=None)


def test_place_returns_the_parameter():
    param = torch.nn.Parameter(torch.ones(2))
    assert place(param, Placement(("dp", "sp"), "tp", 0)) is param
    assert placement_of(param) == Placement(("dp", "sp"), "tp", 0)


@pytest.mark.parametrize("given", [{"split_axis": "tp"}, {"split_dim": 1}], ids=["axis", "dim"])
def test_half_a_split_is_refused(given):
    with pytest.raises(ValueError, match="go together; set both or neither"):
        Placement(**given)
