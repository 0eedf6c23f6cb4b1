"""Kernels by the original's names: evoformer attention, BERT's layer, channels-last biases."""

from __future__ import annotations

import pytest
import torch

import deepspeed
import ds_ops
from deepspeed._errors import NotProvidedError
from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
from deepspeed.ops.transformer.inference.bias_add import nhwc_bias_add
from ds_core.errors import OpError


def test_evoformer_attention_takes_a_list_of_biases():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 5, 2, 8) for _ in range(3))
    bias1 = torch.randn(1, 3, 1, 1, 5, requires_grad=True)
    bias2 = torch.randn(1, 1, 2, 5, 5, requires_grad=True)
    found = DS4Sci_EvoformerAttention(q, k, v, [bias1, bias2])
    assert torch.equal(found, ds_ops.evoformer_attention(q, k, v, bias1, bias2))
    found.sum().backward()
    assert bias1.grad.shape == bias1.shape
    assert bias2.grad.shape == bias2.shape
    given = [bias1]
    only = ds_ops.evoformer_attention(q, k, v, bias1)
    assert torch.equal(DS4Sci_EvoformerAttention(q, k, v, given), only)
    assert given == [bias1]
    none = ds_ops.evoformer_attention(q, k, v)
    assert torch.equal(DS4Sci_EvoformerAttention(q, k, v, [None, None]), none)


def test_evoformer_attention_without_biases_takes_any_number_of_dimensions():
    q, k, v = (torch.randn(3, 5, 2, 8) for _ in range(3))
    found = DS4Sci_EvoformerAttention(q, k, v, [])
    assert torch.equal(found, ds_ops.evoformer_attention(q[None], k[None], v[None])[0])


def test_evoformer_attention_refuses_what_does_not_fit():
    q = torch.randn(1, 3, 5, 2, 8)
    with pytest.raises(OpError, match="biases: got 3, expected at most two"):
        DS4Sci_EvoformerAttention(q, q, q, [None, None, None])
    with pytest.raises(OpError, match=r"bias1: got shape \[1, 3, 5\], expected \[1, 3, 1, 1, 5\]"):
        DS4Sci_EvoformerAttention(q, q, q, [torch.zeros(1, 3, 5)])
    with pytest.raises(NotProvidedError, match="use DS4Sci_EvoformerAttention"):
        deepspeed.ops.deepspeed4science.EvoformerFusedAttention.apply(q, q, q)


def test_a_transformer_layer_is_made_and_trained_as_in_the_original():
    config = deepspeed.DeepSpeedTransformerConfig(
        batch_size=2, hidden_size=32, heads=4, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1,
        num_hidden_layers=3, initializer_range=0.02, local_rank=0, seed=7, gelu_checkpoint=True,
        pre_layer_norm=False, return_tuple=True,
    )  # fmt: skip
    layer = deepspeed.DeepSpeedTransformerLayer(config)
    assert isinstance(layer, ds_ops.TransformerLayer)
    x = torch.randn(2, 6, 32, requires_grad=True)
    (y,) = layer(x, torch.zeros(2, 1, 1, 6))
    y.sum().backward()
    assert x.grad.shape == x.shape
    other = deepspeed.ops.transformer.DeepSpeedTransformerLayer(config)
    other.load_state_dict(layer.state_dict())


def test_biases_are_added_in_channels_last_memory():
    x, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    bias, second = torch.randn(3), torch.randn(3)
    found = nhwc_bias_add(x, bias, other=other, other_bias=second)
    torch.testing.assert_close(found, x + other + (bias + second)[:, None, None])
    assert found.is_contiguous(memory_format=torch.channels_last)
