from __future__ import annotations

import contextlib
import functools
import logging
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from user_programs import (
    RATE,
    assert_same,
    batch,
    config,
    loss_of,
    make_model,
    plain_losses,
    train,
)

import deepspeed
from deepspeed._errors import NotProvidedError
from deepspeed.utils import groups
from ds_core.errors import ConfigError, DsError
from ds_core.testing import run_ranks


def rank_losses(losses: list[list[float]]) -> list[float]:
    return losses[dist.get_rank()]


# ---------------------------------------------------------------------- losses


def test_losses_of_the_tutorials_loop_are_those_of_a_plain_one(stage: int):
    run_ranks(2, tutorial, stage)


def tutorial(stage: int) -> None:
    model = make_model()
    engine, optimizer, loader, schedule = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(stage)
    )
    assert_same(train(engine, 6), rank_losses(plain_losses(6, world=2)))
    assert loader is None
    assert schedule is None
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert isinstance(engine, nn.Module)
    assert engine.module is model
    assert engine.optimizer is optimizer
    assert isinstance(optimizer, deepspeed.DeepSpeedOptimizer)
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (6, 6, 24)
    assert engine.get_batch_info() == (4, 2, 1)
    assert engine.zero_optimization_stage() == stage
    assert engine.get_lr() == [RATE]
    assert engine.get_mom() == [(0.9, 0.999)]
    assert engine.world_size == engine.dp_world_size == 2
    assert engine.global_rank == dist.get_rank()
    assert engine.was_step_applied()
    assert not optimizer.overflow
    assert engine.skipped_steps == 0
    engine.destroy()
    engine.destroy()
    with deepspeed.zero.GatheredParameters(model.parameters()):  # at stage 3 they stay sharded
        assert torch.isfinite(model(torch.ones(1, 6))).all()


def test_micro_batches_are_counted_with_clipping(stage: int):
    run_ranks(2, counted, stage)


def counted(stage: int) -> None:
    options = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.3}
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(stage, **options))
    losses, boundaries, returned = [], [], []
    for number in range(6):
        loss = loss_of(engine, number, dist.get_rank())
        boundaries.append(engine.is_gradient_accumulation_boundary())
        returned.append(float(engine.backward(loss)))
        engine.step()
        losses.append(loss.item())
    assert_same(losses, rank_losses(plain_losses(3, world=2, accumulate=2, max_norm=0.3)))
    assert_same(returned, [loss / 2 for loss in losses])
    assert boundaries == [False, True] * 3
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (3, 6, 24)
    norm = engine.get_global_grad_norm()
    assert norm is not None
    assert norm > 0.3


def test_boundaries_that_the_caller_sets_before_backward(stage: int):
    run_ranks(2, set_by_caller, stage)


def set_by_caller(stage: int) -> None:
    """As accelerate does it: after the forward, with a loss that is divided already."""
    engine, *_ = deepspeed.initialize(
        model=make_model(), config=config(stage, gradient_accumulation_steps=3)
    )
    losses = []
    for number in range(6):
        loss = loss_of(engine, number, dist.get_rank())
        losses.append(loss.item())
        engine.set_gradient_accumulation_boundary(is_boundary=number % 3 == 2)
        engine.backward(loss / 3, scale_wrt_gas=False)
        if number % 3 == 2:
            engine.step()
    assert_same(losses, rank_losses(plain_losses(2, world=2, accumulate=3)))
    assert (engine.global_steps, engine.micro_steps) == (2, 2)


def test_plain_backward_and_no_sync(stage: int):
    run_ranks(2, plain_backward, stage)


def plain_backward(stage: int) -> None:
    engine, *_ = deepspeed.initialize(
        model=make_model(), config=config(stage, gradient_accumulation_steps=2)
    )
    losses = []
    for number in range(4):
        quiet = number % 2 == 0 and stage < 2
        with engine.no_sync() if quiet else contextlib.nullcontext():
            loss = loss_of(engine, number, dist.get_rank())
            engine.scale(loss).backward()
        engine.step()
        losses.append(loss.item())
    assert_same(losses, rank_losses(plain_losses(2, world=2, accumulate=2)))


def test_bf16_follows_fp32_and_keeps_a_master_copy(stage: int):
    run_ranks(2, in_bf16, stage)


def in_bf16(stage: int) -> None:
    engine, *_ = deepspeed.initialize(
        model=make_model(), config=config(stage, bf16={"enabled": True}, fp16={"enabled": "auto"})
    )
    assert engine.bfloat16_enabled()
    assert not engine.fp16_enabled()
    losses = []
    for number in range(6):
        loss = loss_of(engine, number, dist.get_rank(), torch.bfloat16)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert_same(losses, rank_losses(plain_losses(6, world=2)), tolerance=2e-2)
    assert next(engine.module.parameters()).dtype == torch.bfloat16


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(caplog: Any):
    run_ranks(2, skips)


def skips() -> None:
    for precision in ({}, {"fp16": {"enabled": True, "initial_scale_power": 4}}):
        engine, optimizer, *_ = deepspeed.initialize(
            model=make_model(), config=config(1, **precision)
        )
        dtype = torch.float16 if precision else torch.float32
        before = engine._engine.sharding.full_parameter("0.weight").clone()
        loss = loss_of(engine, 0, dist.get_rank(), dtype)
        engine.backward(loss * (float("inf") if dist.get_rank() else 1.0))
        engine.step()
        assert optimizer.overflow
        assert not engine.was_step_applied()
        assert (engine.global_steps, engine.skipped_steps) == (1, 1)
        assert torch.equal(engine._engine.sharding.full_parameter("0.weight"), before)
        engine.backward(loss_of(engine, 1, dist.get_rank(), dtype))
        engine.step()
        assert engine.was_step_applied()
        assert not optimizer.overflow
        assert optimizer.loss_scale == (16.0 if precision else 1.0)
        engine.destroy()


# ---------------------------------------------------------------------- what is passed


def test_forms_of_optimizer_parameters_schedule_and_config(stage: int, tmp_path: Any):
    run_ranks(2, forms, stage, str(tmp_path))


def forms(stage: int, folder: str) -> None:
    without = {key: value for key, value in config(stage).items() if key != "optimizer"}
    expected = rank_losses(plain_losses(3, world=2))

    def adamw(params: Any) -> torch.optim.Optimizer:
        assert isinstance(params, list)
        return torch.optim.AdamW(params, lr=RATE, weight_decay=0.1)

    def trained(**arguments: Any) -> Any:
        engine, *_ = found = deepspeed.initialize(model=model, **arguments)
        assert_same(train(engine, 3), expected)
        engine.destroy()
        return found

    model = make_model()
    given = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(given, 100)
    *_, schedule = trained(optimizer=given, lr_scheduler=scheduler, config_params=without)
    assert schedule is scheduler
    assert scheduler.last_epoch == 3
    model = make_model()
    *_, schedule = trained(
        optimizer=adamw,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100),
        args=Namespace(device_rank=0),
        dist_init_required=False,
        config=without,
    )
    assert schedule.last_epoch == 3
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": RATE},
    ]
    _, optimizer, *_ = trained(model_parameters=groups, config=config(stage))
    assert len(optimizer.param_groups) == 2
    model = make_model()
    trained(model_parameters=filter(lambda p: p.requires_grad, model.parameters()),
            args=Namespace(deepspeed_config=written(folder, config(stage))))  # fmt: skip


def written(folder: str, content: dict[str, Any]) -> str:
    import json

    path = f"{folder}/config-{dist.get_rank()}.json"
    with open(path, "w") as file:
        json.dump(content, file)
    return path


def test_parameters_that_nobody_asks_to_train_stay(stage: int):
    run_ranks(2, partly, stage)


def partly(stage: int) -> None:
    model = make_model()
    kept = model[0].weight.detach().clone()
    last = model[4].bias.detach().clone()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model[4].parameters(), config=config(stage)
    )
    train(engine, 2)
    state = engine.module_state_dict()
    assert torch.equal(state["0.weight"], kept)
    assert not torch.equal(state["4.bias"], last)


def test_training_data_comes_in_the_order_of_torchs_sampler():
    run_ranks(2, over_data)


def over_data() -> None:
    samples = [batch(number, 0)[0] for number in range(9)]
    data = torch.utils.data.TensorDataset(torch.cat(samples))
    engine, _, loader, _ = deepspeed.initialize(
        model=make_model(), training_data=data, config=config(1)
    )
    sampler = torch.utils.data.DistributedSampler(data, 2, dist.get_rank())
    expected = [data[index][0] for index in sampler]
    seen = [sample for (inputs,) in loader for sample in inputs]
    assert len(loader) == 5
    assert torch.equal(torch.stack(seen), torch.stack(expected))
    in_order = engine.deepspeed_io(data, batch_size=3, route="eval")
    assert next(iter(in_order))[0].shape == (3, 6)
    with pytest.raises(ValueError, match="map-style"):
        engine.deepspeed_io(iter([]))


# ---------------------------------------------------------------------- only running the model


def test_without_an_optimizer_the_model_is_only_run(stage: int):
    run_ranks(2, only_run, stage)


def only_run(stage: int) -> None:
    model, truth = make_model(), make_model()
    settings = {key: value for key, value in config(stage).items() if key != "optimizer"}
    engine, optimizer, loader, schedule = deepspeed.initialize(model=model, config=settings)
    assert loader is None
    assert schedule is None
    assert (optimizer is None) == (stage == 0)
    engine.eval()
    inputs, _ = batch(0, 0)
    with torch.no_grad():
        assert torch.equal(engine(inputs), truth(inputs))
    assert not engine.training
    assert not engine.module.training
    with pytest.raises(DsError, match="no optimizer"):
        engine.backward(loss_of(engine, 0, 0))
    with pytest.raises(DsError, match="no optimizer"):
        engine.step()
    engine.destroy()
    assert all(param.requires_grad for param in model.parameters())


def test_stage_3_optimizer_has_what_trl_takes_hold_of():
    run_ranks(2, like_trl)


def like_trl() -> None:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(3))
    offload = engine.optimizer.parameter_offload
    for _, param in [
        *offload.module.named_parameters(recurse=True), *offload.module.ds_external_parameters()
    ]:  # fmt: skip
        param.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload._register_deepspeed_module(offload.module)
    assert_same(train(engine, 2), rank_losses(plain_losses(2, world=2)))


# ---------------------------------------------------------------------- members


def test_members_of_an_engine_in_one_process(tmp_path: Any, caplog: Any):
    model = make_model()
    model.vocabulary = 17
    settings = config(
        0,
        gradient_accumulation_steps=2,
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": RATE}},
        csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
    )
    engine, optimizer, _, schedule = deepspeed.initialize(model=model, config=settings)
    assert engine.config is settings
    assert engine.vocabulary == 17
    assert isinstance(schedule, deepspeed.runtime.lr_schedules.WarmupLR)
    assert engine.lr_scheduler is schedule
    assert engine.optimizer_name() == "AdamW"
    assert engine.scheduler_params()["warmup_num_steps"] == 4
    assert engine.gradient_clipping() == 1.0
    assert engine.zero_reduce_bucket_size() == 500_000_000
    assert not engine.zero_gather_16bit_weights_on_model_save()
    assert not engine.zero_optimization()
    assert not engine.zero_optimization_partition_gradients()
    assert engine.device == torch.device("cpu")
    assert engine.local_rank == 0
    assert engine.monitor.enabled
    engine.monitor.write_events([("Eval/loss", 0.5, 4)])
    engine.set_train_batch_size(6)
    assert engine.gradient_accumulation_steps() == 3
    assert not hasattr(engine, "timers")
    assert not hasattr(engine, "nothing_like_it")
    with pytest.raises(NotProvidedError, match="wall_clock_breakdown"):
        _ = engine.timers
    with pytest.raises(NotProvidedError, match="DeepCompile"):
        engine.compile(schedule=[])
    with pytest.raises(NotProvidedError, match="groups"):
        optimizer.add_param_group({})
    with pytest.raises(NotProvidedError, match="closure"):
        optimizer.step(lambda: 0.0)
    assert sorted(engine.state_dict())[0] == "module.0.bias"
    assert engine.train().training
    assert not engine.eval().module.training
    engine.destroy()


def test_schedules_whose_step_takes_arguments():
    class Samples:
        """As Megatron's: it counts samples."""

        def __init__(self) -> None:
            self.seen = 0

        def step(self, increment: int) -> None:
            self.seen += increment

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

    schedule = Samples()
    engine, *_ = deepspeed.initialize(
        model=make_model(), lr_scheduler=schedule, config=config(0, gradient_accumulation_steps=2)
    )
    train(engine, 2)
    assert schedule.seen == 4
    assert engine.lr_scheduler is schedule
    for number in range(2):
        engine.backward(loss_of(engine, number, 0))
        engine.step(lr_kwargs={"increment": 10})
    assert schedule.seen == 14


def test_states_of_the_optimizer_go_into_another_one(stage: int):
    run_ranks(2, states_move, stage)


def states_move(stage: int) -> None:
    engine, optimizer, *_ = deepspeed.initialize(model=make_model(), config=config(stage))
    train(engine, 2)
    weights = {name: value.clone() for name, value in engine.module_state_dict().items()}
    states = optimizer.state_dict()
    expected = train(engine, 2, first=2)
    other, second, *_ = deepspeed.initialize(model=make_model(), config=config(stage))
    other.load_module_state_dict({"module": weights})
    second.load_state_dict(states)
    assert train(other, 2, first=2) == expected
    assert len(second.state) > 0
    with pytest.raises(NotProvidedError, match="load_checkpoint"):
        second.load_state_dict({"state": {}})


# ---------------------------------------------------------------------- bad input


def test_what_cannot_be_used_is_named(caplog: Any):
    with pytest.raises(ConfigError, match="no configuration"):
        deepspeed.initialize(model=make_model())
    with pytest.raises(ConfigError, match="keep one"):
        deepspeed.initialize(
            args=Namespace(deepspeed_config="a.json"), model=make_model(), config=config(0)
        )
    with pytest.raises(DsError, match="model: got NoneType"):
        deepspeed.initialize(config=config(0))
    with pytest.raises(DsError, match="can be read once"):
        deepspeed.initialize(model=make_model(), model_parameters=iter(()), config=config(0))
    with pytest.raises(DsError, match="optimizer: got str"):
        deepspeed.initialize(model=make_model(), optimizer="adam", config=config(0))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"get_model_parallel_world_size": 2}, "ds-pipe"),
        ({"get_sequence_parallel_world_size": 4}, "sequence parallelism"),
        ({"get_data_parallel_world_size": 2}, "part of the ranks"),
    ],
)
def test_an_mpu_of_more_than_data_parallelism_is_refused(sizes: dict[str, int], named: str):
    class Unit:
        pass

    for name, size in sizes.items():
        setattr(Unit, name, staticmethod(lambda size=size: size))
    with pytest.raises(NotProvidedError, match=named):
        deepspeed.initialize(model=make_model(), config=config(0), mpu=Unit)


def test_an_mpu_of_data_parallelism_and_a_mesh_of_it_are_accepted():
    class Unit:
        get_data_parallel_world_size = staticmethod(lambda: 1)
        get_model_parallel_world_size = staticmethod(lambda: 1)

    deepspeed.initialize(model=make_model(), config=config(0), mpu=Unit, mesh_param=(1, 1))
    assert groups.mpu is Unit
    assert groups.mesh_device.shape == (1, 1)
    for shape, named in (((1, 2), "ds-pipe"), ((2, 1), r"give \(1, 1\)"), ((1,), "expected")):
        with pytest.raises(NotProvidedError, match=f"mesh_param: .*{named}"):
            deepspeed.initialize(model=make_model(), config=config(0), mesh_param=shape)
    sizes = {"data_parallel_size": 2, "sequence_parallel_size": 1}
    with pytest.raises(NotProvidedError, match="data_parallel_size, sequence_parallel_size: got"):
        deepspeed.initialize(model=make_model(), config={**config(0), **sizes})


def test_groups_answer_after_initialize_by_its_mpu_or_mesh():
    run_ranks(2, groups_after_initialize)


def groups_after_initialize() -> None:
    class Unit:
        get_data_parallel_world_size = staticmethod(dist.get_world_size)
        get_data_parallel_rank = staticmethod(dist.get_rank)
        get_data_parallel_group = staticmethod(lambda: own)
        get_model_parallel_rank = staticmethod(lambda: 0)
        get_model_parallel_world_size = staticmethod(lambda: 1)

    own = None
    sizes = {"data_parallel_size": 2, "sequence_parallel_size": 1}
    engine, *_ = deepspeed.initialize(model=make_model(), config={**config(2), **sizes})
    assert groups.mesh_device.mesh_dim_names == ("data_parallel", "sequence_parallel")
    assert groups._get_sequence_parallel_world_size() == 1
    assert groups._get_sequence_parallel_rank() == 0
    assert dist.get_process_group_ranks(engine.get_sequence_parallel_group()) == [dist.get_rank()]
    assert groups._get_data_parallel_group_ranks() == [0, 1]
    groups.mesh_device, own = None, dist.new_group([0, 1])
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(2), mpu=Unit)
    assert groups._get_data_parallel_group() is own
    assert groups._get_data_parallel_world_size() == engine.dp_world_size == 2
    assert groups._get_model_parallel_world_size() == engine.mp_world_size == 1
    assert groups._get_data_parallel_rank() == dist.get_rank()
    with pytest.raises(NotProvidedError, match="no sequence-parallel group"):
        engine.get_sequence_parallel_group()
    groups.mpu = None


def test_destroy_leaves_the_model_sharded_and_another_engine_takes_it(stage: int):
    run_ranks(2, destroyed, stage)


def destroyed(stage: int) -> None:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(stage))
    model, optimizer = engine.module, engine.optimizer
    train(engine, 2)
    expected = engine.module_state_dict()
    rows = engine._engine.mesh.ledger.rows()
    engine.destroy()
    engine.destroy()
    assert engine._engine.mesh.ledger.rows() == rows  # nothing is sent
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    if stage > 0:
        assert not optimizer.state
        with pytest.raises(DsError, match="ended training"):
            engine.save_checkpoint("nowhere")
    if stage == 3:
        assert {p.ds_status.name for p in model.parameters()} == {"NOT_AVAILABLE"}
        with deepspeed.zero.GatheredParameters(model.parameters()):
            assert all(torch.equal(expected[n], p) for n, p in model.named_parameters())
    else:
        assert all(torch.equal(expected[n], p) for n, p in model.named_parameters())
    names = [f"module.{name}" for name in expected]
    assert list(engine.state_dict()) == names
    again, *_ = deepspeed.initialize(model=model, config=config(stage))
    plain = make_model()
    plain.load_state_dict(expected)
    losses = rank_losses(plain_losses(2, world=2, max_norm=1e9, model=plain))
    assert_same(train(again, 2), losses)
    # Also with a model that one rank leaves earlier than the others.
    if dist.get_rank() == 0:
        again.destroy()
    dist.barrier()


def test_state_dict_tells_names_and_shapes_at_every_stage(stage: int):
    run_ranks(2, tells_names, stage)


def tells_names(stage: int) -> None:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(stage))
    truth = make_model().state_dict()
    if dist.get_rank() == 0:  # the original's sends nothing
        engine.state_dict()
    shapes = {name: value.shape for name, value in engine.state_dict().items()}
    saves_nothing = stage == 3 and dist.get_rank() != 0
    assert shapes == {
        f"module.{name}": torch.Size([0]) if saves_nothing else value.shape
        for name, value in truth.items()
    }
    assert list(engine.module.state_dict()) == list(truth)
    whole = engine.module_state_dict()
    assert all(torch.equal(whole[name], value) for name, value in truth.items())


#: What accelerate, transformers, lightning, trl and peft read of an engine and its optimizer.
READ = {
    "": "module optimizer lr_scheduler config device backward step no_sync compile destroy train "
    "eval zero_grad parameters to set_gradient_accumulation_boundary get_global_grad_norm "
    "save_checkpoint load_checkpoint zero_gather_16bit_weights_on_model_save "
    "_zero3_consolidated_16bit_state_dict _consolidated_16bit_state_dict",
    "optimizer": "overflow param_groups state_dict",
    "optimizer.parameter_offload": "module forward_hooks backward_hooks param_coordinator "
    "_register_deepspeed_module",
    "optimizer.parameter_offload.param_coordinator": "is_invalid_trace _invalidate_trace",
}


def test_what_libraries_read_of_an_engine_is_there():
    run_ranks(2, read_by_libraries)


def read_by_libraries() -> None:
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(3, scheduler=schedule))
    for path, names in READ.items():
        owner = functools.reduce(getattr, filter(None, path.split(".")), engine)
        missing = [name for name in names.split() if not hasattr(owner, name)]
        assert missing == [], path
    assert isinstance(engine.config, dict)
    for param in engine.module.parameters():
        for name in ("ds_numel", "ds_shape", "ds_status", "ds_id", "partition_numel"):
            assert hasattr(param, name), name
        assert isinstance(param.ds_active_sub_modules, set)
    assert all(hasattr(module, "ds_external_parameters") for module in engine.module.modules())


@pytest.fixture(autouse=True)
def no_groups() -> Iterator[None]:
    """What a test has `initialize` say of groups is gone after it."""
    yield
    groups.mpu = groups.mesh_device = None


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
