"""Large linear layers in tiles, with the arguments in the original's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ds_zero


class TiledLinear(ds_zero.TiledLinear):
    """`ds_zero.TiledLinear`, whose arguments may also be given by position."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            in_splits=in_splits,
            out_splits=out_splits,
            input_is_already_split=input_is_already_split,
            combine_out_splits=combine_out_splits,
            linear_cls=linear_cls,
            init_linear=init_linear,
            **kwargs,
        )


class TiledLinearReturnBias(ds_zero.TiledLinearReturnBias, TiledLinear):
    """`ds_zero.TiledLinearReturnBias`, whose arguments may also be given by position."""


def split_tensor_along_last_dim(
    tensor: torch.Tensor, partitions: list[int], contiguous_split_chunks: bool = False
) -> tuple[torch.Tensor, ...]:
    """Parts of `partitions` sizes along the last dimension; copies if they are to be contiguous."""
    parts = tensor.split(partitions, dim=-1)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else parts
