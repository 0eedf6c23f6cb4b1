"""A big linear layer as a grid of small ones, so that stage 3 holds one of them at a time.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.1.3 (memory-centric tiling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_zero.access import GatheredParameters
from ds_zero.errors import ShardError


class TiledLinear(nn.Module):
    """`nn.Linear` cut into `out_splits` rows and `in_splits` columns of tiles.

    Every tile is a ZeRO unit of its own, also inside a block that is one: at stage 3 a rank holds
    the tile that computes and those gathered ahead (`prefetch`), never the whole layer. The output
    is that of one `nn.Linear`: the same products, and with several in_splits a sum of sums.
    Columns that do not divide evenly differ by one; the first ones are the larger.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        in_splits, out_splits: tiles along each; 1 cuts nothing.
        input_is_already_split: forward gets a list of `in_splits` parts of the input, of sizes
            `in_sizes` along the last dimension.
        combine_out_splits: False: forward returns the list of `out_splits` parts of the output.
        linear_cls: makes a tile: `linear_cls(in, out, bias=..., **kwargs)`.
        init_linear: a layer whose values are taken over; see `copy_params_from`.
        kwargs: for `linear_cls`, such as dtype and device.

    Attributes:
        linears: the tiles, `linears[row][column]`; those of the last column have the bias.
        in_sizes, out_sizes: features of each column and row.

    Tiles of `nn.Linear` start as the whole layer would, uniform in +-1/sqrt(in_features); those of
    another class as that class makes them. Raises ShardError for splits that make no sense.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_sizes = _even_sizes("in", in_features, in_splits)
        self.out_sizes = _even_sizes("out", out_features, out_splits)
        last = in_splits - 1
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(columns, rows, bias=bias and index == last, **kwargs)
                for index, columns in enumerate(self.in_sizes)
            )
            for rows in self.out_sizes
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)
        elif linear_cls is nn.Linear:
            self._reset_as_one()

    def extra_repr(self) -> str:
        """What `print` shows beside the tiles."""
        grid = f"{len(self.out_sizes)} x {len(self.in_sizes)} tiles"
        return f"{self.in_features}, {self.out_features}, bias={self.use_bias}, {grid}"

    def own_units(self) -> list[nn.Module]:
        """The tiles, row by row (the `OwnUnits` protocol of `ds_zero.plan`)."""
        return [tile for row in self._rows() for tile in row]

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> Any:
        """The product: x `[..., in_features]` gives `[..., out_features]`, or lists of parts."""
        outputs = [output for output, _ in self._outputs(x)]
        return self._combined(outputs)

    def _outputs(
        self, x: torch.Tensor | list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Of each row of tiles: its output, and the bias that was not added, if there is one."""
        parts = self._split(x)
        found = []
        for row in self._rows():
            total, bias = self._applied(row[0], parts[0])
            for tile, part in zip(row[1:], parts[1:], strict=True):
                output, bias = self._applied(tile, part)
                total = total + output
            found.append((total, bias))
        return found

    def _applied(
        self, tile: nn.Module, part: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return tile(part), None

    def _combined(self, parts: list[torch.Tensor]) -> Any:
        if not self.combine_out_splits:
            return parts
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _split(self, x: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.input_is_already_split:
            if not isinstance(x, torch.Tensor) or x.shape[-1] != self.in_features:
                got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
                raise ShardError(
                    f"TiledLinear: input: got {got}, expected a tensor whose last dimension is "
                    f"{self.in_features}; for parts, build it with input_is_already_split=True"
                )
            return [x] if len(self.in_sizes) == 1 else list(x.split(self.in_sizes, dim=-1))
        is_tensor = isinstance(x, torch.Tensor)
        sizes = [] if is_tensor else [part.shape[-1] for part in x]
        if sizes != self.in_sizes:
            got = "one tensor" if is_tensor else f"parts of {sizes} features"
            raise ShardError(
                f"TiledLinear: input: got {got}, expected {len(self.in_sizes)} parts of "
                f"{self.in_sizes} features, since input_is_already_split is True"
            )
        return list(x)

    @torch.no_grad()
    def copy_params_from(self, linear: nn.Module) -> None:
        """Take over the weight and bias of a whole layer, sharded or not.

        Raises ShardError unless its shape is this one's. Collective if either is sharded; rank 0's
        values count.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected or (bias is not None) != self.use_bias:
            raise ShardError(
                f"TiledLinear.copy_params_from: got a weight of shape {list(weight.shape)} "
                f"{'without' if bias is None else 'with'} bias, expected {list(expected)} "
                f"{'with' if self.use_bias else 'without'} bias"
            )
        whole = [weight] if bias is None else [weight, bias]
        with GatheredParameters(whole):  # type: ignore[arg-type]
            rows = weight.split(self.out_sizes)
            biases = [None] * len(rows) if bias is None else list(bias.split(self.out_sizes))  # type: ignore[operator]
            for tiles, row, own in zip(self._rows(), rows, biases, strict=True):
                for tile, value in zip(tiles, row.split(self.in_sizes, dim=1), strict=True):
                    with GatheredParameters(tile.parameters(), modifier_rank=0):
                        tile.weight.copy_(value)  # type: ignore[operator]
                        if tile is tiles[-1] and own is not None:
                            tile.bias.copy_(own)  # type: ignore[operator]

    @torch.no_grad()
    def _reset_as_one(self) -> None:
        """Values of a whole `nn.Linear`: its bound comes from all its inputs, not from a tile's."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for tile in self.own_units():
            for param in tile.parameters():
                nn.init.uniform_(param, -bound, bound)

    def _rows(self) -> list[list[nn.Module]]:
        return [list(row.children()) for row in self.linears]


class TiledLinearReturnBias(TiledLinear):
    """A `TiledLinear` of tiles that return (output, bias) and leave the bias for later to add.

    As Megatron's layers with skip_bias_add do. forward returns (output, bias); bias is None where
    the tiles have none, and both are lists unless `combine_out_splits`.
    """

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> Any:
        """(output, bias that has not been added)."""
        rows = self._outputs(x)
        biases = [bias for _, bias in rows if bias is not None]
        return (
            self._combined([output for output, _ in rows]),
            self._combined(biases) if biases else None,
        )

    def _applied(
        self, tile: nn.Module, part: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = tile(part)
        return output, bias


def _even_sizes(side: str, features: int, splits: int) -> list[int]:
    """`features` in `splits` parts that differ by one at most, the larger ones first."""
    if not 1 <= splits <= max(features, 1):
        raise ShardError(
            f"TiledLinear: {side}_splits: got {splits}, expected 1 to {side}_features, which is "
            f"{features}"
        )
    size, more = divmod(features, splits)
    return [size + 1] * more + [size] * (splits - more)
