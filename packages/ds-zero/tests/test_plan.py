from __future__ import annotations

import pytest
import torch
from torch import nn
from zero_models import Adapted, Block, Language, Shared, TiedBlocks

import ds_zero
from ds_core.comm import Placement, place
from ds_zero.errors import ShardError
from ds_zero.plan import ParamSpec, UnitSpec, plan_units


def plan(model: nn.Module, **options) -> list[UnitSpec]:
    options.setdefault("min_unit_numel", 0)
    return plan_units(model, specs_of(model), **options)


def specs_of(model: nn.Module) -> list[ParamSpec]:
    return [
        ParamSpec(name, param, 0 if param.requires_grad else None)
        for name, param in model.named_parameters()
    ]


def names(units: list[UnitSpec]) -> list[str]:
    return [unit.name for unit in units]


def params(unit: UnitSpec) -> list[str]:
    return [spec.name for spec in unit.params]


class Patches(nn.Module):
    """As a vision transformer: convolution, class token, positions, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.zeros(1, 5, 12))
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(12, 10)


class Residual(nn.Module):
    """As a residual network: stages, each a Sequential of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.ModuleList(
            nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(n)))
            for n in (2, 3)
        )
        self.fc = nn.Linear(4, 10)


def test_language_model_has_a_unit_per_block():
    units = plan(Language("own"))
    assert names(units) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert params(next(unit for unit in units if unit.name == "blocks.1")) == [
        f"blocks.1.{name}"
        for name in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    ]


def test_tied_weight_between_units_joins_the_root():
    units = plan(Language("tied"))
    root = next(unit for unit in units if unit.is_root)
    assert params(root) == ["embed.weight"]
    assert sum(len(unit.params) for unit in units) == len(list(Language("tied").parameters()))


def test_weight_tied_between_blocks_joins_the_root():
    root = next(unit for unit in plan(TiedBlocks()) if unit.is_root)
    assert params(root) == ["blocks.0.up.weight"]


def test_vision_transformer_keeps_bare_parameters_in_the_root():
    units = plan(Patches())
    root = next(unit for unit in units if unit.is_root)
    assert params(root) == ["token", "position"]
    assert {"encoder.layers.0", "encoder.layers.2", "patch", "head"} <= set(names(units))


def test_residual_network_has_a_unit_per_stage_or_block():
    units = plan(Residual())
    placed = [name for unit in units for name in params(unit)]
    assert sorted(placed) == sorted(name for name, _ in Residual().named_parameters())
    assert all(not unit.is_root for unit in units)


def test_encoder_decoder_has_units_in_both_stacks():
    model = nn.Transformer(12, 4, 2, 2, 17, batch_first=True)
    found = names(plan(model))
    assert {f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)} <= set(found)


def test_neighbouring_blocks_are_merged_up_to_the_least_size():
    model = Language("own", depth=5)
    size = sum(p.numel() for p in model.blocks[0].parameters())
    blocks = [u for u in plan(model, min_unit_numel=2 * size) if u.name.startswith("blocks")]
    assert [len(unit.modules) for unit in blocks] == [2, 3]


def test_small_model_is_one_unit_beside_the_root():
    units = plan(Language("own"), min_unit_numel=1 << 18)
    assert len(units) <= 2


def test_shared_block_belongs_to_one_unit():
    units = plan(Shared())
    assert names(units) == ["blocks.0", "blocks.1", "blocks.2"]


def test_unit_is_split_by_dtype_and_by_frozen():
    model = Adapted()
    model.blocks[0].base.norm.double()
    units = [unit for unit in plan(model) if unit.name == "blocks.0"]
    assert sorted((str(unit.dtype), unit.trainable) for unit in units) == [
        ("torch.float32", False),
        ("torch.float32", True),
        ("torch.float64", False),
    ]


def test_unit_is_split_by_placement():
    model = Language("own")
    place(model.blocks[0].up.weight, Placement(grad_axes=("dp", "sp")))
    units = [unit for unit in plan(model) if unit.name == "blocks.0"]
    assert [unit.placement.grad_axes for unit in units] == [("dp",), ("dp", "sp")]


def test_parameters_are_sorted_by_optimizer_group():
    model = Block()
    specs = [ParamSpec(n, p, 1 if p.dim() < 2 else 0) for n, p in model.named_parameters()]
    (unit,) = plan_units(model, specs, min_unit_numel=1 << 20)
    assert [spec.group_index for spec in unit.params] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("blocks.?", ["blocks.0", "blocks.1", "blocks.2"]),
        (Block, ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks", ["blocks"]),
    ],
    ids=["pattern", "class", "name"],
)
def test_units_can_be_named(selector: object, expected: list[str]):
    units = plan(Language("own"), units=[selector])
    assert [unit.name for unit in units if not unit.is_root] == expected


def test_unit_can_be_a_module():
    model = Language("own")
    assert "blocks.1" in names(plan(model, units=[model.blocks[1]]))


def test_leaf_module_is_not_divided():
    units = plan(Language("own"), leaves=["blocks"])
    assert [unit.name for unit in units if unit.name.startswith("blocks")] == ["blocks"]


@pytest.mark.parametrize("keyword", ["units", "leaves"])
def test_unknown_selector_lists_the_modules(keyword: str):
    with pytest.raises(ShardError, match=r"'layers\.\*' matches no module of Language.*blocks"):
        plan(Language(), **{keyword: ["layers.*"]})


def test_every_parameter_is_in_exactly_one_unit():
    for model in (Language("tied"), Patches(), Residual(), Adapted(), nn.LSTM(3, 4, 2)):
        placed = [name for unit in plan(model) for name in params(unit)]
        assert sorted(placed) == sorted(dict(model.named_parameters()))


def test_planning_touches_no_values():
    with torch.device("meta"):
        units = plan(Language("own"))
    assert all(spec.param.is_meta for unit in units for spec in unit.params)


def test_marked_modules_are_not_divided():
    tiled = nn.Sequential(ds_zero.TiledLinear(4, 8, out_splits=2), nn.Linear(8, 2))
    assert len(plan(tiled)) > 1
    ds_zero.mark_leaf(tiled[0])
    assert ds_zero.is_leaf(tiled[0])
    divided = [unit.name for unit in plan(tiled)]
    assert not any(name.startswith("0.linears") for name in divided)
    ds_zero.mark_leaf(tiled[0], False)
    assert len(plan(tiled)) > len(divided)
