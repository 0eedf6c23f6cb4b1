"""Modules: what they compute, their layouts, BERT and models of transformers, padding."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ds_ops
from ds_core.errors import ConfigError, OpError
from ds_core.testing import run_ranks
from ds_ops.sparse_attention.bert import TransformersSelfAttention

UTILS = ds_ops.SparseAttentionUtils


def fixed(**more):
    return ds_ops.FixedSparsityConfig(2, 16, num_local_blocks=2, **more)


def qkv(tokens=64, batch=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 2, tokens, 8, generator=generator) for _ in range(3)]


def seen(layout):
    return layout.bool().repeat_interleave(16, 1).repeat_interleave(16, 2)


def test_it_attends_by_the_layout():
    attention = ds_ops.SparseSelfAttention(fixed(), max_seq_length=128)
    q, k, v = qkv()
    mask = seen(attention.master_layout)[:, :64, :64]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v), expected)
    torch.testing.assert_close(attention(q, k.transpose(2, 3), v), expected)
    causal = ds_ops.SparseSelfAttention(fixed(attention="unidirectional"), causal=True)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen(causal.master_layout)[:, :64, :64].tril()
    )
    torch.testing.assert_close(causal(q, k, v), expected)


def test_unidirectional_is_of_blocks_unless_a_mask_says_more():
    attention = ds_ops.SparseSelfAttention(fixed(attention="unidirectional"))
    q, k, v = qkv()
    mask = seen(attention.master_layout)[:, :64, :64]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v), expected)
    lower = torch.ones(64, 64).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.tril())
    for given in (lower, lower.bool(), lower.long()[None, None]):
        torch.testing.assert_close(attention(q, k, v, attn_mask=given), expected)


def test_masks_may_have_dimensions_of_one():
    attention = ds_ops.SparseSelfAttention(ds_ops.DenseSparsityConfig(2))
    q, k, v = qkv(32)
    hidden = torch.zeros(2, 32)
    hidden[1, 20:] = -10000.0
    rpe = torch.randn(2, 32, 32)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=rpe + hidden[:, None, None])
    for shape in ((2, 32), (2, 1, 1, 32)):
        found = attention(q, k, v, rpe=rpe, key_padding_mask=hidden.view(shape))
        torch.testing.assert_close(found, expected)
    low = [t.bfloat16() for t in (q, k, v)]
    found = attention(*low, rpe=rpe.double(), key_padding_mask=hidden.half())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_what_does_not_fit_is_refused():
    attention = ds_ops.SparseSelfAttention(fixed(), max_seq_length=64)
    q, k, v = qkv()
    for tokens in (40, 80):
        with pytest.raises(ConfigError, match=rf"sequences of {tokens} tokens: .* of 16, .*, 64;"):
            attention(*qkv(tokens))
    with pytest.raises(OpError, match=r"key_padding_mask: got torch\.bool"):
        attention(q, k, v, key_padding_mask=torch.ones(2, 64) > 0)
    with pytest.raises(OpError, match="attn_mask: got shape"):
        attention(q, k, v, attn_mask=torch.ones(2, 64, 64))
    with pytest.raises(OpError, match="k: got shape"):
        attention(q, k[:, :, :32], v)
    with pytest.raises(OpError, match="query: got 2 heads, expected the layout's 3"):
        ds_ops.SparseSelfAttention(ds_ops.DenseSparsityConfig(3))(q, k, v)
    with pytest.raises(OpError, match=r"query: got shape \[2, 64, 8\]"):
        attention(q[0], k, v)
    with pytest.raises(OpError, match=r"attn_mask_mode: got and"):
        ds_ops.SparseSelfAttention(fixed(), attn_mask_mode="and")
    with pytest.raises(ConfigError, match="do not consist of blocks of 16"):
        ds_ops.SparseSelfAttention(fixed(), max_seq_length=100)


def test_a_layout_is_part_of_the_state():
    config = ds_ops.BigBirdSparsityConfig(2, num_random_blocks=2)
    first, second = (ds_ops.SparseSelfAttention(config, max_seq_length=512) for _ in range(2))
    inputs = qkv(512)
    assert not torch.equal(first(*inputs), second(*inputs))
    nn.Sequential(second).load_state_dict(nn.Sequential(first).state_dict())
    assert torch.equal(first(*inputs), second(*inputs))
    assert torch.equal(copy.deepcopy(first)(*inputs), first(*inputs))
    assert first.state_dict()["master_layout"].dtype is torch.int64
    assert "BigBirdSparsityConfig(num_heads=2" in repr(first)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_it_is_part_of_a_compiled_step():
    attention = ds_ops.SparseSelfAttention(fixed())
    q, k, v = qkv()
    expected = attention(q, k, v)  # makes the layout for this length
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected)


def test_random_layouts_are_those_of_rank_0():
    first, second = run_ranks(2, random_layout)
    assert first == second


def random_layout():
    random.seed(torch.distributed.get_rank())
    attention = ds_ops.SparseSelfAttention(ds_ops.BigBirdSparsityConfig(2), max_seq_length=512)
    attention(*qkv(512))
    return attention.master_layout.tolist()


# --- BERT -----------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(hidden_size=16, num_attention_heads=2, max_position_embeddings=32)


def dense_bert(layer, hidden, mask):
    q, k, v = (
        project(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
        for project in (layer.query, layer.key, layer.value)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def test_bert():
    layer = ds_ops.BertSparseSelfAttention(CONFIG, ds_ops.DenseSparsityConfig(2))
    hidden = torch.randn(2, 32, 16)
    mask = torch.zeros(2, 1, 1, 32)
    mask[0, ..., 16:] = -10000.0
    torch.testing.assert_close(layer(hidden, mask), dense_bert(layer, hidden, mask))
    layer(hidden, mask).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    own = ds_ops.BertSparseSelfAttention(CONFIG).sparse_self_attention.sparsity_config
    assert (type(own), own.num_heads) == (ds_ops.FixedSparsityConfig, 2)


def test_a_bert_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"hidden_size: got 15, .* the 2 attention heads"):
        ds_ops.BertSparseSelfAttention(SimpleNamespace(hidden_size=15, num_attention_heads=2))
    with pytest.raises(ConfigError, match="a layout for 4 heads, the model has 2"):
        ds_ops.BertSparseSelfAttention(CONFIG, ds_ops.DenseSparsityConfig(4))


class Model(nn.Module):
    """What of a BERT or RoBERTa of transformers is looked at."""

    def __init__(self, kind, rows):
        super().__init__()
        self.config = copy.copy(CONFIG)
        inner = nn.Module()
        inner.embeddings = nn.Module()
        inner.embeddings.position_embeddings = nn.Embedding(rows, 16)
        inner.embeddings.register_buffer("position_ids", torch.arange(rows)[None])
        inner.embeddings.register_buffer("token_type_ids", torch.zeros(1, rows, dtype=torch.long))
        inner.encoder = nn.Module()
        inner.encoder.layer = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in inner.encoder.layer:
            layer.attention = nn.Module()
            layer.attention.self = ds_ops.BertSparseSelfAttention(CONFIG)
        setattr(self, kind, inner)


@pytest.mark.parametrize(("kind", "reserved"), [("bert", 0), ("roberta", 2)])
def test_positions_are_extended(kind, reserved):
    model = Model(kind, 32 + reserved)
    embeddings = getattr(model, kind).embeddings
    before = embeddings.position_embeddings.weight.detach().clone()
    assert UTILS.extend_position_embedding(model, 80) is model
    table = embeddings.position_embeddings
    assert table.num_embeddings == len(table.weight) == 80 + reserved
    assert model.config.max_position_embeddings == 80 + reserved
    assert torch.equal(table.weight[: 32 + reserved], before)
    for start in (32, 64):
        end = min(start + 32, 80)
        again = table.weight[reserved + start : reserved + end]
        assert torch.equal(again, before[reserved:][: end - start])
    assert embeddings.position_ids.tolist() == [list(range(80 + reserved))]
    assert embeddings.token_type_ids.shape == (1, 80 + reserved)
    with pytest.raises(ConfigError, match=r"max_position: got 80, expected more than .* 80"):
        UTILS.extend_position_embedding(model, 80)


@pytest.mark.parametrize(("kind", "reserved"), [("bert", 0), ("roberta", 2)])
def test_attention_is_replaced_and_weights_stay(kind, reserved):
    model = Model(kind, 32)
    before = dict(model.named_parameters())
    config = ds_ops.DenseSparsityConfig(2)
    UTILS.replace_model_self_attention_with_sparse_self_attention(model, 64, config)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert len(after) == len(before)
    assert model.config.max_position_embeddings == 64 + reserved
    attention = getattr(model, kind).encoder.layer[1].attention.self
    assert isinstance(attention, TransformersSelfAttention)
    hidden, mask = torch.randn(2, 32, 16), torch.ones(2, 32, dtype=torch.long)
    mask[1, 20:] = 0
    expected = dense_bert(attention, hidden, mask[:, None, None].bool())
    square = mask[:, None, None].bool().expand(2, 1, 32, 32)
    floats = torch.zeros(2, 1, 32, 32).masked_fill(~square, -torch.inf)
    for given in (mask, square, floats):
        found, weights = attention(hidden, attention_mask=given, past_key_values=None)
        torch.testing.assert_close(found, expected)
        assert weights is None
    with pytest.raises(ConfigError, match="encoder_hidden_states: got one, expected None"):
        attention(hidden, encoder_hidden_states=hidden)


def test_models_that_are_not_known_are_refused():
    with pytest.raises(ConfigError, match="Linear: expected a model with one of bert, roberta"):
        UTILS.extend_position_embedding(nn.Linear(1, 1), 64)
    model = Model("bert", 32)
    model.config.is_decoder = True
    with pytest.raises(ConfigError, match="the model is a decoder"):
        UTILS.replace_model_self_attention_with_sparse_self_attention(model, 64)


def test_a_bert_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    ids = torch.randint(0, 50, (2, 32))
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 20:] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    dense = ds_ops.DenseSparsityConfig(2)
    UTILS.replace_model_self_attention_with_sparse_self_attention(model, 64, dense)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before)
    UTILS.extend_position_embedding(model, 128)
    longer = torch.randint(0, 50, (1, 128))
    UTILS.replace_model_self_attention_with_sparse_self_attention(model, 128, dense)
    assert model(input_ids=longer).logits.shape == (1, 128, 50)


def test_tokenizers_cut_later():
    tokenizer = SimpleNamespace(model_max_length=512, init_kwargs={"model_max_length": 512})
    assert UTILS.update_tokenizer_model_max_length(tokenizer, 1024) is tokenizer
    assert (tokenizer.model_max_length, tokenizer.init_kwargs["model_max_length"]) == (1024, 1024)


# --- Padding --------------------------------------------------------------------------------------


def test_inputs_are_padded_to_blocks():
    ids = torch.ones(2, 20, dtype=torch.long)
    padded, *found = UTILS.pad_to_block_size(16, ids, ids, ids, ids, None, 7, None)
    assert padded == 12
    for t, value in zip(found[:4], (7, 0, 0, 7), strict=True):
        assert torch.equal(t, F.pad(ids, (0, 12), value=value))
    assert found[4] is None
    out = torch.randn(2, 32, 4)
    assert torch.equal(UTILS.unpad_sequence_output(12, out), out[:, :20])
    assert UTILS.unpad_sequence_output(0, out) is out


def test_inputs_that_fit_stay():
    ids = torch.ones(2, 32, dtype=torch.long)
    found = UTILS.pad_to_block_size(16, ids, None, None, None, None, 0, None)
    assert found == (0, ids, None, None, None, None)


def test_padding_is_not_seen_without_a_mask():
    ids = torch.ones(1, 15, dtype=torch.long)
    found = UTILS.pad_to_block_size(16, ids, None, None, None, None, 0, None)
    assert found[2].tolist() == [[1] * 15 + [0]]
    assert found[3] is None


def test_embeddings_are_padded():
    table = nn.Embedding(9, 4)
    embeds = torch.randn(2, 10, 4)
    found = UTILS.pad_to_block_size(8, None, None, None, None, embeds, 3, table)
    assert torch.equal(found[5][:, :10], embeds)
    assert torch.equal(found[5][:, 10:], table.weight[3].expand(2, 6, 4))
    with pytest.raises(ConfigError, match="model_embeddings: got None"):
        UTILS.pad_to_block_size(8, None, None, None, None, embeds, 3, None)
    with pytest.raises(ConfigError, match="input_ids: got None"):
        UTILS.pad_to_block_size(8, None, None, None, None, None, 3, None)


def test_what_is_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="sparsity_config: got NoneType, expected a Sparsity"):
        ds_ops.SparseSelfAttention(None)
    q, _, v = qkv()
    with pytest.raises(OpError, match="SparseSelfAttention: key: got None, expected a tensor"):
        ds_ops.SparseSelfAttention(fixed(), max_seq_length=64)(q, None, v)
