"""The engine with ds-zero: every stage trains alike, and any stage loads what any other saved."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core.errors import DsError, ModelMismatchError, NonFiniteError
from ds_core.testing import Raised, RankFailure, die, run_ranks

STAGES = (0, 1, 2, 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(9), nn.Linear(9, 9)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Repeated blocks, a tied head, a frozen and an unused parameter, and a buffer."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(11, 9)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(9, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(9), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids, targets, poison=1.0):
        if self.training:
            self.seen += 1
        x = self.embed(ids) * self.frozen
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float() * poison, targets)


def config(stage, **changes):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 6}},
        "zero_optimization": {"stage": stage},
        "progress": False,
        **changes,
    }


def make(stage, seed=0, **changes):
    torch.manual_seed(seed)
    return ds_core.initialize(Net(), config(stage, **changes))


def micro_batch(number, rank, size=4):
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return tuple(torch.randint(11, (size,), generator=generator) for _ in range(2))


def steps(engine, start, count):
    """Train on the same global batches whatever the world size, for 1 and 2 ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(start, start + count):
        parts = []
        for part in range(2):
            whole = [micro_batch(2 * step + part, half) for half in range(2)]
            if ranks == 1:
                parts.append(tuple(torch.cat(tensors) for tensors in zip(*whole, strict=True)))
            else:
                parts.append(whole[rank])
        losses.append(float(engine.train_batch(iter(parts))))
    return losses


FORMATS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
}


def train(stage, changes):
    engine = make(stage, seed=dist.get_rank(), **changes)
    losses = steps(engine, 0, 4)
    return losses, engine.grad_norm, engine.state_dict()


@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS)
def test_every_stage_trains_alike(changes):
    results = [run_ranks(2, train, stage, changes) for stage in STAGES]
    tolerance = 1e-5 if not changes else 2e-2
    for rank in range(2):
        losses, norm, state = results[0][rank]
        for stage in STAGES[1:]:
            other_losses, other_norm, other = results[stage][rank]
            assert other_losses == pytest.approx(losses, abs=tolerance), stage
            assert other_norm == pytest.approx(norm, rel=10 * tolerance), stage
            assert sorted(other) == sorted(state)
            for name, value in state.items():
                assert torch.allclose(other[name].float(), value.float(), atol=5 * tolerance), name


def save(stage, folder, changes):
    engine = make(stage, **changes)
    steps(engine, 0, 3)
    engine.save_checkpoint(folder, client_state={"stage": stage})
    return steps(engine, 3, 3), engine.state_dict()


def load(stage, folder, changes):
    engine = make(stage, seed=9, **changes)
    steps(engine, 20, 1)  # a past of its own, which loading replaces
    client = engine.load_checkpoint(folder)
    assert engine.global_step == 3
    return client, steps(engine, 3, 3), engine.state_dict()


@pytest.mark.parametrize("changes", [FORMATS["fp32"], FORMATS["fp16"]], ids=["fp32", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_with_identical_losses(tmp_path, stage, changes):
    saved = run_ranks(2, save, stage, str(tmp_path), changes)
    loaded = run_ranks(2, load, stage, str(tmp_path), changes)
    for (losses, state), (client, again, other) in zip(saved, loaded, strict=True):
        assert client == {"stage": stage}
        assert again == losses
        for name, value in state.items():
            assert torch.equal(other[name], value), name


# Every pair of stages at two ranks, and every stage met at another world size.
PAIRS = [(a, b, 2, 2) for a, b in itertools.permutations(STAGES, 2)]
PAIRS += [(0, 3, 2, 1), (1, 2, 1, 2), (2, 1, 2, 1), (3, 0, 1, 2), (3, 3, 2, 1), (3, 3, 1, 2)]


@pytest.mark.parametrize(("stage", "other", "saved_at", "loaded_at"), PAIRS)
def test_any_stage_loads_what_another_saved(tmp_path, stage, other, saved_at, loaded_at):
    saved = run_ranks(saved_at, save, stage, str(tmp_path), {})[0]
    client, losses, state = run_ranks(loaded_at, load, other, str(tmp_path), {})[0]
    assert client == {"stage": stage}
    if saved_at == loaded_at:
        assert losses == pytest.approx(saved[0], abs=1e-5)
    for name, value in saved[1].items():
        assert torch.allclose(state[name].float(), value.float(), atol=1e-4), name


def state_dict_round_trip(stage):
    trained, fresh = make(stage), make(stage, seed=5)
    steps(trained, 0, 2)
    state = trained.state_dict()
    fresh.load_state_dict(state)
    again = fresh.state_dict()
    plain = Net()
    plain.load_state_dict(state)
    return all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("stage", STAGES)
def test_state_dict_is_whole_and_loads_into_engine_and_model(stage):
    assert run_ranks(2, state_dict_round_trip, stage) == [True, True]


def no_sync_over_a_step(stage):
    engine = make(stage)
    for part in range(2):
        with engine.no_sync():
            engine.backward(engine(*micro_batch(part, dist.get_rank())))
            engine.step()
    return engine.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_inside_no_sync_averages_all_the_same(stage):
    first, second = run_ranks(2, no_sync_over_a_step, stage)
    expected = run_ranks(2, train_two_parts)[0]
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, atol=1e-6), name


def train_two_parts():
    engine = make(0)
    engine.train_batch(iter([micro_batch(part, dist.get_rank()) for part in range(2)]))
    return engine.state_dict()


def overflow_on_rank_1(stage):
    engine = make(stage, fp16={"enabled": True, "initial_scale_power": 10, "hysteresis": 1})
    before = engine.state_dict()
    poison = float("inf") if dist.get_rank() == 1 else 1.0
    for part in range(2):
        engine.backward(engine(*micro_batch(part, dist.get_rank()), poison))
        engine.step()
    after = engine.state_dict()
    trained = [name for name in before if name != "seen"]
    kept = all(torch.equal(before[name], after[name]) for name in trained)
    steps(engine, 1, 1)
    return kept, engine.scaler.scale, engine.skipped_steps, engine.global_step


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_on_one_rank_skips_on_all(stage):
    assert run_ranks(2, overflow_on_rank_1, stage) == [(True, 512.0, 1, 2)] * 2


def nan_on_rank_1(stage):
    engine = make(stage)
    steps(engine, 0, 1)
    before = engine.state_dict()
    poison = float("nan") if dist.get_rank() == 1 else 1.0
    engine.backward(engine(*micro_batch(8, dist.get_rank()), poison))
    engine.step()
    engine.backward(engine(*micro_batch(9, dist.get_rank())))
    with pytest.raises(NonFiniteError) as error:
        engine.step()
    after = engine.state_dict()
    kept = all(torch.equal(before[name], after[name]) for name in before if name != "seen")
    return str(error.value), kept


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_names_step_rank_and_parameter_on_every_rank(stage):
    (message, kept), (other, kept_too) = run_ranks(2, nan_on_rank_1, stage)
    assert kept
    assert kept_too
    assert message == other
    assert "step 1: the gradient norm is nan" in message
    assert "rank 1: loss nan" in message
    assert "first gradient '" in message


def models_differ(stage):
    torch.manual_seed(0)
    ds_core.initialize(Net(blocks=3 + dist.get_rank()), config(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_models_that_differ_are_an_error_on_every_rank(stage):
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, models_differ, stage, timeout_s=30)
    for outcome in failure.value.outcomes:
        assert isinstance(outcome, Raised)
        assert outcome.type.endswith(ModelMismatchError.__name__)
        assert "'blocks.3.norm.weight'" in outcome.message or "'unused'" in outcome.message


def bad_optimizer(stage, kind):
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    params = nn.Linear(2, 2).parameters() if kind == "foreign" else trained[1:]
    optimizer = torch.optim.SGD(params, lr=0.1)
    given = {key: value for key, value in config(stage).items() if key != "optimizer"}
    with pytest.raises(DsError) as error:
        ds_core.initialize(model, given, optimizer=optimizer)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("foreign", "is not a parameter of the model"), ("missing", "lacks 1 trainable parameters")],
)
@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_on_other_parameters_are_refused_alike(stage, kind, message):
    assert message in run_ranks(1, bad_optimizer, stage, kind)[0]


def die_in(stage, phase):
    engine = make(stage)
    steps(engine, 0, 1)
    victim = dist.get_rank() == 1
    for part in range(2):
        if victim and phase == "forward":
            engine.module.blocks[1].register_forward_pre_hook(lambda module, args: die())
        loss = engine(*micro_batch(part, dist.get_rank()))
        if victim and phase == "backward":
            loss.register_hook(lambda gradient: die())
        engine.backward(loss)
        if victim and phase == "step" and part == 1:
            die()
        engine.step()
    steps(engine, 1, 2)


@pytest.mark.parametrize(
    ("stage", "phase"),
    [(1, "backward"), (2, "step"), (3, "forward"), (3, "backward"), (3, "step")],
)
def test_a_killed_rank_is_named_by_the_other(stage, phase):
    outcomes = run_ranks(2, die_in, stage, phase, deaths={1: 9}, timeout_s=40)
    assert isinstance(outcomes[0], Raised), outcomes[0]
    assert outcomes[0].type == "ds_core.errors.CommError"
    assert "rank 1 stopped answering" in outcomes[0].message
