"""`deepspeed.zero.Init` and what it gives parameters: arguments, formats, patched constructors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
import ds_zero
from deepspeed.runtime.zero import partition_parameters as pp
from ds_core.testing import run_ranks


class Net(nn.Module):
    """Blocks, a bare parameter, and buffers made by torch's constructors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("positions", torch.arange(0, 4, 0.5))
        self.register_buffer("old", torch.Tensor([1.0, 2.0]))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x * self.scale)


def sharded_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if "sharded" in repr(p)}


def test_values_are_those_of_rank0_in_the_configured_format():
    run_ranks(2, build_in_bf16)


def build_in_bf16() -> None:
    torch.manual_seed(dist.get_rank())
    with deepspeed.zero.Init(config_dict_or_path={"bf16": {"enabled": True}}):
        model = Net()
    assert torch.arange is pp._orig_torch_arange
    assert "__new__" not in torch.Tensor.__dict__
    assert sharded_names(model) == set(dict(model.named_parameters()))
    assert model.positions.dtype is torch.bfloat16
    assert model.old.dtype is torch.bfloat16
    assert model.counts.dtype is torch.int64
    seeds = [torch.empty(0)] * 2
    with deepspeed.zero.GatheredParameters(model.parameters()):
        assert all(param.dtype is torch.bfloat16 for param in model.parameters())
        dist.all_gather_object(seeds, model.head.weight.detach())
    assert torch.equal(*seeds)


FORMATS = {
    "fp16": ({"fp16": {"enabled": True}}, torch.float16),
    "bfloat16": ({"bfloat16": {"enabled": True}}, torch.bfloat16),
    "neither": ({"train_batch_size": 2}, torch.float32),
    "auto": ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, torch.float32),
}


def test_format_of_the_configuration():
    run_ranks(1, read_formats)


def read_formats() -> None:
    for name, (config, dtype) in FORMATS.items():
        assert deepspeed.zero.Init(config_dict_or_path=config).dtype is dtype, name
        with deepspeed.zero.Init(config=config):
            assert torch.zeros(1).dtype is dtype, name
    assert deepspeed.zero.Init().dtype in (torch.float16, torch.bfloat16)
    assert deepspeed.zero.Init(config={"bf16": {"enabled": True}}, dtype=torch.float).dtype is (
        torch.float32
    )
    offloaded = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert deepspeed.zero.Init(config=offloaded).remote_device == "cpu"
    assert deepspeed.zero.Init(remote_device="nvme").remote_device == "nvme"


def test_a_configuration_may_be_a_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"fp16": {"enabled": true}}')
    run_ranks(1, read_file, str(path))


def read_file(path: str) -> None:
    assert deepspeed.zero.Init(config_dict_or_path=path).dtype is torch.float16


def test_a_library_may_replace_the_wrapper_of_constructors():
    run_ranks(2, build_with_other_wrapper)


def build_with_other_wrapper() -> None:
    """As transformers keeps the dtype of `torch.arange`."""
    original = pp.zero_wrapper_for_fp_tensor_constructor
    seen = []

    def without_arange(fn, *args, **kwargs):
        if fn is pp._orig_torch_arange:
            assert "target_device" in kwargs
            seen.append(kwargs["target_device"])
            return fn
        return original(fn, *args, **kwargs)

    pp.zero_wrapper_for_fp_tensor_constructor = without_arange
    try:
        with deepspeed.zero.Init(config_dict_or_path={"bf16": {"enabled": True}}):
            model = Net()
    finally:
        pp.zero_wrapper_for_fp_tensor_constructor = original
    assert seen == [torch.device("cpu")]
    assert model.positions.dtype is torch.float32
    assert model.old.dtype is torch.bfloat16


def test_what_init_overrides_can_be_chosen():
    run_ranks(1, override_little)


def override_little() -> None:
    config = {"bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[]):
        model = Net()
    assert model.positions.dtype is torch.float32
    assert model.head.weight.dtype is torch.float32


def test_nested_disabled_and_failing_contexts():
    run_ranks(2, nest)


def nest() -> None:
    with deepspeed.zero.Init(dtype=torch.float), deepspeed.zero.Init(dtype=torch.half):
        assert torch.zeros(1).dtype is torch.float32  # the outer one decides
        pp.shutdown_init_context()
        assert torch.zeros is pp._orig_torch_zeros
        pp.restore_init_context()
        assert torch.zeros is not pp._orig_torch_zeros
        model = Net()
    assert sharded_names(model)
    with deepspeed.zero.Init(enabled=False):
        assert not sharded_names(Net())
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert torch.zeros is pp._orig_torch_zeros
    assert not sharded_names(Net())


def fail_inside() -> None:
    with deepspeed.zero.Init(dtype=torch.float):
        raise ZeroDivisionError


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_made_inside_the_block(stage: int):
    run_ranks(2, initialize_inside, stage)


def initialize_inside(stage: int) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2}}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
    }
    with deepspeed.zero.Init(config_dict_or_path=config, mem_efficient_linear=False, mpu=None):
        torch.manual_seed(0)
        inside = Net()
        engine, *_ = deepspeed.initialize(model=inside, config=config)
        assert not sharded_names(inside) or stage == 3
        # The block goes on where it was.
        assert sharded_names(nn.Sequential(nn.Linear(2, 2))) == {"0.weight", "0.bias"}
        pp.shutdown_init_context()
        assert torch.arange is pp._orig_torch_arange
        assert sharded_names(nn.Sequential(nn.Linear(2, 2))) == set()
        pp.shutdown_init_context()
        pp.restore_init_context()
        pp.restore_init_context()
        assert torch.arange is not pp._orig_torch_arange
    assert torch.arange is pp._orig_torch_arange
    pp.shutdown_init_context()
    pp.restore_init_context()
    assert torch.arange is pp._orig_torch_arange
    torch.manual_seed(0)
    outside, *_ = deepspeed.initialize(model=Net(), config=config)
    for each in (engine, outside):
        each.backward(each(torch.ones(2, 6)).square().mean())
        each.step()
    found, truth = (each._engine.state_dict() for each in (engine, outside))
    assert all(torch.equal(found[name], value) for name, value in truth.items())


def test_a_model_that_is_built_already():
    run_ranks(2, adopt)


def adopt() -> None:
    torch.manual_seed(dist.get_rank())
    model = Net()
    first = [model.head.weight.detach().clone()]
    dist.broadcast_object_list(first)
    deepspeed.zero.Init(module=model, dtype=torch.float)
    assert len(sharded_names(model)) == 8
    with deepspeed.zero.GatheredParameters(model.head.weight):
        assert torch.equal(model.head.weight, first[0])


def test_a_group_of_ranks():
    run_ranks(4, shard_in_pairs)


def shard_in_pairs() -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(dist.get_rank() // 2)
    mine = pairs[dist.get_rank() // 2]
    with deepspeed.zero.Init(data_parallel_group=mine, dtype=torch.float):
        model = Net()
    assert model.head.weight.partition_numel() == 9
    torch.manual_seed(dist.get_rank() // 2)
    truth = Net()
    with deepspeed.zero.GatheredParameters(model.head.weight):
        assert torch.equal(model.head.weight, truth.head.weight)


# ---------------------------------------------------------------------- attributes


def test_attributes_of_parameters():
    run_ranks(2, read_attributes)


def read_attributes() -> None:
    with deepspeed.zero.Init(dtype=torch.float):
        model = Net()
    weight, status = model.head.weight, deepspeed.zero.ZeroParamStatus
    assert pp.is_zero_param(weight)
    assert not pp.is_zero_param(nn.Parameter(torch.zeros(1)))
    assert (weight.ds_numel, weight.ds_shape) == (18, (3, 6))
    assert weight.ds_status is status.NOT_AVAILABLE
    assert weight.ds_tensor.shape == (9,)
    assert weight.partition_numel() == 9
    assert len({param.ds_id for param in model.parameters()}) == 8
    weight.ds_active_sub_modules.clear()
    with deepspeed.zero.GatheredParameters([weight]):
        assert weight.ds_status is status.AVAILABLE
        assert weight.ds_summary()["shape"] == (3, 6)
    weight.all_gather([model.scale, weight])
    assert weight.ds_status is model.scale.ds_status is status.AVAILABLE
    weight.data.fill_(dist.get_rank() + 1.0)
    weight.partition(has_been_updated=True)
    assert weight.ds_status is status.NOT_AVAILABLE
    assert model.scale.ds_status is status.AVAILABLE
    model.scale.partition()
    with deepspeed.zero.GatheredParameters([weight]):
        assert weight.flatten().tolist() == [1.0] * 9 + [2.0] * 9


def test_gathered_parameters_take_anything():
    run_ranks(2, gather_anything)


def gather_anything() -> None:
    with deepspeed.zero.Init(dtype=torch.float):
        model = Net()
    plain = nn.Parameter(torch.zeros(2))
    mixed = (param for param in [plain, None, *model.parameters(), model.scale, 3])
    with deepspeed.zero.GatheredParameters(mixed, modifier_rank=1), torch.no_grad():
        plain.fill_(dist.get_rank())
        if dist.get_rank() == 1:
            model.scale.fill_(4.0)
    assert plain[0] == dist.get_rank()
    with deepspeed.zero.GatheredParameters(model.scale, None, model.blocks[0], True):
        assert model.scale.tolist() == [4.0] * 6
    assert [p for _, p in model.blocks[0].ds_external_parameters()] == [model.scale]
    with deepspeed.zero.GatheredParameters(model.parameters(), enabled=False):
        assert len(sharded_names(model)) == 8
    with deepspeed.zero.GatheredParameters([]):
        pass


def test_external_parameters():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    deepspeed.zero.register_external_parameter(layer, other.weight)
    deepspeed.zero.register_external_parameter(layer, other.weight)
    assert [param for _, param in layer.ds_external_parameters()] == [other.weight]
    assert len(list(layer.all_parameters())) == 3
    pp.unregister_external_parameter(layer, other.weight)
    assert not list(layer.ds_external_parameters())
    with pytest.raises(ds_zero.ShardError, match="not one of the 0 that were registered"):
        pp.unregister_external_parameter(layer, other.weight)
    with pytest.raises(ds_zero.ShardError, match="got Tensor, expected a Parameter"):
        deepspeed.zero.register_external_parameter(layer, torch.zeros(1))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_quantized_weights": True}, "zero_quantized_weights: got True, but weights travel"),
        ({"param_swapper": object()}, "offload_param in the configuration"),
        ({"remote_device": "gpu"}, "remote_device: got 'gpu', expected one of none, cpu, nvme"),
        ({"dtype": torch.float64}, r"dtype: got torch\.float64"),
        (
            {"config": {"bf16": {"enabled": True}, "fp16": {"enabled": True}}},
            "enables bf16 and fp16",
        ),
        (
            {"data_parallel_group": 1, "sequence_data_parallel_group": 1},
            "which are the same thing; give one",
        ),
    ],
    ids=["quantized", "swapper", "device", "dtype", "both", "groups"],
)
def test_refused_arguments(options, message: str):
    with pytest.raises(ds_zero.ShardError, match=message):
        deepspeed.zero.Init(**options)


def test_one_rank_where_several_were_launched(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ds_zero.ShardError, match="has one rank, but the launcher started 2"):
        deepspeed.zero.Init()
