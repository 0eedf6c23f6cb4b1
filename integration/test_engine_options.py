"""What a config may ask of the engine's gradients, at every stage, against plain PyTorch."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import ds_core
from ds_core.errors import CheckpointError, ConfigError
from ds_core.testing import run_ranks

STAGES = (0, 1, 2, 3)
RANKS = 2


class Net(nn.Module):
    """Two blocks, a tied head and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.full((6,), 0.1), requires_grad=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x + self.shift))
        return self.head(x).float().logsumexp(-1).mean()


def make(stage, **changes):
    torch.manual_seed(0)
    return ds_core.initialize(
        Net(),
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "zero_optimization": {"stage": stage},
            **changes,
        },
    )


def ids(number, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return torch.randint(7, (4,), generator=torch.Generator().manual_seed(10 * number + rank))


def plain(*steps, weight=1.0, accumulation=2):
    """Parameters after steps of the given micro-batches on all ranks, by torch alone."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for step in steps:
        for number in step:
            for rank in range(RANKS):
                (model(ids(number, rank)) * weight / accumulation / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def check(results, expected, atol=1e-5):
    for state in results:
        for name, value in expected.items():
            assert torch.allclose(state[name].float(), value, atol=atol), name


# ---------------------------------------------------------------------------- accumulation


def unmanaged(stage):
    engine = make(stage, managed_gradient_accumulation=False)
    for step in ((0, 1, 2), (3,)):
        for number in step:
            engine.backward(engine(ids(number)))
        assert engine.step()
        assert engine.was_step_applied
    return engine.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_without_managed_accumulation_each_step_call_is_a_step(stage):
    check(run_ranks(RANKS, unmanaged, stage), plain((0, 1, 2), (3,)))


def unmanaged_batches(stage):
    engine = make(stage, managed_gradient_accumulation=False)
    engine.train_batch(iter([ids(0), ids(1)]))
    assert engine.global_step == 1
    return engine.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_without_managed_accumulation_train_batch_is_one_step_all_the_same(stage):
    check(run_ranks(RANKS, unmanaged_batches, stage), plain((0, 1)))


def forgetful(stage):
    engine = make(stage)
    engine.backward(engine(ids(0)))
    engine.step()
    engine.zero_grad()
    engine.backward(engine(ids(1)))
    assert engine.step()
    return engine.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_forgets_the_same_at_every_stage(stage):
    check(run_ranks(RANKS, forgetful, stage), plain((1,)))


def boundaries(stage):
    engine = make(stage)
    for number, ends in enumerate((False, False, True, True)):
        engine.set_boundary(ends)
        assert engine.is_boundary == ends
        engine(ids(number)).backward()
        assert engine.step() == ends
    return engine.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_boundaries_may_be_set_by_hand(stage):
    check(run_ranks(RANKS, boundaries, stage), plain((0, 1, 2), (3,)))


def resized(stage):
    engine = make(stage)
    engine.train_batch(iter([ids(0), ids(1)]))
    engine.set_train_batch_size(4 * RANKS)
    engine.train_batch(iter([ids(2)]))
    engine.set_train_micro_batch_size(2)
    engine.set_train_batch_size(4 * RANKS)
    return engine.accumulation, engine.state_dict()


def test_the_batch_may_change_between_steps():
    results = run_ranks(RANKS, resized, 2)
    assert [accumulation for accumulation, _ in results] == [2] * RANKS
    # The last step was one micro-batch, which counts whole.
    check([state for _, state in results], plain((0, 1), (2, 2)))


def reduced_once(stage):
    engine = make(stage, gradient_accumulation_steps=1)
    engine.train_batch(iter([ids(0)]))
    with engine.mesh.ledger.measure() as apart:
        engine.backward(engine(ids(1)) / 2)
        engine.backward(engine(ids(2)) / 2)
        engine.step()
    with engine.mesh.ledger.measure() as together:
        with engine.reduce_once():
            engine.backward(engine(ids(3)) / 2)
            engine.backward(engine(ids(4)) / 2)
        engine.step()
    return engine.state_dict(), _gradient_bytes(apart), _gradient_bytes(together)


def _gradient_bytes(sent):
    # Whether a parameter was used is voted on by an all-reduce of a few bytes.
    return sum(
        row.sent_bytes
        for row in sent.rows()
        if row.op in ("all_reduce", "reduce_scatter") and row.caller != "used parameters"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_several_backwards_are_reduced_once(stage):
    for state, apart, together in run_ranks(RANKS, reduced_once, stage):
        assert together * 2 == apart
        check([state], plain((0, 0), (1, 2), (3, 4)))  # the first batch counts whole


# ---------------------------------------------------------------------------- plain backward


class Features(Net):
    def forward(self, ids):
        return torch.tanh(self.blocks[1](torch.tanh(self.blocks[0](self.embed(ids)))))


def features(stage):
    torch.manual_seed(0)
    engine = make(stage)
    engines = [engine, make(stage)]
    for each in engines:
        each.module.__class__ = Features
    for number in (0, 1):
        ours, others = (each(ids(number)) for each in engines)
        # One backward for two engines, from a tensor and its gradient.
        (ours * others).backward(torch.full_like(ours, 0.1))
        for each in engines:
            each.step()
    return [each.state_dict() for each in engines]


@pytest.mark.parametrize("stage", STAGES)
def test_engines_may_share_a_backward_that_is_no_scalars(stage):
    torch.manual_seed(0)
    twin = Features()
    trained = [p for p in twin.parameters() if p.requires_grad]
    for number in (0, 1):
        for rank in range(RANKS):
            output = twin(ids(number, rank))
            # Both engines hold the same values, and each sees the other's as a constant.
            (output * output.detach()).backward(torch.full_like(output, 0.1 / 2 / RANKS))
    with torch.no_grad():
        for param in trained:
            if param.grad is not None:
                param -= 0.5 * param.grad
    expected = {name: p.detach() for name, p in twin.named_parameters()}
    for states in run_ranks(RANKS, features, stage):
        check(states, expected)


# ---------------------------------------------------------------------------- on the wire


def trained(stage, changes):
    engine = make(stage, **changes)
    engine.train_batch(iter([ids(0), ids(1)]))
    with engine.mesh.ledger.measure() as sent:
        engine.train_batch(iter([ids(2), ids(3)]))
    return engine.state_dict(), _gradient_bytes(sent), engine.grad_norm


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_may_be_summed(stage):
    results = run_ranks(RANKS, trained, stage, {"gradient_allreduce_op": "sum"})
    check([state for state, *_ in results], plain((0, 1), (2, 3), weight=RANKS))


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_may_travel_in_half_the_bytes(stage, wire):
    wide = run_ranks(RANKS, trained, stage, {})
    narrow = run_ranks(RANKS, trained, stage, {"communication_data_type": wire})
    assert [sent for _, sent, _ in narrow] == [sent // 2 for _, sent, _ in wide]
    check([state for state, *_ in narrow], plain((0, 1), (2, 3)), atol=5e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_may_travel_in_fp32(stage):
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    narrow = run_ranks(RANKS, trained, stage, bf16)
    wide = run_ranks(RANKS, trained, stage, {**bf16, "communication_data_type": "fp32"})
    assert [sent for _, sent, _ in wide] == [2 * sent for _, sent, _ in narrow]
    check([state for state, *_ in wide], plain((0, 1), (2, 3)), atol=2e-2)


# ---------------------------------------------------------------------------- sparse gradients


class Lookup(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(50, 3, sparse=sparse)
        self.linear = nn.Linear(3, 1)

    def forward(self, ids):
        return self.linear(self.table(ids)).square().mean()


def lookups(sparse, optimizer, steps=3):
    torch.manual_seed(0)
    engine = ds_core.initialize(
        Lookup(sparse),
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.01,
            "sparse_gradients": sparse,
            "optimizer": {"type": optimizer, "params": {"lr": 0.5}},
        },
    )
    with engine.mesh.ledger.measure() as sent:
        for step in range(steps):
            engine.train_batch(iter([ids(2 * step), ids(2 * step + 1)]))
    rows = [row for row in sent.rows() if row.caller.startswith("table")]
    return engine.state_dict(), engine.grad_norm, sum(row.sent_bytes for row in rows)


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_sparse_gradients_train_as_dense_ones(ranks, optimizer):
    sparse = run_ranks(ranks, lookups, True, optimizer)
    dense = run_ranks(ranks, lookups, False, optimizer)
    for (state, norm, _), (expected, expected_norm, _) in zip(sparse, dense, strict=True):
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        check([state], expected, atol=1e-6)


def test_rows_that_no_rank_used_are_not_sent():
    for _, _, sent in run_ranks(RANKS, lookups, True, "SGD", 1):
        # Of at most 7 rows of 3 fp32 numbers and an index; and how many there are.
        assert 0 < sent <= 7 * (3 * 4 + 8) + 8


def refused_when_sharded():
    with pytest.raises(ConfigError, match="sparse_gradients: got true, but gradients are sharded"):
        make(1, sparse_gradients=True)


def test_sparse_gradients_of_a_sharded_model_are_refused():
    run_ranks(1, refused_when_sharded)


# ---------------------------------------------------------------------------- compile


def compiled(stage, in_config):
    changes = {"compile": {"enabled": True, "backend": "aot_eager"}} if in_config else {}
    engine = make(stage, **changes)
    if not in_config:
        engine.compile(backend="aot_eager")
    assert engine.is_compiled
    engine.train_batch(iter([ids(0), ids(1)]))
    engine.train_batch(iter([ids(2), ids(3)]))
    state = engine.state_dict()
    engine.close()
    assert all("forward" not in vars(module) for module in engine.module.modules())
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_model_trains_alike(stage):
    check(run_ranks(RANKS, compiled, stage, stage == 0), plain((0, 1), (2, 3)))


# ---------------------------------------------------------------------------- saving


def saved(stage, folder, options):
    engine = make(stage, bf16={"enabled": True})
    engine.train_batch(iter([ids(0), ids(1)]))
    engine.save_model(folder, **options)
    with pytest.raises(CheckpointError, match="already has weights"):
        engine.save_model(folder)
    return engine.state_dict(), engine.sharding.full_parameter("blocks.0.weight")


@pytest.mark.parametrize("stage", STAGES)
def test_the_model_is_saved_whole(tmp_path, stage):
    (state, _), _ = run_ranks(RANKS, saved, stage, str(tmp_path), {})
    found = load_file(tmp_path / "model.safetensors")
    assert set(state) - set(found) == {"head.weight"}
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("stage", [0, 3])
def test_the_model_is_saved_in_parts_and_in_fp32(tmp_path, stage):
    options = {"dtype": torch.float32, "max_shard_bytes": 200, "exclude_frozen_parameters": True}
    (state, precise), _ = run_ranks(RANKS, saved, stage, str(tmp_path), options)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "shift" not in index["weight_map"]
    found = load_file(tmp_path / index["weight_map"]["blocks.0.weight"])["blocks.0.weight"]
    assert torch.equal(found, precise.cpu())
    assert not torch.equal(found, state["blocks.0.weight"].float())


def unwritable(folder):
    engine = make(3)
    with pytest.raises(CheckpointError, match="save_model: cannot write"):
        engine.save_model(f"{folder}/file/below")
    engine.train_batch(iter([ids(0), ids(1)]))


def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_ranks(RANKS, unwritable, str(tmp_path))


def tagged(folder, policy):
    engine = make(0, checkpoint={"tag_validation": policy})
    tag = f"of-rank-{dist.get_rank()}"
    if policy == "Fail":
        with pytest.raises(CheckpointError, match=r"disagree on the tag.*rank 1: 'of-rank-1'"):
            engine.save_checkpoint(folder, tag)
        return None
    return engine.save_checkpoint(folder, tag)


@pytest.mark.parametrize("policy", ["Ignore", "Warn", "Fail"])
def test_tags_that_differ_follow_the_policy(tmp_path, policy):
    paths = run_ranks(RANKS, tagged, str(tmp_path), policy)
    expected = None if policy == "Fail" else str(tmp_path / "of-rank-0")
    assert paths == [expected] * RANKS
