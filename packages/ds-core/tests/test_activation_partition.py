"""Inputs of checkpointed blocks split over ranks: the same bits, 1/N of the bytes, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.activation_checkpointing import (
    HostOffload,
    Policy,
    checkpoint,
    checkpoint_blocks,
    host_offload,
    model_parallel_seed,
)
from ds_core.activation_checkpointing.layout import Layout
from ds_core.activation_checkpointing.partition import Partition
from ds_core.testing import Raised, RankFailure, run_ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.3)

    def forward(self, x, mask=None):
        x = x + self.dropout(self.down(torch.tanh(self.up(x))))
        return x if mask is None else x.masked_fill(mask["hidden"], 0.0)


class Net(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x.float().square().mean()


def inputs():
    torch.manual_seed(1)
    return torch.randn(65, 16), {"hidden": torch.rand(65, 16) < 0.1}


def step(model, autocast=False):
    x, mask = inputs()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x, mask)
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()], torch.get_rng_state()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tp_group():
    return comm.Mesh(tp=torch.distributed.get_world_size()).group("tp")


class TwoMemories:
    """Device and host are apart inside, though both are the memory of a CPU."""

    def __enter__(self):
        self.before = host_offload.needs_copies
        host_offload.needs_copies = lambda device: True

    def __exit__(self, *error):
        host_offload.needs_copies = self.before


def train_partitioned(offloads, reuses_buffers, autocast):
    group, plain = tp_group(), step(Net(), autocast)
    offload = HostOffload(keep_last=0, min_bytes=0) if offloads else False
    policy = Policy(offload_to_cpu=offload, partition_group=group, reuses_buffers=reuses_buffers)
    model = Net()
    checkpoint_blocks(model, policy=policy)
    with TwoMemories():
        for _ in range(2):
            assert same(plain, step(model, autocast))
    gathers = [row for row in group.ledger.rows() if row.caller == "activations"]
    assert sum(row.num_calls for row in gathers) == 2 * 4 * 2, "two inputs per block and step"
    # 65 * 16 elements over N ranks, of 4 bytes (the mask: of 1): what others hold is gathered.
    size = -(-65 * 16 // group.size)
    sent = (group.size - 1) * size * (4 + 1) * 4 * 2
    assert sum(row.sent_bytes for row in gathers) == sent
    if offloads:
        assert offload.counts.num_sent == 2 * (4 + 1), "the mask of all blocks is stored once"
        assert offload.counts.sent_bytes == 2 * (4 * 4 + 1) * size
        assert (offload.buffers.num_allocated, offload.buffers.used_bytes) == (5, 0)
    if reuses_buffers:
        (pool,) = policy.storage._keeper._buffers.values()
        assert (pool.num_allocated, pool.used_bytes) == (5, 0)


def train_in_all_ways():
    train_partitioned(offloads=False, reuses_buffers=False, autocast=False)
    train_partitioned(offloads=False, reuses_buffers=True, autocast=True)
    train_partitioned(offloads=True, reuses_buffers=False, autocast=False)


@pytest.mark.parametrize("world_size", [2, 3])
def test_partitioned_blocks_train_alike(world_size):
    run_ranks(world_size, train_in_all_ways)


TENSORS = {
    "contiguous": lambda x: x,
    "odd": lambda x: x[:7, :3],
    "fewer-than-ranks": lambda x: x[0, 0],
    "transposed": lambda x: x.mT,
    "expanded": lambda x: x[:1].expand(40, 10, 24),
    "bool": lambda x: x > 0,
    "int64": lambda x: (x * 100).long(),
    "complex": lambda x: torch.complex(x, x),
    "bfloat16": lambda x: x.bfloat16(),
    "needs-gradient": lambda x: x.clone().requires_grad_(),
}


def hold_parts():
    group = tp_group()
    for name, make in TENSORS.items():
        for reuses in (False, True):
            torch.manual_seed(0)
            tensor = make(torch.randn(10, 24))
            partition = Partition(group, reuses_buffers=reuses, min_bytes=0)
            packed = partition.pack(tensor)
            held, layout = packed.shard.stored, Layout.of(tensor)
            size = -(-layout.numel // group.size) * tensor.element_size()
            assert held.nbytes == held.untyped_storage().nbytes() == size, name
            for _ in range(2):
                back = partition.unpack(packed)
                assert torch.equal(back, tensor), name
                assert (back.shape, back.stride()) == (tensor.shape, tensor.stride()), name
    small = torch.ones(3)
    assert Partition(group).unpack(Partition(group).pack(small)) is small


def test_each_rank_holds_an_equal_part_of_any_tensor():
    run_ranks(3, hold_parts)


def hold_different():
    torch.manual_seed(torch.distributed.get_rank())
    x = torch.randn(64, 64, requires_grad=True)
    Policy(partition_group=tp_group())(torch.sin, x).sum().backward()


def test_tensors_that_differ_are_an_error_on_all_ranks():
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, hold_different)
    for outcome in failure.value.outcomes:
        assert isinstance(outcome, Raised)
        assert "hold different inputs of a checkpointed block" in outcome.message


def test_a_group_of_one_changes_nothing():
    group = comm.Mesh.world().group("tp")
    plain, model = step(Net()), Net()
    checkpoint_blocks(model, policy=Policy(partition_group=group))

    assert same(plain, step(model))
    assert not group.ledger.rows()


# ------------------------------------------------------------------------------- random numbers


class Parallel(nn.Module):
    """An MLP whose hidden elements are split over the group, as Megatron-LM does it."""

    def __init__(self, group, states):
        super().__init__()
        torch.manual_seed(0)
        up, down = torch.randn(64, 16) / 4, torch.randn(16, 64) / 8
        self.group, self.states = group, states
        self.up = nn.Parameter(up.chunk(group.size)[group.rank].clone())
        self.down = nn.Parameter(down.chunk(group.size, dim=1)[group.rank].clone())

    def forward(self, x):
        hidden = torch.tanh(Shared.apply(x, self.group) @ self.up.mT)
        with self.states.fork():
            hidden = nn.functional.dropout(hidden, 0.5)
            self.drawn_apart = hidden.detach() == 0
        out = Summed.apply(hidden @ self.down.mT, self.group)
        self.drawn_alike = nn.functional.dropout(torch.ones_like(out), 0.5)
        return x + out * self.drawn_alike


class Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        comm.all_reduce(gradient, ctx.group, caller="shared")
        return gradient, None


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        comm.all_reduce(x, group, caller="summed")
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def tensor_parallel_step(group, policy):
    states = model_parallel_seed(7, group)
    blocks = [Parallel(group, states) for _ in range(3)]
    torch.manual_seed(5)
    x = torch.randn(32, 16, requires_grad=True)
    out = x
    masks = []
    for block in blocks:
        out = block(out) if policy is None else policy(block, out)
        masks.append((block.drawn_apart, block.drawn_alike))
    out.square().mean().backward()
    for block, (apart, alike) in zip(blocks, masks, strict=True):
        assert torch.equal(block.drawn_apart, apart), "the same mask when computed again"
        assert torch.equal(block.drawn_alike, alike)
    grads = [p.grad for block in blocks for p in block.parameters()]
    return [out.detach(), x.grad, *grads, states.state_dict()["tensor-parallel"]], masks


def draw_as_ranks_should():
    group = tp_group()
    plain, masks = tensor_parallel_step(group, None)
    policies = {
        "default": Policy(),
        "partitioned": Policy(partition_group=group),
        "offloaded": Policy(
            partition_group=group, offload_to_cpu=HostOffload(keep_last=0, min_bytes=0)
        ),
    }
    with TwoMemories():
        for name, policy in policies.items():
            found, _ = tensor_parallel_step(group, policy)
            assert same(plain, found), name
    return masks


def test_tensor_parallel_blocks_drop_alike_outside_and_apart_inside():
    first, second = run_ranks(2, draw_as_ranks_should)

    for (apart, alike), (others_apart, others_alike) in zip(first, second, strict=True):
        assert torch.equal(alike, others_alike)
        assert not torch.equal(apart, others_apart)


def seed_apart():
    model_parallel_seed(torch.distributed.get_rank(), tp_group())


def test_seeds_that_differ_are_an_error_on_all_ranks():
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, seed_apart)
    for outcome in failure.value.outcomes:
        assert "differ (rank 0: 0, rank 1: 1)" in outcome.message


def test_early_stop_leaves_named_states_where_they_were():
    states = model_parallel_seed(3, comm.Mesh.world().group("tp"), "cpu")
    x = torch.ones(100, requires_grad=True)

    def piece(x):
        with states.fork():
            kept = torch.rand_like(x) * x  # recomputation stops here, inside the fork
            return kept + 1

    checkpoint(piece, x).sum().backward()
    after = states.state_dict()["tensor-parallel"]
    twin = model_parallel_seed(3, comm.Mesh.world().group("tp"), "cpu")
    with twin.fork():
        drawn = torch.rand(100)

    assert torch.equal(x.grad, drawn)
    assert torch.equal(after, twin.state_dict()["tensor-parallel"])


# -------------------------------------------------------------------------------- by the config


def train(section, mesh):
    model = Net()
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 65,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "activation_checkpointing": section,
        },
        mesh=mesh,
    )
    losses = []
    for number in range(3):
        torch.manual_seed(number)
        engine.backward(loss := engine(torch.randn(65, 16)))
        engine.step()
        losses.append(loss.item())
    engine.close()
    return losses


def train_by_section():
    mesh = comm.Mesh(tp=2)
    plain = train({}, mesh)
    for more in ({}, {"contiguous_memory_optimization": True}, {"cpu_checkpointing": True}):
        section = {"blocks": "repeated", "partition_activations": True, **more}
        with TwoMemories():
            assert train(section, mesh) == plain
    rows = mesh.ledger.rows()
    assert sum(row.num_calls for row in rows if row.caller == "activations") == 3 * 3 * 4


def test_the_section_partitions_over_tp():
    run_ranks(2, train_by_section)


def test_the_section_says_that_one_rank_has_nobody_to_share_with(caplog):
    section = {"blocks": "repeated", "partition_activations": True}

    assert train(section, None) == train({}, None)
    assert "partition_activations makes no difference: one rank" in caplog.text
