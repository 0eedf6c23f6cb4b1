"""Random layer-wise token dropping: who sees what, exact gradients, masks, and no trace left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_core
from ds_core import comm
from ds_core.efficiency import RandomLTDObserver, convert_to_random_ltd
from ds_core.errors import ConfigError, DsError

B, T, D = 3, 10, 8


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Attention(nn.Module):
    """A residual attention block that remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.seen = nn.Linear(D, 3 * D), nn.Linear(D, D), []

    def forward(self, x, mask=None, table=None):
        self.seen.append((x.detach(), mask, table))
        if table is not None:
            x = x + table
        q, k, v = self.qkv(x).chunk(3, -1)
        causal = mask is None
        mask = mask[:, 0] if mask is not None and mask.dim() == 4 else mask
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal))


class Net(nn.Module):
    def __init__(self, depth=4, recomputes=False):
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))
        self.recomputes = recomputes

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return x.square().mean()


class Tagger(nn.Module):
    """Adds 1 to every token it sees: shows which ones those were."""

    def forward(self, x):
        return x + 1


def one(module, kept, **options):
    model = nn.ModuleList([module])
    handle = convert_to_random_ltd(model, ["0"], **options)
    handle.num_tokens = kept
    return model[0], handle


def test_each_sample_draws_its_own_tokens_and_the_others_go_around():
    layer, _ = one(Tagger(), 4)
    x = torch.rand(B, T, D)
    touched = (layer(x) - x).round()
    assert touched.sum(dim=1).tolist() == [[4.0] * D] * B
    assert len({tuple(row.tolist()) for row in touched[:, :, 0]}) > 1
    assert torch.equal(layer(x)[:, :, 0] == x[:, :, 0], (layer(x) == x)[:, :, 0]) in (True, False)


def test_tokens_keep_their_order():
    layer, _ = one(Attention(), 6)
    layer(torch.arange(T).float().reshape(1, T, 1).expand(B, T, D))
    seen = layer.seen[0][0][:, :, 0]
    assert (seen.diff(dim=1) > 0).all()


def test_all_tokens_are_equally_likely():
    torch.manual_seed(0)
    layer, _ = one(Tagger(), 3)
    hits = sum((layer(torch.zeros(64, T, D)))[:, :, 0].sum(0) for _ in range(50)) / 3200
    assert torch.allclose(hits, torch.full((T,), 0.3), atol=0.04)


def test_gradients_are_exact():
    layer, _ = one(Attention().double(), 5)
    x = torch.rand(B, T, D, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(1)
        return layer(x)

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)


def test_it_is_what_gathering_by_hand_gives():
    layer, handle = one(Attention(), 4)
    x = torch.rand(B, T, D, requires_grad=True)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    index = torch.rand(B, T).topk(4).indices.sort().values
    handle.num_tokens = None
    parts = [layer(x[i : i + 1, index[i]]) for i in range(B)]
    expected = x.clone()
    for i in range(B):
        expected[i, index[i]] = parts[i][0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(B, T, T), (B, 1, T, T), (1, 1, T, T), (T, T)], ids=str)
def test_masks_are_cut_along_queries_and_keys(shape):
    layer, _ = one(Attention(), 4)
    mask = torch.rand(T, T).expand(shape).contiguous()
    code = torch.arange(T).float().reshape(1, T, 1).expand(B, T, D)
    layer(code, mask=mask)
    x, cut, _ = layer.seen[0]
    for sample in range(B):
        at = x[sample, :, 0].long()
        rows = cut.reshape(-1, 4, 4)
        expected = mask.reshape(-1, T, T)
        mine = rows[sample % len(rows)]
        assert torch.equal(mine, expected[sample % len(expected)][at][:, at])


def test_a_table_over_positions_makes_samples_share_the_draw():
    layer, _ = one(Attention(), 4)
    code = torch.arange(T).float().reshape(1, T, 1).expand(B, T, D)
    table = torch.arange(T).float().reshape(T, 1).expand(T, D)
    layer(code, table=table)
    x, _, cut = layer.seen[0]
    assert cut.shape == (4, D)
    assert all(torch.equal(x[sample], cut) for sample in range(B))


@pytest.mark.parametrize("samples", [1, B])
def test_positions_with_a_dimension_for_samples_follow_each_sample_s_draw(samples):
    layer, _ = one(Attention(), 4)
    code = torch.arange(T).float().reshape(1, T, 1).expand(B, T, D)
    layer(code, table=code[:samples])
    x, _, cut = layer.seen[0]
    assert torch.equal(x, cut)
    assert len({tuple(row.tolist()) for row in x[:, :, 0]}) > 1


def test_the_sequence_may_come_first():
    layer, _ = one(Tagger(), 4, batch_first=False)
    x = torch.rand(T, B, D)
    touched = (layer(x) - x).round()
    assert touched.sum(dim=0).tolist() == [[4.0] * D] * B
    assert len({tuple(row.tolist()) for row in touched[:, :, 0].T}) > 1


class Pair(nn.Module):
    def forward(self, hidden_states, scale):
        return hidden_states * scale, "weights"


def test_further_outputs_and_keywords_pass():
    layer, _ = one(Pair(), 4)
    found, told = layer(scale=2.0, hidden_states=torch.ones(B, T, D))
    assert (found == 2).sum() == B * 4 * D
    assert told == "weights"


@pytest.mark.parametrize("kept", [T, T + 5, None])
def test_enough_tokens_are_all_tokens(kept):
    layer, _ = one(Tagger(), kept)
    assert (layer(torch.zeros(B, T, D)) == 1).all()


def test_evaluation_sees_all_tokens():
    layer, _ = one(Tagger().eval(), 4)
    assert (layer(torch.zeros(B, T, D)) == 1).all()


def test_half_precision_comes_back_as_it_went_in():
    layer, _ = one(Attention(), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(B, T, D)).dtype == torch.float32


def test_names_classes_and_copies_stay():
    model = Net()
    names = sorted(model.state_dict())
    handle = convert_to_random_ltd(model, Attention)
    assert handle.layers == tuple(model.blocks[1:-1]), "the first and the last see everything"
    assert sorted(model.state_dict()) == names
    assert all(isinstance(block, Attention) for block in model.blocks)
    assert repr(model) == repr(Net())
    twin = copy.deepcopy(model)
    handle.num_tokens = 4
    model(torch.zeros(B, T, dtype=torch.long))
    assert [block.seen[0][0].shape[1] for block in model.blocks] == [T, 4, 4, T]
    assert twin(torch.zeros(B, T, dtype=torch.long)).isfinite()
    handle.remove()
    assert all(type(block) is Attention for block in model.blocks)


@pytest.mark.parametrize(
    ("layers", "message"),
    [(["blocks.9"], "Net has no 'blocks.9'"), (nn.Conv1d, "no layer of Conv1d between")],
)
def test_layers_that_are_not_there_are_an_error(layers, message):
    with pytest.raises(DsError, match=message):
        convert_to_random_ltd(Net(), layers)


def test_a_layer_without_hidden_states_is_an_error():
    layer, _ = one(Tagger(), 4)
    with pytest.raises(DsError, match="Tagger is called with Tensor first, expected hidden"):
        layer(torch.zeros(B, T))


def config(**changes):
    rule = {
        "enabled": True, "total_layer_num": 4, "random_ltd_layer_num": 2,
        "random_ltd_layer_id": [1, 2],
        "random_ltd_schedule": {
            "min_value": 4, "max_value": T,
            "schedule_config": {"require_steps": 4, "seq_per_step": 2},
        },
    }  # fmt: skip
    routing = {"enabled": True, "random_ltd": {**rule, **changes}}
    return {
        "train_micro_batch_size_per_gpu": B,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "data_efficiency": {"enabled": True, "data_routing": routing},
    }


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 20, (B, T), generator=generator) for _ in range(count)]


def train(steps, recomputes=False, **changes):
    torch.manual_seed(0)
    engine = ds_core.initialize(Net(recomputes=recomputes), config(**changes))
    return engine, [float(engine.train_batch(iter([batch]))) for batch in batches(steps)]


def test_a_config_makes_middle_layers_see_more_and_more():
    engine, _ = train(5)
    seen = [[x.shape[1] for x, _, _ in block.seen] for block in engine.module.blocks]
    assert seen == [[T] * 5, [4, 6, 8, T, T], [4, 6, 8, T, T], [T] * 5]
    engine.close()
    assert type(engine.module.blocks[1]) is Attention


def test_activation_checkpointing_draws_the_same_again():
    (_, plain), (_, recomputed) = train(4), train(4, recomputes=True)
    assert plain == recomputed


def test_a_checkpoint_goes_on_with_the_same_draws(tmp_path):
    first, _ = train(2)
    first.save_checkpoint(tmp_path)
    expected = [float(first.train_batch(iter([batch]))) for batch in batches(3)]
    torch.manual_seed(9)
    second = ds_core.initialize(Net(), config())
    second.load_checkpoint(tmp_path)
    assert [float(second.train_batch(iter([batch]))) for batch in batches(3)] == expected


def test_a_model_of_other_depth_is_an_error():
    with pytest.raises(
        ConfigError, match=r"total_layer_num: Net: expected one repeated stack of 6"
    ):
        train(1, total_layer_num=6)


def test_layers_may_be_chosen_in_python():
    torch.manual_seed(0)
    plain = {key: value for key, value in config().items() if key != "data_efficiency"}
    observer = RandomLTDObserver(
        lambda step: 3, lambda model: convert_to_random_ltd(model, Attention)
    )
    engine = ds_core.initialize(Net(), plain, observers=(observer,))
    engine.train_batch(iter(batches(1)))
    assert engine.module.blocks[1].seen[0][0].shape[1] == 3
