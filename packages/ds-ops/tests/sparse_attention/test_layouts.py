"""Layouts: small ones written out, the original's bit for bit, refusals, and the config section."""

from __future__ import annotations

import importlib
import importlib.util
import random

import layout_parameters as parameters
import pytest
import torch

import ds_ops
from ds_core.errors import ConfigError
from ds_core.testing.original import original_deepspeed
from ds_ops import sparse_attention

#: Of 300 draws of each, as DeepSpeed 0.18.2 makes them.
DIGESTS = {
    "Dense": "be80e4dc82ce0e63",
    "Fixed": "b0fc20380b25b318",
    "Variable": "67738822ebe11897",
    "BigBird": "e41b85a8875fffb8",
    "BSLongformer": "634668dd989f719a",
    "LocalSlidingWindow": "9f9faded3c41e52d",
}


def drawn(layout):
    return [["".join(".#"[n] for n in row) for row in head] for head in layout.tolist()]


def one(config, blocks):
    """The only head's layout for so many blocks."""
    heads = drawn(config.make_layout(blocks * config.block))
    assert heads == heads[:1] * config.num_heads
    return heads[0]


def test_dense():
    assert one(ds_ops.DenseSparsityConfig(2), 2) == ["##", "##"]


def test_fixed():
    assert one(ds_ops.FixedSparsityConfig(2, num_local_blocks=2), 5) == [
        "##.##", "##.##", ".####", ".####", ".#.##",
    ]  # fmt: skip
    backward = ds_ops.FixedSparsityConfig(1, num_local_blocks=2, attention="unidirectional")
    assert one(backward, 4) == ["#...", "##..", ".##.", ".###"]


def test_fixed_with_global_rows():
    config = ds_ops.FixedSparsityConfig(1, num_local_blocks=2, horizontal_global_attention=True)
    assert one(config, 4) == ["##.#", "####", ".###", "####"]


def test_fixed_with_global_blocks_of_each_head():
    config = ds_ops.FixedSparsityConfig(
        3, different_layout_per_head=True, num_local_blocks=2, num_different_global_patterns=2
    )
    first, second, third = drawn(config.make_layout(64))
    assert first == third == ["##.#", "##.#", ".###", ".###"]
    assert second == ["###.", "###.", "#.##", "#.##"]


def test_variable():
    config = ds_ops.VariableSparsityConfig(
        1, local_window_blocks=[1, 2], global_block_indices=[3], global_block_end_indices=[4]
    )
    assert one(config, 5) == ["#..#.", ".###.", ".###.", "...##", "...##"]


def test_big_bird():
    config = ds_ops.BigBirdSparsityConfig(1, num_random_blocks=0)
    assert one(config, 5) == ["#####", "###..", "####.", "#.###", "#..##"]
    backward = ds_ops.BigBirdSparsityConfig(1, num_random_blocks=0, attention="unidirectional")
    assert one(backward, 4) == ["#...", "##..", "###.", "#.##"]


def test_longformer():
    config = ds_ops.BSLongformerSparsityConfig(1, global_block_indices=[2, 7])
    assert one(config, 4) == ["###.", "###.", "####", "..##"]


def test_local_sliding_window():
    assert one(ds_ops.LocalSlidingWindowSparsityConfig(2), 4) == ["#...", "##..", ".##.", "..##"]
    both = ds_ops.LocalSlidingWindowSparsityConfig(1, attention="bidirectional")
    assert one(both, 3) == ["##.", "###", ".##"]


@pytest.mark.parametrize("name", parameters.NAMES)
def test_layouts_are_those_of_the_original(name):
    assert parameters.digest(sparse_attention, name, 300) == DIGESTS[name]


@pytest.mark.parametrize("name", parameters.NAMES)
def test_layouts_equal_those_of_the_original_that_is_installed(name):
    version = original_deepspeed()
    if version is None:
        pytest.skip("DeepSpeed is not installed")
    module = "deepspeed.ops.sparse_attention.sparsity_config"
    if importlib.util.find_spec("deepspeed.ops.sparse_attention") is None:
        pytest.skip(f"DeepSpeed {version} has no sparse attention; 0.18 was the last")
    original = importlib.import_module(module)
    for number in range(300):
        own = parameters.made(sparse_attention, name, number)
        other = parameters.made(original, name, number)
        assert (own is None) == (other is None), number
        assert own is None or torch.equal(own, other), number


@pytest.mark.parametrize("kind", ["VariableSparsityConfig", "BigBirdSparsityConfig"])
def test_random_blocks(kind):
    def made(**more):
        given = {"num_random_blocks": 3, "different_layout_per_head": True}
        return getattr(ds_ops, kind)(4, **given, **more).make_layout(16 * 32)

    plain = made(seed=1)
    assert torch.equal(plain, made(seed=1))
    assert not torch.equal(plain, made(seed=2))
    assert not torch.equal(plain[0], plain[1])
    assert (plain.sum(-1) >= 3).all()
    random.seed(5)
    first = made()
    assert not torch.equal(first, made())
    random.seed(5)
    assert torch.equal(first, made())


def test_random_blocks_of_unidirectional_big_bird_are_not_later_ones():
    layout = ds_ops.BigBirdSparsityConfig(1, attention="unidirectional").make_layout(512)
    assert torch.equal(layout, layout.tril())


def test_a_layout_of_ones_own():
    class Diagonal(ds_ops.SparsityConfig):
        def fill(self, blocks, head):
            blocks.fill_diagonal_(1)

    assert one(Diagonal(2), 2) == ["#.", ".#"]
    with pytest.raises(NotImplementedError, match="SparsityConfig has no layout: define fill"):
        ds_ops.SparsityConfig(1).make_layout(16)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("Dense", {"num_heads": 0}, "num_heads: got 0, expected an integer from 1 on"),
        ("Dense", {"block": 16.0}, "block: got 16.0"),
        ("Fixed", {"num_global_blocks": 3}, "num_global_blocks: got 3, .* num_local_blocks, 4"),
        ("Fixed", {"attention": "causal"}, "attention: got 'causal', expected bidirectional or"),
        ("Fixed", {"num_different_global_patterns": 2}, "1 unless different_layout_per_head"),
        (
            "Fixed",
            {"num_different_global_patterns": 5, "different_layout_per_head": True},
            "at most num_local_blocks / num_global_blocks = 4",
        ),
        (
            "Fixed",
            {"attention": "unidirectional", "horizontal_global_attention": True},
            "horizontal_global_attention: got True, expected False",
        ),
        ("Variable", {"local_window_blocks": []}, "local_window_blocks: got"),
        ("Variable", {"local_window_blocks": [2, 0]}, "local_window_blocks: got"),
        ("Variable", {"global_block_indices": [-1]}, "global_block_indices: got"),
        ("Variable", {"global_block_end_indices": [0]}, "one end behind each"),
        ("Variable", {"num_random_blocks": -1}, "num_random_blocks: got -1"),
        (
            "BigBird",
            {"num_random_blocks": 2, "attention": "unidirectional"},
            "0 or 1 for unidirectional attention",
        ),
        ("BSLongformer", {"global_block_end_indices": [1, 2]}, "one end behind each"),
        ("BSLongformer", {"attention": "both"}, "attention: got 'both'"),
        ("LocalSlidingWindow", {"num_sliding_window_blocks": 0}, "num_sliding_window_blocks: got"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, given, told):
    with pytest.raises(ConfigError, match=f"{kind}SparsityConfig: .*{told}|{told}"):
        getattr(ds_ops, f"{kind}SparsityConfig")(**{"num_heads": 2, **given})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (ds_ops.BigBirdSparsityConfig(1), "num_sliding_window_blocks: got 3"),
        (ds_ops.BigBirdSparsityConfig(1, num_random_blocks=4), "num_random_blocks: got 4"),
        (ds_ops.VariableSparsityConfig(1, num_random_blocks=4), "num_random_blocks: got 4"),
        (ds_ops.BSLongformerSparsityConfig(1), "num_sliding_window_blocks: got 3"),
        (ds_ops.LocalSlidingWindowSparsityConfig(1), "num_sliding_window_blocks: got 3"),
    ],
)
def test_sequences_that_are_too_short_are_refused(config, key):
    with pytest.raises(ConfigError, match=f"{key}, expected no more than the 2 blocks"):
        config.make_layout(32)


def test_lengths_that_blocks_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"sequences of 40 tokens .* blocks of 16: pad them"):
        ds_ops.DenseSparsityConfig(1).make_layout(40)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, ds_ops.FixedSparsityConfig(3)),
        ({"mode": "dense", "block": 32}, ds_ops.DenseSparsityConfig(3, 32)),
        (
            {"mode": "fixed", "num_local_blocks": 8, "attention": "unidirectional"},
            ds_ops.FixedSparsityConfig(3, num_local_blocks=8, attention="unidirectional"),
        ),
        (
            {"mode": "variable", "local_window_blocks": [4, 8], "global_block_indices": [0, 9]},
            ds_ops.VariableSparsityConfig(
                3, local_window_blocks=[4, 8], global_block_indices=[0, 9]
            ),
        ),
        ({"mode": "bigbird"}, ds_ops.BigBirdSparsityConfig(3, num_random_blocks=0)),
        (
            {"mode": "bslongformer", "num_sliding_window_blocks": 5},
            ds_ops.BSLongformerSparsityConfig(3, num_sliding_window_blocks=5),
        ),
        ({"mode": "local_sliding_window"}, ds_ops.LocalSlidingWindowSparsityConfig(3)),
    ],
)
def test_a_config_section_is_the_layout_that_it_names(section, expected):
    found = sparse_attention.sparsity_config(section, num_heads=3)
    assert type(found) is type(expected)
    assert vars(found) == vars(expected)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"mode": "strided"}, r"sparse_attention\.mode: got 'strided', expected one of dense, fix"),
        ({"mode": 3}, r"sparse_attention\.mode: got 3"),
        ({"num_blocks": 3}, r"sparse_attention\.num_blocks: mode 'fixed' has no such key; it has"),
        ({"mode": "dense", "num_heads": 3}, r"sparse_attention\.num_heads: mode 'dense' has no"),
        ({"block": 0}, "sparse_attention: FixedSparsityConfig: block: got 0"),
    ],
)
def test_a_config_section_that_makes_no_sense_is_refused(section, told):
    with pytest.raises(ConfigError, match=told):
        sparse_attention.sparsity_config(section, num_heads=3)
