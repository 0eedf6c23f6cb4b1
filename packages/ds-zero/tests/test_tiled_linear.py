"""A linear layer in tiles: what nn.Linear gives, and one tile at a time at stage 3."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_memory import Peak, live_bytes
from test_plan import names, plan
from test_traffic import padded
from torch import nn
from torch.utils.checkpoint import checkpoint
from zero_loops import compare, sharded, sharded_steps
from zero_models import CASES, WIDTH, Case, square

import ds_zero
from ds_core.testing import run_ranks
from ds_zero import TiledLinear, TiledLinearReturnBias

GRIDS = {"whole": (1, 1), "rows": (1, 3), "columns": (4, 1), "grid": (3, 2), "each": (7, 5)}


class TiledBlock(nn.Module):
    """A block whose layers are tiled, and whose norm is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = TiledLinear(WIDTH, 17, in_splits=2, out_splits=3)
        self.down = TiledLinear(17, WIDTH, bias=False, out_splits=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tiled(nn.Module):
    """Blocks of tiles between a plain layer and a tiled one."""

    def __init__(self, remat: bool = False) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(TiledBlock() for _ in range(2))
        self.exit = TiledLinear(WIDTH, 5, in_splits=3)
        self.remat = remat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return self.exit(x)


CASES["tiled-linear"] = Case(Tiled, square)
CASES["tiled-linear-recomputed"] = Case(lambda: Tiled(remat=True), square)


def pair(
    bias: bool = True, dtype: torch.dtype = torch.float32, **options: object
) -> tuple[nn.Linear, TiledLinear]:
    """A plain layer and a tiled one with its values."""
    torch.manual_seed(0)
    plain = nn.Linear(23, 17, bias=bias, dtype=dtype)
    return plain, TiledLinear(23, 17, bias, init_linear=plain, dtype=dtype, **options)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_output_and_gradients_are_those_of_a_linear_layer(grid: tuple[int, int], bias: bool):
    plain, tiled = pair(bias, torch.float64, in_splits=grid[0], out_splits=grid[1])
    x = torch.randn(2, 3, 23, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, found = plain(x), tiled(y)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)
    rows = [torch.cat([t.weight.grad for t in row], dim=1) for row in tiled.linears]
    torch.testing.assert_close(torch.cat(rows), plain.weight.grad, rtol=1e-12, atol=1e-12)
    if bias:
        ends = [row[-1].bias.grad for row in tiled.linears]
        torch.testing.assert_close(torch.cat(ends), plain.bias.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_without_in_splits_the_bits_are_those_of_a_linear_layer(dtype: torch.dtype):
    torch.manual_seed(0)
    plain = nn.Linear(96, 80, dtype=dtype)
    tiled = TiledLinear(96, 80, out_splits=5, init_linear=plain, dtype=dtype)
    x = torch.randn(64, 96, dtype=dtype)
    assert torch.equal(tiled(x), plain(x))


def test_sizes_that_do_not_divide_differ_by_one():
    tiled = TiledLinear(11, 7, in_splits=3, out_splits=2)
    assert (tiled.in_sizes, tiled.out_sizes) == ([4, 4, 3], [4, 3])
    assert [[t.bias is not None for t in row] for row in tiled.linears] == [
        [False, False, True]
    ] * 2
    assert "11, 7, bias=True, 2 x 3 tiles" in repr(tiled)


def test_parts_go_in_and_come_out():
    plain, tiled = pair(
        in_splits=3, out_splits=2, input_is_already_split=True, combine_out_splits=False
    )
    x = torch.randn(4, 23)
    parts = tiled(list(x.split(tiled.in_sizes, dim=-1)))
    assert [part.shape[-1] for part in parts] == tiled.out_sizes
    torch.testing.assert_close(torch.cat(parts, dim=-1), plain(x))


class LateBias(nn.Linear):
    """Returns its bias instead of adding it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return nn.functional.linear(x, self.weight), self.bias


@pytest.mark.parametrize("combined", [True, False])
def test_bias_is_returned(combined: bool):
    plain = nn.Linear(23, 17)
    tiled = TiledLinearReturnBias(
        23,
        17,
        in_splits=2,
        out_splits=3,
        combine_out_splits=combined,
        linear_cls=LateBias,
        init_linear=plain,
    )
    x = torch.randn(4, 23)
    output, bias = tiled(x)
    if not combined:
        output, bias = torch.cat(output, dim=-1), torch.cat(bias)
    torch.testing.assert_close(output + bias, plain(x))
    none = TiledLinearReturnBias(23, 17, False, in_splits=2, linear_cls=LateBias)
    assert none(x)[1] is None


def test_tiles_start_as_the_whole_layer_would():
    torch.manual_seed(0)
    tiled = TiledLinear(256, 64, in_splits=16, out_splits=2)
    weights = torch.cat([tile.weight.detach().flatten() for tile in tiled.own_units()])
    assert float(weights.abs().max()) <= 1 / 16
    assert float(weights.std()) == pytest.approx(1 / 16 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_splits": 0}, "in_splits: got 0, expected 1 to in_features, which is 4"),
        ({"out_splits": 6}, "out_splits: got 6, expected 1 to out_features, which is 5"),
        (
            {"init_linear": nn.Linear(4, 6)},
            r"shape \[6, 4\] with bias, expected \[5, 4\] with bias",
        ),
        ({"init_linear": nn.Linear(4, 5, bias=False)}, r"\[5, 4\] without bias, expected"),
    ],
    ids=["too-few", "too-many", "shape", "bias"],
)
def test_nonsense_is_refused(options: dict, message: str):
    with pytest.raises(ds_zero.ShardError, match=message):
        TiledLinear(4, 5, **options)


def test_inputs_that_do_not_fit_are_refused():
    x = torch.randn(2, 4)
    whole = TiledLinear(4, 5, in_splits=2)
    with pytest.raises(ds_zero.ShardError, match=r"got \[2, 3\], expected a tensor .* 4"):
        whole(x[:, :3])
    with pytest.raises(ds_zero.ShardError, match="got list, expected a tensor"):
        whole([x[:, :2], x[:, 2:]])
    parts = TiledLinear(4, 5, in_splits=2, input_is_already_split=True)
    with pytest.raises(ds_zero.ShardError, match=r"got parts of \[1, 3\] .* 2 parts of \[2, 2\]"):
        parts([x[:, :1], x[:, 1:]])
    with pytest.raises(ds_zero.ShardError, match="got one tensor"):
        parts(x)


# ---------------------------------------------------------------------- sharded


def test_every_tile_is_a_unit_of_its_own():
    for least in (0, 1 << 18):
        units = plan(Tiled(), min_unit_numel=least)
        tiles = [unit for unit in units if unit.is_tile]
        assert len(tiles) == 2 * (6 + 2) + 3
        assert all(len(unit.params) <= 2 for unit in tiles)
        placed = [spec.name for unit in units for spec in unit.params]
        assert sorted(placed) == sorted(name for name, _ in Tiled().named_parameters())
    assert "blocks.0.up.linears.1.0" in names(units)
    # The rest of a block is what it was.
    block = next(u for u in plan(Tiled()) if u.name == "blocks.0")
    assert [spec.name for spec in block.params] == ["blocks.0.norm.weight", "blocks.0.norm.bias"]


def test_tiles_named_or_in_a_leaf_are_not_divided():
    model = Tiled()
    units = plan(model, leaves=["blocks.0"])
    assert not [unit for unit in units if unit.is_tile and unit.name.startswith("blocks.0")]
    assert [unit for unit in units if unit.is_tile and unit.name.startswith("blocks.1")]
    units = plan(model, units=["blocks.*.up", "entry"])
    assert not [unit for unit in units if unit.is_tile and "up" in unit.name]
    assert [unit for unit in units if unit.is_tile and "down" in unit.name]


def trains_alike(name: str, stage: int) -> None:
    compare(name, stage)


@pytest.mark.parametrize("name", ["tiled-linear", "tiled-linear-recomputed"])
def test_training_is_that_of_one_process(name: str, stage: int):
    run_ranks(2, trains_alike, name, stage)


class WideTiled(nn.Module):
    """A stack of large layers in eight tiles each, which hold what matters."""

    def __init__(self, remat: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TiledLinear(256, 256, False, out_splits=8) for _ in range(3))
        self.remat = remat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.remat else layer(x)
        return x


def peak_of_tiles(prefetch: int, remat: bool) -> tuple[int, int, int]:
    case = Case(lambda: WideTiled(remat), square, lambda rank, step: torch.randn(1, 256))
    model, optimizer = sharded(case, 3, prefetch=prefetch)
    sharded_steps(model, optimizer, case, 2)
    assert len(optimizer.units) == 24
    tile = max(4 * padded(unit, 4, dist.get_world_size()) for unit in optimizer.units)
    before = live_bytes()
    with Peak() as peak:
        sharded_steps(model, optimizer, case, 2, first=2)
    return peak.bytes, before, tile


@pytest.mark.parametrize("remat", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("prefetch", [0, 1])
def test_stage3_holds_a_tile_and_those_gathered_ahead(prefetch: int, remat: bool):
    """And their gradients: autograd's own, the unit's, and one that is on its way."""
    for peak, persistent, tile in run_ranks(2, peak_of_tiles, prefetch, remat):
        assert tile == 4 * 256 * 256 // 8
        assert peak - persistent <= (1 + prefetch) * tile + 3 * tile + 60_000
        assert peak - persistent < 8 * tile  # one whole layer


def copies_between_sharded_layers() -> None:
    torch.manual_seed(0)
    plain, tiled = nn.Linear(24, 16), TiledLinear(24, 16, in_splits=2, out_splits=2)
    model = nn.ModuleList([plain, tiled])
    optimizer = ds_zero.shard(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 3, min_unit_numel=0
    )
    tiled.copy_params_from(plain)
    whole = optimizer.full_state_dict()
    rows = [
        torch.cat([whole[f"1.linears.{row}.{column}.weight"] for column in (0, 1)], dim=1)
        for row in (0, 1)
    ]
    assert torch.equal(torch.cat(rows), whole["0.weight"])
    ends = [whole[f"1.linears.{row}.1.bias"] for row in (0, 1)]
    assert torch.equal(torch.cat(ends), whole["0.bias"])


def test_values_are_copied_between_sharded_layers():
    run_ranks(2, copies_between_sharded_layers)


def built_sharded() -> None:
    torch.manual_seed(0)
    whole = TiledLinear(24, 16, in_splits=2, out_splits=2)
    torch.manual_seed(0)
    with ds_zero.Init():
        model = TiledLinear(24, 16, in_splits=2, out_splits=2)
    optimizer = ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    for name, value in optimizer.full_state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])


def test_a_layer_built_sharded_has_the_values_of_a_plain_one():
    run_ranks(2, built_sharded)
