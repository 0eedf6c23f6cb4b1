"""The batch triangle."""

from __future__ import annotations

import pytest

from ds_core import config
from ds_core.config import batch
from ds_core.errors import ConfigError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def load(train, micro, steps, world_size):
    values = zip(KEYS, (train, micro, steps), strict=True)
    given = {key: value for key, value in values if value is not ...}
    return config.load(given, world_size=world_size, sections={})


@pytest.mark.parametrize(
    "corners",
    [
        pytest.param((48, 4, 3), id="all"),
        pytest.param((48, 4, ...), id="steps-solved"),
        pytest.param((48, ..., 3), id="micro-solved"),
        pytest.param((..., 4, 3), id="train-solved"),
        pytest.param((48, "auto", 3), id="auto"),
        pytest.param((48, None, 3), id="null"),
        pytest.param((48.0, 4, "auto"), id="float"),
    ],
)
def test_any_two_corners_give_the_third(corners):
    loaded = load(*corners, world_size=4)

    assert [getattr(loaded, key) for key in KEYS] == [48, 4, 3]


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        pytest.param((32, ..., ...), (32, 16, 1), id="train"),
        pytest.param((..., 4, ...), (8, 4, 1), id="micro"),
    ],
)
def test_one_corner_means_one_accumulation_step(corners, expected):
    loaded = load(*corners, world_size=2)

    assert tuple(getattr(loaded, key) for key in KEYS) == expected


@pytest.mark.parametrize(
    ("corners", "fragment"),
    [
        pytest.param(
            (30, 4, 3),
            "got 30, but train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 3 x "
            "2 data-parallel ranks = 24",
            id="contradiction",
        ),
        pytest.param((30, 4, ...), "ranks = 8; use 24 or 32", id="micro-does-not-divide"),
        pytest.param((30, ..., 4), "ranks = 8; use 24 or 32", id="steps-do-not-divide"),
        pytest.param((1, ..., ...), "ranks = 2; use 2", id="fewer-than-ranks"),
        pytest.param((..., ..., 3), "train_batch_size: missing; give it or", id="steps-only"),
        pytest.param((..., ..., ...), "train_batch_size: missing; give it or", id="none"),
        pytest.param(("auto", "auto", 2), "Trainer fills in; give it or", id="all-auto"),
        pytest.param((10**400, 3, ...), "not a multiple of", id="huge"),
        pytest.param((0, ..., ...), "train_batch_size: got 0, expected an integer > 0", id="zero"),
        pytest.param(
            ("8", ..., ...), 'train_batch_size: got "8", expected an integer > 0', id="string"
        ),
        pytest.param(
            (8, True, ...),
            "train_micro_batch_size_per_gpu: got true, expected an integer",
            id="bool",
        ),
    ],
)
def test_triangle_that_does_not_close_shows_the_arithmetic(corners, fragment):
    with pytest.raises(ConfigError) as caught:
        load(*corners, world_size=2)

    assert fragment in str(caught.value)
    assert "problems" not in str(caught.value)


def test_every_solution_is_consistent():
    for world_size in (1, 2, 3):
        for micro in (1, 2, 5):
            for steps in (1, 4):
                solved = batch.solve(None, micro, steps, world_size=world_size)
                assert solved == batch.solve(solved.train, micro, None, world_size=world_size)
                assert solved == batch.solve(solved.train, None, steps, world_size=world_size)


@pytest.mark.parametrize("world_size", [0, -1, "2"])
def test_world_size_must_be_a_count(world_size):
    with pytest.raises(ConfigError, match="world_size: got"):
        config.load({"train_batch_size": 1}, world_size=world_size, sections={})
