"""Activation checkpointing: results of a plain run, less memory, and errors that help."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import ds_core
from ds_core import config as configuration
from ds_core.activation_checkpointing import Policy, RngStates, checkpoint, checkpoint_blocks
from ds_core.errors import ConfigError, DsError


class Block(nn.Module):
    def __init__(self, norm="layer"):
        super().__init__()
        self.norm = nn.BatchNorm1d(16) if norm == "batch" else nn.LayerNorm(16)
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.3)

    def forward(self, x, scale=1.0):
        return x + scale * self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, blocks=4, norm="layer"):
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.float().square().mean()


def net(**changes):
    torch.manual_seed(0)
    return Net(**changes)


def step(model, autocast=False):
    """Loss, gradients, the random state afterwards, and the bytes that autograd keeps."""
    torch.manual_seed(1)
    kept = 0

    def pack(tensor):
        nonlocal kept
        if not isinstance(tensor, nn.Parameter):
            kept += tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(32, 16)
    model.zero_grad()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        loss = model(x)
    loss.backward()
    return [loss.detach(), torch.get_rng_state(), *[p.grad for p in model.parameters()]], kept


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    "policy", [Policy(), Policy(synchronize=True)], ids=["default", "synchronized"]
)
def test_blocks_train_alike_and_keep_their_inputs_only(policy, autocast):
    plain, all_kept = step(net(), autocast)
    model = net()
    blocks = checkpoint_blocks(model, policy=policy)

    again, kept = step(model, autocast)

    assert same(plain, again)
    assert blocks.names == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert kept < all_kept / 4


def test_saved_bytes_are_one_input_per_block():
    model = net()
    checkpoint_blocks(model)

    _, kept = step(model)

    # The first block's input needs no gradient, and is kept all the same; then square's input.
    assert kept == (4 + 1) * 32 * 16 * 4


def test_number_spreads_the_blocks_evenly():
    assert checkpoint_blocks(net(), number=2).names == ("blocks.0", "blocks.2")
    assert checkpoint_blocks(net(), number=3).names == ("blocks.0", "blocks.1", "blocks.2")
    assert len(checkpoint_blocks(net(), number=100).names) == 4
    assert checkpoint_blocks(net(), ["blocks.[13]"]).names == ("blocks.1", "blocks.3")


def test_offloaded_inputs_train_alike():
    plain, _ = step(net())
    model = net()
    checkpoint_blocks(model, policy=Policy(offload_to_cpu=True))

    again, kept = step(model)

    assert same(plain, again)
    assert kept == 32 * 16 * 4  # what is left on the device: square's input


def test_names_state_and_copies_are_those_of_the_model():
    model = net()
    names = list(model.state_dict())
    blocks = checkpoint_blocks(model)

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()

    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == names
    assert step(twin)[0][0] != step(model)[0][0]  # the copy computes with its own weights
    blocks.remove()
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_hooks_on_a_block_run_once():
    model, calls = net(), []
    checkpoint_blocks(model)
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))

    step(model)

    assert calls == [1]


def test_running_statistics_move_once():
    plain, checked = net(norm="batch"), net(norm="batch")
    checkpoint_blocks(checked)

    assert same(step(plain)[0], step(checked)[0])
    for (name, ours), theirs in zip(checked.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_evaluation_and_no_grad_are_plain_calls():
    model = net()
    checkpoint_blocks(model)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(4, 16)))

    model.eval()
    x = torch.randn(4, 16, requires_grad=True)
    model(x).backward()

    assert x.grad is not None


def test_checkpoint_takes_every_keyword_and_nests():
    x = torch.randn(3, 3, requires_grad=True)

    def inner(x, *, use_reentrant):
        return (x @ x).tanh() * use_reentrant

    def outer(x, *, debug):
        return checkpoint(inner, x.sin(), use_reentrant=debug).exp()

    found = torch.autograd.grad(checkpoint(outer, x, debug=torch.tensor(2.0)).sum(), x)
    plain = torch.autograd.grad(outer(x, debug=torch.tensor(2.0)).sum(), x)

    assert torch.equal(found[0], plain[0])


def test_checkpoint_can_be_differentiated_twice():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradgradcheck(lambda x: checkpoint(lambda y: y.sin() * y, x), x)


# Dynamo hides this warning of its own, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_can_be_checkpointed():
    plain, _ = step(net(blocks=2))
    model = net(blocks=2)
    checkpoint_blocks(model)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")

    again, _ = step(model)

    assert torch.allclose(plain[0], again[0])
    for ours, theirs in zip(again[2:], plain[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        pytest.param(["blok.*"], "matches no module of Net; its modules are blocks,", id="none"),
        pytest.param(["blocks.0*"], "is inside 'blocks.0', and both", id="nested"),
        pytest.param(["blocks"], "is a ModuleList, which has no forward", id="list"),
    ],
)
def test_blocks_that_cannot_be_chosen_say_why(blocks, message):
    with pytest.raises(DsError, match=message):
        checkpoint_blocks(net(), blocks)


def test_models_without_blocks_and_second_calls_say_why():
    model = net()
    checkpoint_blocks(model)

    with pytest.raises(DsError, match="has a forward of its own already"):
        checkpoint_blocks(model)
    with pytest.raises(DsError, match="Linear has no repeated blocks"):
        checkpoint_blocks(nn.Linear(2, 2))
    with pytest.raises(DsError, match="number: got 0"):
        checkpoint_blocks(net(), number=0)


def test_named_random_states_draw_apart_and_go_on():
    torch.manual_seed(3)
    states = RngStates("cpu")
    states.add("a", 1)
    states.add("b", 2)
    before = torch.get_rng_state()

    with states.fork("a"):
        first = torch.rand(2)
    with states.fork("b"):
        other = torch.rand(2)
    saved = states.state_dict()
    with states.fork("a"):
        second = torch.rand(2)
    states.load_state_dict(saved)
    with states.fork("a"):
        second_again = torch.rand(2)

    torch.manual_seed(1)
    assert torch.equal(torch.cat([first, second]), torch.rand(4))
    assert not torch.equal(first, other)
    assert torch.equal(second, second_again)
    assert states.names == ("a", "b")
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


def test_tensor_parallel_ranks_share_one_state_and_not_the_other():
    drawn = []
    for rank in range(2):
        states = RngStates.for_tensor_parallel(5, rank, "cpu")
        with states.fork():
            apart = torch.rand(3)
        drawn.append((torch.rand(3), apart))

    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])


def test_recomputation_draws_from_named_states_as_before():
    def run(again):
        torch.manual_seed(0)
        states = RngStates("cpu")
        states.add("apart", 9)

        def piece(x):
            with states.fork("apart"):
                return nn.functional.dropout(x.sin(), 0.5).exp()

        x = torch.ones(50, requires_grad=True)
        # A later piece draws on, before the first one is recomputed.
        call = checkpoint if again else (lambda fn, x: fn(x))
        call(piece, call(piece, x)).sum().backward()
        return x.grad, states.state_dict()["apart"]

    for plain, again in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, again)


def test_random_states_that_clash_or_lack_say_why():
    states = RngStates("cpu")
    states.add("a", 1)

    with pytest.raises(DsError, match="there is a state 'a' already"):
        states.add("a", 2)
    with pytest.raises(DsError, match="state 'a' has seed 1 too"):
        states.add("b", 1)
    with pytest.raises(DsError, match="no state is called 'c'; there is a"), states.fork("c"):
        pass
    with pytest.raises(DsError, match="got states"):
        states.load_state_dict({})


def train(**config):
    torch.manual_seed(0)
    model = net()
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            **config,
        },
    )
    losses = []
    changed = sum("forward" in block.__dict__ for block in model.blocks)
    for number in range(4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        engine.backward(loss := engine(x))
        engine.step()
        losses.append(loss.item())
    engine.close()
    assert all("forward" not in block.__dict__ for block in model.blocks)
    return losses, changed


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        pytest.param({}, 0, id="defaults"),
        pytest.param({"blocks": "repeated"}, 4, id="repeated"),
        pytest.param({"number_checkpoints": 2}, 2, id="number"),
        pytest.param({"blocks": ["blocks.3"], "cpu_checkpointing": True}, 1, id="offloaded"),
    ],
)
def test_the_section_changes_blocks_and_not_the_results(section, changed, caplog):
    plain, _ = train()
    with caplog.at_level(logging.INFO):
        losses, count = train(activation_checkpointing=section)

    assert losses == plain
    assert count == changed
    assert ("computed again in backward" in caplog.text) == bool(changed)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        pytest.param({"partition_activations": True}, "no blocks are chosen", id="partition"),
        pytest.param(
            {"contiguous_memory_optimization": True}, "expandable_segments", id="contiguous"
        ),
        pytest.param({"blocks": "own"}, "nothing is to be done", id="own"),
        pytest.param(
            {"blocks": "own", "cpu_checkpointing": True, "number_checkpoints": 2},
            "number_checkpoints: cannot be given",
            id="own-number",
        ),
        pytest.param({"profile": True}, "flops_profiler", id="profile"),
        pytest.param({"cpu_checkpointing": True}, "no blocks are chosen", id="no-blocks"),
        pytest.param({"number_checkpoints": 0}, "number_checkpoints", id="zero"),
    ],
)
def test_what_the_section_cannot_honour_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        configuration.load(
            {"train_batch_size": 1, "activation_checkpointing": section}, world_size=1
        )


def test_blocks_that_are_not_there_are_a_config_error():
    with pytest.raises(ConfigError, match=r"activation_checkpointing.blocks: .*'layer.\*'"):
        train(activation_checkpointing={"blocks": ["layer.*"]})
