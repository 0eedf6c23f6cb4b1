"""One global batch for many cluster sizes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ds_core.cli.app import make_app
from ds_core.config import load
from ds_core.elasticity import choose_batch, highly_composite
from ds_core.errors import ConfigError

SECTION = {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]}

# (micro-batches, largest batch, fewest and most GPUs, prefers larger, GPUs per node, model
# parallel) and what DeepSpeed chose for them: batch, numbers of data-parallel ranks: how many,
# the first, the last.
CHOSEN = [
    (([2, 4, 6], 2000, 1, 10000, True, 1, 1), (1680, 32, 1, 840)),
    (([8, 12, 16, 17], 10000, 32, 1500, True, 1, 1), (9792, 23, 32, 1224)),
    (([8, 12, 16, 17], 10000, 32, 1500, False, 1, 1), (9792, 23, 32, 1224)),
    (([1, 2, 3], 720, 1, 64, True, 1, 1), (720, 21, 1, 60)),
    (([5, 7, 11], 1000, 2, 100, True, 1, 1), (840, 21, 2, 84)),
    (([64], 64, 1, 10000, True, 1, 1), (64, 1, 1, 1)),
    (([2, 4, 6], 2000, 8, 10000, True, 8, 1), (1920, 16, 8, 960)),
    (([2, 4, 6], 2000, 8, 10000, True, 8, 2), (1920, 20, 4, 960)),
    (([1, 2], 512, 4, 64, True, 4, 4), (480, 11, 1, 16)),
    (([12, 16], 10000, 4, 1024, False, 4, 2), (5760, 26, 2, 480)),
]


@pytest.mark.parametrize(("asked", "expected"), CHOSEN)
def test_the_batch_is_the_one_that_deepspeed_chose(asked, expected):
    micros, most, low, high, larger, per_node, parallel = asked
    chosen = choose_batch(
        max_train_batch_size=most,
        micro_batch_sizes=micros,
        min_gpus=low,
        max_gpus=high,
        prefer_larger_batch=larger,
        num_gpus_per_node=per_node,
        model_parallel_size=parallel,
    )
    ranks = chosen.data_ranks
    assert (chosen.train_batch_size, len(ranks), ranks[0], ranks[-1]) == expected


def test_highly_composite_numbers_are_those_of_ramanujan():
    known = [1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040]
    assert highly_composite(5040) == known
    assert highly_composite(720_720)[-1] == 720_720


@settings(max_examples=150, deadline=None)
@given(
    micros=st.lists(st.integers(1, 64), min_size=1, max_size=5),
    most=st.integers(64, 50_000),
    per_node=st.sampled_from([1, 2, 4, 8]),
)
def test_the_batch_divides_evenly_on_every_listed_cluster(micros, most, per_node):
    try:
        chosen = choose_batch(
            max_train_batch_size=most, micro_batch_sizes=micros, num_gpus_per_node=per_node
        )
    except ConfigError:
        assert max(micros) * per_node > most
        return
    assert chosen.train_batch_size <= most
    for ranks in chosen.data_ranks:
        solved = chosen.solve(ranks)
        assert solved.train == solved.micro * solved.steps * ranks == chosen.train_batch_size
        assert solved.micro in micros
        assert ranks % per_node == 0


@pytest.mark.parametrize("world_size", [1, 2, 6, 840])
def test_an_enabled_section_solves_the_batch_of_a_config(world_size):
    config = load({"elasticity": SECTION}, world_size=world_size)
    assert config.train_batch_size == 1680
    assert config.train_micro_batch_size_per_gpu in (2, 4, 6)
    assert (
        config.train_micro_batch_size_per_gpu * config.gradient_accumulation_steps * world_size
        == 1680
    )
    assert config.origin("train_batch_size") == "derived"


def test_batch_keys_beside_the_section_are_refused_or_ignored_as_it_says():
    given_too = {"train_batch_size": 7, "elasticity": SECTION}
    with pytest.raises(ConfigError, match="train_batch_size: given, but elasticity chooses"):
        load(given_too)
    ignoring = {**SECTION, "ignore_non_elastic_batch_info": True}
    assert load({**given_too, "elasticity": ignoring}).train_batch_size == 1680


def test_a_section_that_is_not_enabled_changes_nothing():
    config = load({"train_batch_size": 7, "elasticity": {**SECTION, "enabled": False}})
    assert config.train_batch_size == 7


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 11, "does not divide among 11 data-parallel ranks; use 10 or 12"),
        ({"min_gpus": 5, "max_gpus": 4}, 1, "max_gpus: got 4, which is less than min_gpus 5"),
        ({"micro_batch_sizes": [4000]}, 1, "got 4000, but one micro-batch"),
        ({"micro_batch_sizes": [0]}, 1, "got 0, expected at least 1"),
        ({"version": 0.1, "model_parallel_size": 2}, 1, "needs version 0.2"),
        ({"version": 0.3}, 1, "got 0.3, expected one of 0.1, 0.2"),
        ({"num_gpus_per_node": 4, "model_parallel_size": 3}, 1, "does not divide"),
        ({"min_gpus": 1300, "max_gpus": 1400}, 1, "no batch of at most 2000 samples"),
        ({"prefer_large_batch": True}, 1, "prefer_larger_batch"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(changes, world_size, message):
    with pytest.raises(ConfigError, match=message):
        load({"elasticity": {**SECTION, **changes}}, world_size=world_size)


def test_an_enabled_section_must_say_which_batches():
    with pytest.raises(ConfigError, match="max_train_batch_size and micro_batch_sizes must be"):
        load({"elasticity": {"enabled": True}})


@pytest.fixture
def invoke(tmp_path):
    def run(section, *words):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"elasticity": section} if section else {}))
        return CliRunner().invoke(make_app(), ["elastic", str(path), *words])

    return run


def test_the_command_shows_batch_and_clusters(invoke):
    shown = invoke(SECTION)
    assert "1680" in shown.output
    assert "gpu_counts:" in shown.output


def test_the_command_solves_for_one_cluster(invoke):
    section = {**SECTION, "num_gpus_per_node": 8, "model_parallel_size": 2}
    told = json.loads(invoke(section, "--world-size", "16", "--json").output)
    micro, steps = told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]
    assert micro * steps * 16 // 2 == told["train_batch_size"]


@pytest.mark.parametrize(
    ("section", "words", "message"),
    [
        (SECTION, ("--world-size", "11"), "does not suit 11 GPUs; use 10 or 12"),
        (None, (), 'has no "elasticity" section'),
        ({**SECTION, "micro_batches": []}, (), "elasticity.micro_batches: unknown key"),
        (5, (), "elasticity: got 5, expected an object"),
    ],
)
def test_the_command_says_what_is_wrong(invoke, section, words, message):
    assert message in str(invoke(section, *words).exception)
