from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from test_memory import live_bytes
from torch import nn
from zero_loops import adamw, plain, sharded_steps
from zero_models import CASES, WIDTH, Block, Language, Stack, vectors

import ds_zero
from ds_core.testing import run_ranks


class Own(nn.Module):
    """Initialises itself in the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("table", torch.randn(4))
        self.apply(self._initialise)
        self.embed.weight.data[3].zero_()
        for block in self.blocks:
            nn.init.xavier_uniform_(block.down.weight)
        with torch.no_grad():
            self.blocks[0].up.weight.copy_(torch.randn(17, WIDTH))
            self.blocks[1].up.bias += 1.0
            self.scale.mul_(2.0)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def build(factory, **options) -> nn.Module:
    torch.manual_seed(0)
    with ds_zero.Init(**options):
        return factory()


BUILDS = {
    "own": Own,
    "stack": Stack,
    "tied": Language,
    "attention": CASES["attention"].build,
    "modules": CASES["modules"].build,
    "odd-sizes": CASES["odd-sizes"].build,
}


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_values_are_those_of_the_plain_build(name: str, stage: int):
    run_ranks(2, compare_builds, name, stage)


def compare_builds(name: str, stage: int) -> None:
    model = build(BUILDS[name])
    optimizer = ds_zero.shard(model, adamw(model.parameters()), stage, min_unit_numel=0)
    torch.manual_seed(0)
    truth = BUILDS[name]()
    found = optimizer.full_state_dict()
    assert found.keys() == dict(truth.named_parameters()).keys()
    for key, param in truth.named_parameters():
        assert torch.equal(found[key], param), key
    for (key, one), two in zip(truth.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(one, two), key


def test_training_after_init_equals_plain_training(stage: int):
    run_ranks(2, train_after_init, stage)


def train_after_init(stage: int) -> None:
    case = CASES["tied"]
    model = build(case.build)
    optimizer = ds_zero.shard(model, adamw(model.parameters()), stage, min_unit_numel=0)
    found = sharded_steps(model, optimizer, case, 3)
    assert found == pytest.approx(plain(case, 3)[2], abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_weights_never_exist_together(world_size: int):
    for peak, whole, block in run_ranks(world_size, peak_of_build):
        assert peak <= whole / world_size + 2.5 * block


class Watched(nn.Module):
    """A deep stack that measures the memory after each block is made."""

    def __init__(self, measured: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(12):
            self.blocks.append(Block(WIDTH, 1000))
            measured.append(live_bytes())


def peak_of_build() -> tuple[int, int, int]:
    before, measured = live_bytes(), []
    model = build(lambda: Watched(measured))
    for block in model.blocks:
        block.down.weight.data.normal_()
        measured.append(live_bytes())
    gc.collect()
    block = 4 * sum(p.numel() for p in Block(WIDTH, 1000).parameters())
    return max(measured) - before, 12 * block, block


def test_shapes_and_names_stay_true():
    run_ranks(2, read_metadata)


def read_metadata() -> None:
    model, truth = build(Stack), Stack()
    for (name, ours), (_, plain_param) in zip(
        model.named_parameters(), truth.named_parameters(), strict=True
    ):
        assert ours.shape == plain_param.shape, name
        assert (ours.numel(), ours.dtype) == (plain_param.numel(), plain_param.dtype)
        assert ours.requires_grad
        assert isinstance(ours, nn.Parameter)
        assert "sharded parameter of shape" in repr(ours)


def test_dtype_is_applied():
    run_ranks(2, build_in_bf16)


def build_in_bf16() -> None:
    model = build(Stack, dtype=torch.bfloat16)
    optimizer = ds_zero.shard(model, adamw(model.parameters()), 3, min_unit_numel=0)
    torch.manual_seed(0)
    truth = Stack().bfloat16()
    for name, param in truth.named_parameters():
        assert torch.equal(optimizer.full_state_dict()[name], param)


def test_disabled_init_does_nothing():
    model = build(Stack, enabled=False)
    assert all(type(param) is nn.Parameter for param in model.parameters())


def test_dtype_must_be_floating():
    with pytest.raises(ds_zero.ShardError, match=r"dtype must be a floating one, got torch\.int32"):
        ds_zero.Init(dtype=torch.int32)


def test_exception_inside_init_leaves_torch_as_it_was():
    run_ranks(2, fail_inside)


def fail_inside() -> None:
    def failing() -> nn.Module:
        Stack()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(failing)
    assert all(type(param) is nn.Parameter for param in Stack().parameters())


def test_loading_a_state_dict_into_a_sharded_build(stage: int):
    run_ranks(2, load_into_build, stage)


def load_into_build(stage: int) -> None:
    model = build(Stack)
    torch.manual_seed(5)
    truth = Stack()
    model.load_state_dict(truth.state_dict())
    optimizer = ds_zero.shard(model, adamw(model.parameters()), stage, min_unit_numel=0)
    for name, param in truth.named_parameters():
        assert torch.equal(optimizer.full_state_dict()[name], param), name


def test_forward_before_shard_gathers_what_it_uses():
    run_ranks(2, forward_before_shard)


def forward_before_shard() -> None:
    model = build(Stack)
    torch.manual_seed(0)
    truth = Stack()
    x = vectors(0, 0)
    with torch.no_grad():
        assert torch.equal(model(x), truth(x))


def test_state_dict_gathers_nothing_until_a_value_is_read():
    run_ranks(2, read_state_dict)


def read_state_dict() -> None:
    model = build(Stack)
    torch.manual_seed(0)
    truth = Stack().state_dict()
    found = model.state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in truth.items()
    }
    assert "sharded" in repr(found["entry.weight"])
    assert not found["entry.weight"].requires_grad
    assert torch.equal(found["entry.weight"], truth["entry.weight"])
    assert type(found["entry.weight"]) is torch.Tensor
    assert "sharded" in repr(found["exit.weight"])


def test_values_of_rank0_count_if_told_so(stage: int):
    run_ranks(2, build_from_different_seeds, stage)


def build_from_different_seeds(stage: int) -> None:
    torch.manual_seed(dist.get_rank())
    with ds_zero.Init(from_rank0=True):
        model = Stack()
        model.entry.weight.data.normal_()
    torch.manual_seed(0)
    truth = Stack()
    truth.entry.weight.data.normal_()
    optimizer = ds_zero.shard(
        model, adamw(model.parameters()), stage, min_unit_numel=0, broadcast=False
    )
    for name, param in truth.named_parameters():
        assert torch.equal(optimizer.full_state_dict()[name], param), name


def test_a_model_that_is_built_already_can_be_adopted():
    run_ranks(2, adopt_built)


def adopt_built() -> None:
    torch.manual_seed(0)
    model = Stack()
    ds_zero.Init(device="cpu", on_host=True).adopt(model)
    assert "sharded" in repr(model.exit.weight)
    torch.manual_seed(0)
    for param, truth in zip(model.parameters(), Stack().parameters(), strict=True):
        assert torch.equal(param, truth)
