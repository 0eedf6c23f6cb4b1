from __future__ import annotations

import pytest
import torch
from torch import nn
from zero_loops import (
    adamw,
    assert_close,
    assert_same_parameters,
    compare,
    plain,
    plain_steps,
    sharded,
    sharded_steps,
)
from zero_models import CASES, COMPARED, Block, Stack, tokens, vectors

from ds_core.precision import Precision
from ds_core.testing import run_ranks


@pytest.mark.parametrize("name", COMPARED)
def test_sharded_training_equals_one_process(name: str, stage: int):
    run_ranks(2, compare, name, stage, timeout_s=30)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("name", ["tied", "odd-sizes"])
def test_any_world_size_equals_one_process(name: str, world_size: int, stage: int):
    run_ranks(world_size, compare, name, stage, timeout_s=30)


@pytest.mark.parametrize("name", ["branches-random", "inner-asymmetric"])
def test_ranks_that_differ_in_a_larger_world(name: str):
    run_ranks(3, compare, name, 3, timeout_s=30)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("name", ["untied", "branches", "reentrant"])
def test_any_prefetch_equals_one_process(name: str, prefetch: int):
    run_ranks(2, compare, name, 3, prefetch=prefetch, timeout_s=30)


@pytest.mark.parametrize("no_sync", [False, True], ids=["reduce-each", "no-sync"])
@pytest.mark.parametrize("name", ["tied", "lora", "unused"])
def test_gradient_accumulation(name: str, no_sync: bool, stage: int):
    run_ranks(2, compare, name, stage, accumulate=3, steps=3, no_sync=no_sync, timeout_s=30)


def test_no_sync_without_a_last_backward_outside(stage: int):
    run_ranks(2, step_after_no_sync, stage)


def step_after_no_sync(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    rank = torch.distributed.get_rank()
    for micro in range(2):
        with optimizer.no_sync():
            (case.loss(model, case.inputs(rank, micro), rank, micro) / 2).backward()
    optimizer.step()
    truth, _, _ = plain(case, 1, accumulate=2)
    assert_same_parameters(optimizer, truth, 1e-9)


@pytest.mark.parametrize("name", ["tied", "groups", "lora"])
def test_clipping(name: str, stage: int):
    run_ranks(2, compare, name, stage, max_norm=0.05, tolerance=1e-6)


def test_clip_grad_norm_returns_the_norm_before_clipping(stage: int):
    run_ranks(2, clip_by_hand, stage)


def clip_by_hand(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    case.loss(model, case.inputs(rank, 0), rank, 0).backward()
    found = optimizer.clip_grad_norm_(0.01)
    optimizer.step()
    torch.manual_seed(0)
    truth = case.build()
    reference = adamw(case.params(truth))
    for other in range(world):
        (case.loss(truth, case.inputs(other, 0), other, 0) / world).backward()
    expected = nn.utils.clip_grad_norm_(truth.parameters(), 0.01)
    reference.step()
    assert_close(found, expected, 1e-6, "norm")
    assert_same_parameters(optimizer, truth, 1e-6)


@pytest.mark.parametrize(
    "optimizer",
    ["Adam", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"],
)
def test_any_elementwise_optimizer(optimizer: str):
    run_ranks(2, train_with, optimizer)


def train_with(name: str) -> None:
    torch.set_default_dtype(torch.float64)

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(params, lr=1e-2)

    case = CASES["unused"]
    model, optimizer = sharded(case, 3, make)
    sharded_steps(model, optimizer, case, 3)
    truth, _, _ = plain(case, 3, make)
    assert_same_parameters(optimizer, truth, 1e-9)


def test_stages_are_bit_identical_and_close_to_one_process():
    losses = run_ranks(2, twenty_steps)[0]
    assert losses[1] == losses[2] == losses[3]
    assert max(abs(a - b) for a, b in zip(losses[1], losses[0], strict=True)) <= 1e-5


def twenty_steps() -> dict[int, list[float]]:
    case = CASES["untied"]
    losses = {0: plain(case, 20)[2]}
    weights = {}
    for stage in (1, 2, 3):
        model, optimizer = sharded(case, stage)
        losses[stage] = sharded_steps(model, optimizer, case, 20)
        weights[stage] = optimizer.full_state_dict()
    for name, value in weights[1].items():
        assert torch.equal(value, weights[2][name]), name
        assert torch.equal(value, weights[3][name]), name
    return losses


LOW = {
    "bf16-master": Precision(compute=torch.bfloat16, master=torch.float32),
    "bf16-no-master": Precision(compute=torch.bfloat16),
    "bf16-fp32-grad": Precision(compute=torch.bfloat16, master=torch.float32, grad=torch.float32),
    "fp16-master": Precision(compute=torch.float16, master=torch.float32),
}


@pytest.mark.parametrize("precision", sorted(LOW))
def test_low_precision_follows_fp32(precision: str, stage: int):
    for found, expected in run_ranks(2, low_precision_losses, stage, precision):
        assert found[-1] < found[0]
        assert found == pytest.approx(expected, rel=0.03)


def low_precision_losses(stage: int, precision: str) -> tuple[list[float], list[float]]:
    case = CASES["overfit"]
    model, optimizer = sharded(case, stage, precision=LOW[precision])
    found = sharded_steps(model, optimizer, case, 6)
    assert next(model.parameters()).dtype == LOW[precision].compute
    master = LOW[precision].master
    if master is not None:
        assert optimizer.full_parameter("norm.weight").dtype == master
    return found, plain(case, 6)[2]


def test_autocast(stage: int):
    run_ranks(2, compare, "autocast", stage, dtype=torch.float32, tolerance=1e-3)


def test_evaluation_and_generation_between_steps(stage: int):
    run_ranks(2, train_evaluate_generate, stage)


def train_evaluate_generate(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["untied"]
    model, optimizer = sharded(case, stage)
    torch.manual_seed(0)
    truth = case.build()
    reference = adamw(case.params(truth))
    for step in range(3):
        sharded_steps(model, optimizer, case, 1, first=step)
        plain_steps(truth, reference, case, 1, first=step)
        ids = tokens(5, step)
        with torch.no_grad():
            assert_close(model.eval()(ids), truth.eval()(ids), 1e-9, "evaluation")
        assert_close(model.train()(ids), truth(ids), 1e-9, "forward without backward")
        assert torch.equal(generate(model, ids), generate(truth, ids))
        with optimizer.gathered():
            rank = torch.distributed.get_rank()
            mine = tokens(rank, step)  # inside, ranks may do different things
            assert torch.equal(generate(model, mine, 2 + rank), generate(truth, mine, 2 + rank))
    assert_same_parameters(optimizer, truth, 1e-9)


def generate(model: nn.Module, ids: torch.Tensor, length: int = 3) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_training_while_gathered(stage: int):
    run_ranks(2, train_gathered, stage)


def train_gathered(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["untied"]
    model, optimizer = sharded(case, stage)
    with optimizer.gathered():
        sharded_steps(model, optimizer, case, 2)
        ids = tokens(0, 0)
        held = model(ids).detach()
    sharded_steps(model, optimizer, case, 2, first=2)
    truth, reference, _ = plain(case, 2)
    assert_close(held, truth(ids).detach(), 1e-9, "output while gathered")
    plain_steps(truth, reference, case, 2, first=2)
    assert_same_parameters(optimizer, truth, 1e-9)


def test_learning_rate_scheduler_of_torch(stage: int):
    run_ranks(2, scheduled, stage)


def scheduled(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["groups"]
    model, optimizer = sharded(case, stage)
    torch.manual_seed(0)
    truth = case.build()
    reference = adamw(case.params(truth))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, 0.03, total_steps=6)
        for each in (optimizer, reference)
    ]
    for step in range(5):
        sharded_steps(model, optimizer, case, 1, first=step)
        plain_steps(truth, reference, case, 1, first=step)
        for schedule in schedules:
            schedule.step()
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    assert_same_parameters(optimizer, truth, 1e-9)


def test_backward_twice_through_a_retained_graph(stage: int):
    run_ranks(2, retained, stage)


def retained(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    models = []
    for wrap in (True, False):
        torch.manual_seed(0)
        model = Stack()
        optimizer = adamw(model.parameters())
        if wrap:
            model, optimizer = sharded(CASES["stack"], stage)
        loss = model(vectors(0, 0)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        models.append((model, optimizer))
    assert_same_parameters(models[0][1], models[1][0], 1e-9)


def test_two_forwards_then_two_backwards(stage: int):
    run_ranks(2, interleaved, stage)


def interleaved(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    model, optimizer = sharded(CASES["stack"], stage)
    torch.manual_seed(0)
    truth = Stack()
    reference = adamw(truth.parameters())
    for each, step in ((model, optimizer), (truth, reference)):
        losses = [each(vectors(0, n)).square().mean() for n in range(2)]
        for loss in losses:
            loss.backward()
        step.step()
    assert_same_parameters(optimizer, truth, 1e-9)


def test_gradient_of_the_input(stage: int):
    run_ranks(2, input_gradient, stage)


def input_gradient(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    model, _ = sharded(CASES["lora"], stage)
    torch.manual_seed(0)
    truth = CASES["lora"].build()
    gradients = []
    for each in (model, truth):
        x = vectors(0, 0).requires_grad_()
        each(x).square().mean().backward()
        gradients.append(x.grad)
    assert_close(gradients[0], gradients[1], 1e-9, "gradient of the input")


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_exception_on_all_ranks_and_then_on(place: str, stage: int):
    run_ranks(2, fail_and_go_on, place, stage)


def fail_and_go_on(place: str, stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["untied"]
    model, optimizer = sharded(case, stage)
    losses = sharded_steps(model, optimizer, case, 2)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    def fail_later(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(fail)

    def one_pass() -> None:
        case.loss(model, tokens(0, 9), 0, 0).backward()

    hook = model.blocks[1].register_forward_hook(fail if place == "forward" else fail_later)
    with pytest.raises(RuntimeError, match="on purpose"):
        one_pass()
    hook.remove()
    optimizer.zero_grad()
    losses += sharded_steps(model, optimizer, case, 2, first=2)
    truth, _, expected = plain(case, 4)
    assert_close(torch.tensor(losses), torch.tensor(expected), 1e-9, "losses")
    assert_same_parameters(optimizer, truth, 1e-9)


def test_order_that_changes_every_step_is_retraced():
    run_ranks(2, changing_order)


def changing_order() -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["branches"]
    routes = [(0, 1, 2, 3), (3, 2, 1, 0), (5, 0, 4), (1, 1, 2), (), (0, 1, 2, 3)]
    model, optimizer = sharded(case, 3)
    torch.manual_seed(0)
    truth = case.build()
    reference = adamw(truth.parameters())
    for step, route in enumerate(routes * 2):
        for each, step_of in ((model, optimizer), (truth, reference)):
            each(vectors(0, step), route).square().mean().backward()
            step_of.step()
            step_of.zero_grad()
    assert_same_parameters(optimizer, truth, 1e-9)


def test_two_models_in_one_process(stage: int):
    run_ranks(2, two_models, stage)


def two_models(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    first, second = CASES["untied"], CASES["stack"]
    a, optimizer_a = sharded(first, stage)
    b, optimizer_b = sharded(second, stage)
    rank = torch.distributed.get_rank()
    for step in range(3):
        one = first.loss(a, first.inputs(rank, step), rank, step)
        two = second.loss(b, second.inputs(rank, step), rank, step)
        (one + two).backward()  # one graph through both
        for optimizer in (optimizer_a, optimizer_b):
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(optimizer_a, plain(first, 3)[0], 1e-9)
    assert_same_parameters(optimizer_b, plain(second, 3)[0], 1e-9)


def test_closure_is_evaluated_by_step(stage: int):
    run_ranks(2, with_closure, stage)


def with_closure(stage: int) -> None:
    model, optimizer = sharded(CASES["stack"], stage)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(vectors(0, 0)).square().mean()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second.item() < first.item()


def test_buffers_stay_and_are_not_sharded(stage: int):
    run_ranks(2, batch_norm, stage)


def batch_norm(stage: int) -> None:
    model, optimizer = sharded(CASES["modules"], stage)
    model(vectors(0, 0)).sum().backward()
    optimizer.step()
    assert int(model.norm.num_batches_tracked) == 1
    assert model.norm.running_mean.abs().sum() > 0
    assert set(optimizer.full_state_dict()) == set(dict(model.named_parameters()))


def test_block_may_be_called_outside_its_parent(stage: int):
    run_ranks(2, call_a_block, stage)


def call_a_block(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    model, _ = sharded(CASES["stack"], stage)
    torch.manual_seed(0)
    truth = Stack()
    x = vectors(0, 0)
    with torch.no_grad():
        assert_close(model.blocks[1](x), truth.blocks[1](x), 1e-9, "block")
    assert isinstance(model.blocks[1], Block)


def test_a_model_that_is_only_run_is_sharded_without_states_or_gradients(stage: int):
    run_ranks(2, only_run, stage)


def only_run(stage: int) -> None:
    import ds_core

    model, truth = vectors_model(), vectors_model()
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}}
    engine = ds_core.initialize(model, config, training=False)
    with torch.no_grad():
        assert torch.equal(engine(torch.ones(2, 8)), truth(torch.ones(2, 8)))
    held = engine.memory()
    assert held["optimizer"] == held["master"] == held["gradients"] == 0
    engine.close()
    assert all(param.requires_grad for param in model.parameters())


def vectors_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
